"""A write-back that reads its gradient gets it from the factors: the gradient is never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels_support import EVALUATOR, evaluated_kernels
from passes_support import RULES, SHARED, Built, Full, Layer, Tensors, build, own, prefixed, write
from support import assert_within_contract
from torch import Tensor

from qgalore_compile.formats import Format
from qgalore_compile.formats.operators import decode, encode
from qgalore_compile.kernels import lowering
from qgalore_compile.kernels.ir.gemm import GemmProgram
from qgalore_compile.kernels.ops import program_of, run_gemm, run_program
from qgalore_compile.passes.manager import PassManager
from qgalore_compile.passes.nodes import Mutation, is_gemm, shape

aten = torch.ops.aten
PASSES = ("update", "late_gradient", "refresh", "reassociate", "fuse")
SIDES = {"right": (20, 12), "left": (12, 20)}


@pytest.fixture(autouse=True)
def evaluated() -> Iterator[None]:
    with evaluated_kernels():
        yield


def norms(x: Tensor, layer: Layer) -> Tensor:
    """Of columns on the left, of rows on the right."""
    return x.square().sum(1 if layer.right else 0, keepdim=True).sqrt()


def fira(layer: Layer, n: Tensor, r: Tensor, g: Tensor, p: Tensor) -> Tensor:
    """As this project writes it, with a limiter that asks for R alone."""
    phi = norms(n, layer) / (norms(r, layer) + 1e-8)
    factor = torch.where((phi * r).norm() > 3, 0.5, 1.0)
    return 0.25 * layer.back(n - factor * phi * r, p) + factor * phi * g


def plain_fira(layer: Layer, n: Tensor, r: Tensor, g: Tensor, p: Tensor) -> Tensor:
    """As one writes it who takes the residual literally: two products with the projector."""
    phi = norms(n, layer) / (norms(r, layer) + 1e-8)
    return layer.back(n, p) + (g - layer.back(r, p)) * phi


def signed(layer: Layer, n: Tensor, r: Tensor, g: Tensor, p: Tensor) -> Tensor:
    """What is no scaling of G, element by element."""
    return layer.back(n, p) + 0.1 * torch.sign(g)


def apollo(layer: Layer, n: Tensor, r: Tensor, g: Tensor, p: Tensor) -> Tensor:
    """No product but the gradient's."""
    return g * (norms(n, layer) / (norms(r, layer) + 1e-8))


def one_factor(layer: Layer, n: Tensor, r: Tensor, g: Tensor, p: Tensor) -> Tensor:
    """APOLLO-Mini's."""
    return g * (n.norm() / (r.norm() + 1e-8))


WRITES: dict[str, Full] = {each.__name__: each for each in (fira, plain_fira, signed, apollo, one_factor)}


def step(layer: Layer, how: Full, **settings: Any) -> Built:
    """A graph in which ``layer`` is updated in that way."""
    torch.manual_seed(0)

    def body(t: Tensors) -> None:
        write(t, prefixed(layer, layer.step(own(layer, t), how)))

    return build(body, {**SHARED, **layer.inputs()}, **settings)


def fused(layer: Layer, how: Full, **settings: Any) -> tuple[Built, PassManager]:
    """A step that is fused, compared with one that is not, and in float32 with one that no pass has seen."""
    exact, plain, built = (step(layer, how, **settings) for _ in range(3))
    plain.after(*PASSES[:-1])
    manager = built.after(*PASSES)
    assert all(record.matches for record in manager.records if record.name in ("update", "late_gradient", "fuse"))
    assert_within_contract(built.run(), plain.run())
    if layer.dtype == torch.float32:
        assert_within_contract(built.run(), exact.run())
    return built, manager


def whole(built: Built, layer: Layer) -> list[str]:
    """Products as large as the weight that the graph still holds."""
    return [node.name for node in built.graph.nodes
            if is_gemm(node) and shape(node) in (layer.shape, layer.shape[::-1])]  # fmt: skip


def write_back(built: Built) -> GemmProgram:
    calls = [call for node in built.graph.nodes if (call := Mutation.of(node, run_gemm))]
    (call,) = calls
    program = program_of(call.program)
    assert isinstance(program, GemmProgram)
    return program


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", WRITES)
def test_no_gradient_is_formed_and_one_kernel_writes_the_weight(name: str, side: str) -> None:
    layer = Layer(shape=SIDES[side])
    built, _ = fused(layer, WRITES[name])
    assert whole(built, layer) == []
    products = {"fira": 2, "plain_fira": 3, "signed": 2, "apollo": 1, "one_factor": 1}
    assert len(write_back(built).products) == products[name]
    assert sum(Mutation.of(node, run_program) is not None for node in built.graph.nodes) == 1


@pytest.mark.parametrize("name", ["fira", "apollo"])
@pytest.mark.parametrize("projector", ["float", "int4"])
@pytest.mark.parametrize("weight", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_every_format_and_odd_shapes(name: str, projector: str, weight: str, dtype: torch.dtype) -> None:
    for shape_ in ((20, 13), (9, 24), (20, 8)):
        layer = Layer(shape=shape_, projector=projector, weight=weight, dtype=dtype)
        built, _ = fused(layer, WRITES[name])
        assert whole(built, layer) == []


@pytest.mark.parametrize("refresh", ["svd", "randomized"])
@pytest.mark.parametrize("due", [True, False])
def test_a_refresh_takes_the_factors_as_before(refresh: str, due: bool) -> None:
    layer = Layer(refresh=refresh, due=due)
    built, _ = fused(layer, fira)
    assert whole(built, layer) == []


@pytest.mark.parametrize("gradient", ["mm", "transposed", "bmm", "einsum", "view"])
def test_however_the_backward_spells_it(gradient: str) -> None:
    layer = Layer(gradient=gradient)
    built, _ = fused(layer, fira)
    assert whole(built, layer) == []


@pytest.mark.parametrize("addition", ["add", "addmm"])
def test_of_micro_batches_there_is_one_product_over_all_tokens(addition: str) -> None:
    layer = Layer(accumulate=3, addition=addition, tokens=2)
    built, _ = fused(layer, fira)
    assert whole(built, layer) == []
    assert len(write_back(built).products) == 2


def test_micro_batches_may_have_factors_of_their_own() -> None:
    layer = Layer(accumulate=2, tokens=3, after=lambda g, t: g / 2)
    built, _ = fused(layer, apollo)
    assert whole(built, layer) == []


def test_what_an_addmm_adds_may_be_the_gradient_but_the_update_stays() -> None:
    """Its product adds something by itself, which generated kernels do not."""
    inputs = {"dy": torch.randn(7, 20), "x": torch.randn(7, 12), "p": torch.randn(4, 12), "m": torch.randn(20, 4)}
    inputs |= {"w": torch.randn(20, 12)}

    def body(t: Tensors) -> None:
        gradient = t["dy"].t() @ t["x"]
        m = 0.9 * t["m"] + gradient @ t["p"].t()
        write(t, {"m": m, "w": torch.addmm(t["w"] - 0.1 * gradient, m, t["p"])})

    plain, built = build(body, inputs), build(body, inputs)
    records = built.after(*PASSES).records
    assert records[1].skipped == [("addmm", "the product with the projector adds something by itself")]
    assert_within_contract(built.run(), plain.run())


# -- where the gradient stays -----------------------------------------------------------------------------------------


def kept(layer: Layer, how: Full, also: Callable[[Tensors], Any] | None = None, **options: Any) -> list[Any]:
    """Records of the passes on a step whose gradient is formed; the update is fused and right."""
    plain, built = step(layer, how), step(layer, how)
    manager = built.after(*PASSES, **options)
    assert_within_contract(built.run(), plain.run())
    assert len(whole(built, layer)) == 1
    assert manager.records[-1].matches
    return manager.records


def test_a_gradient_that_is_kept_is_read_as_it_is() -> None:
    records = kept(Layer(), fira, reassociate="never")
    assert records[1].skipped == [("mm_2", 'reassociate="never" keeps the gradient')]


def test_one_that_comes_into_the_graph_is_read_as_it_is() -> None:
    inputs = {"g": torch.randn(20, 12), "p": torch.linalg.qr(torch.randn(12, 4))[0].t().contiguous()}
    inputs |= {"m": torch.randn(20, 4), "w": torch.randn(20, 12)}

    def body(t: Tensors) -> None:
        low = t["g"] @ t["p"].t()
        momentum = 0.9 * t["m"] + low
        write(t, {"m": momentum, "w": t["w"] - momentum @ t["p"] - 0.1 * t["g"]})

    plain, built = build(body, inputs), build(body, inputs)
    records = built.after(*PASSES).records
    assert len(records[-1].matches) == 1
    assert_within_contract(built.run(), plain.run())
    assert len(write_back(built).products) == 1


def test_one_that_the_step_returns_stays_and_the_update_reads_it() -> None:
    layer = Layer()
    inputs = {**SHARED, **layer.inputs()}

    def body(t: Tensors) -> Tensor:
        gradient = layer.full_gradient(own(layer, t))
        low = layer.project(gradient, t["a_p"])
        n, states = RULES["adam"](low, own(layer, t))
        write(t, {"a_w": t["a_w"] - fira(layer, n, low, gradient, t["a_p"]), "a_m": states["m"], "a_v": states["v"]})
        return gradient

    plain, built = build(body, inputs), build(body, inputs)
    records = built.after(*PASSES).records
    assert "the gradient has another reader: the step returns it" in records[1].skipped[0][1]
    assert records[-1].matches
    assert_within_contract(built.run(), plain.run())
    assert len(whole(built, layer)) == 1


@pytest.mark.parametrize(
    ("lacks", "symbolic", "reason"),
    [
        ({"products": False}, (), "kernels of this device take one product in a write-back"),
        ({"lengths": False}, ("a_dy0", "a_x0"), "kernels of this device are made for a number of tokens, which is kn"),
    ],
)
def test_where_kernels_cannot_take_it_the_gradient_is_formed_and_read(
    lacks: dict[str, bool], symbolic: tuple[str, ...], reason: str
) -> None:
    layer = Layer()
    with lowering.registered(replace(EVALUATOR, **lacks)):
        plain, built = step(layer, fira, symbolic=symbolic), step(layer, fira, symbolic=symbolic)
        records = built.after(*PASSES).records
        assert records[1].skipped[0][1].startswith(reason)
        assert records[-1].matches
        assert_within_contract(built.run(), plain.run())
    assert len(whole(built, layer)) == 1


@pytest.mark.parametrize("how", [fira, apollo], ids=lambda how: how.__name__)
def test_on_a_cpu_the_number_of_tokens_may_be_a_symbol(how: Full) -> None:
    layer = Layer()
    built, _ = fused(layer, how, symbolic=("a_dy0", "a_x0"))
    assert whole(built, layer) == []


# -- a momentum of all of it ------------------------------------------------------------------------------------------


def momentum(shape_: tuple[int, int], form: str, both: bool) -> Built:
    """A step whose momentum is as large as the weight, scaled by what sketches tell of the longer side, or of both."""
    (m, n), tokens = shape_, 7
    inputs = {**SHARED, "w": torch.randn(m, n), "p": torch.randn(4, n), "q": torch.randn(4, m)}
    inputs |= {"a": torch.rand(m), "b": torch.rand(n), "dy": torch.randn(tokens, m), "x": torch.randn(tokens, n)}
    own = Format.parse(form) if form else None
    parts = own.encode(torch.randn(m, n)) if own else [torch.randn(m, n)]
    inputs |= {f"m{index}": part for index, part in enumerate(parts)}

    def body(t: Tensors) -> None:
        g = t["dy"].t() @ t["x"]
        found = {}
        if both or m >= n:
            found["a"] = 0.99 * t["a"] + 0.01 * (g @ t["p"].t()).square().mean(1)
        if both or m < n:
            found["b"] = 0.99 * t["b"] + 0.01 * (t["q"] @ g).square().mean(0)
        roots = [each.sqrt().unsqueeze(1 if name == "a" else 0) for name, each in found.items()]
        names = [f"m{index}" for index in range(len(parts))]
        stored = [t[name] for name in names]
        fresh = 0.9 * (decode(stored, (m, n), own) if own else stored[0]) + 0.1 * g
        new = encode(fresh, own) if own else [fresh]
        below = (roots[0] * roots[1] if both else roots[0]) + 1e-8
        write(t, {**dict(zip(names, new, strict=True)), **found, "w": t["w"] - t["lr"] * fresh / below})

    torch.manual_seed(0)
    return build(body, inputs)


@pytest.mark.parametrize("both", [False, True], ids=["one side", "both"])
@pytest.mark.parametrize("form", ["", "moment4/8+rows", "e4m3/8"])
@pytest.mark.parametrize("shape_", [(20, 16), (16, 20), (9, 24)])
def test_a_momentum_of_all_of_it_is_a_state_that_the_write_back_changes_too(
    form: str, shape_: tuple[int, int], both: bool
) -> None:
    exact, built = momentum(shape_, form, both), momentum(shape_, form, both)
    manager = built.after(*PASSES)
    assert {record.name: len(record.matches) for record in manager.records} == {
        "update": 1, "late_gradient": 1, "refresh": 0, "reassociate": 1, "fuse": 1
    }, [record.skipped for record in manager.records]  # fmt: skip
    assert_within_contract(built.run(), exact.run())
    assert [node for node in built.graph.nodes if is_gemm(node) and sorted(shape(node)) == sorted(shape_)] == []
    assert len(write_back(built).products) == 1


@pytest.mark.parametrize("flaw", ["sums of G", "reads the weight", "another layer's", "returned"])
def test_what_is_no_momentum_of_the_layer_s_own_is_left_or_right(flaw: str) -> None:
    """However little is fused then: what the step writes is what it wrote."""
    inputs = {
        **SHARED,
        "w": torch.randn(16, 20),
        "p": torch.randn(4, 16),
        "b": torch.rand(20),
        "m": torch.randn(16, 20),
    }
    inputs |= {"dy": torch.randn(7, 16), "x": torch.randn(7, 20), "other": torch.randn(16, 20)}

    def body(t: Tensors) -> Any:
        g = t["dy"].t() @ t["x"]
        square = g.square().mean(0) if flaw == "sums of G" else (t["p"] @ g).square().mean(0)
        b = 0.99 * t["b"] + 0.01 * square
        m = 0.9 * t["m"] + 0.1 * g + (0.01 * t["w"] if flaw == "reads the weight" else 0.0)
        found = {"m": m, "b": b, "w": t["w"] - t["lr"] * m / (b.sqrt() + 1e-8)}
        if flaw == "another layer's":
            found["other"] = t["other"] - t["lr"] * m
        write(t, found)
        return m if flaw == "returned" else None

    exact, built = build(body, inputs), build(body, inputs)
    built.after(*PASSES)
    assert_within_contract(built.run(), exact.run())
