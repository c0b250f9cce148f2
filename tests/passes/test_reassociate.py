"""(dYᵀ X) Pᵀ  ->  dYᵀ (X Pᵀ): the same R, no full-rank gradient, and the reader that prevents it named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from passes_support import GRADIENTS, RULES, SHARED, Built, Layer, Tensors, assert_near, build, galore, own, write
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qgalore_compile.passes.nodes import is_gemm, operands, shape
from qgalore_compile.passes.reassociate import cost
from qgalore_compile.subspace.cost import Cost, Projection, T

aten = torch.ops.aten

SHAPES = {"right": (20, 12), "left": (12, 20), "square": (12, 12)}


def check(built: Built, layers: int = 1, tolerance: float = 1e-5) -> Any:
    """Run the pass: every layer rewritten, results the same within rounding, no gradient formed."""
    expected = built.run()
    manager = built.after("update", "reassociate")
    assert len(manager.records[1].matches) == layers
    assert not manager.records[1].skipped
    assert_near(built.run(), expected, tolerance)
    ups = {layer.up: layer for layer in manager.context.layers}
    weights = [sorted(map(str, layer.shape)) for layer in ups.values()]  # sizes may be symbolic
    formed = [node for node in built.graph.nodes if is_gemm(node) and sorted(map(str, shape(node)[-2:])) in weights]
    assert set(formed) == set(ups)
    return manager


def noted(built: Built, *passes: str, **options: Any) -> dict[str, Any]:
    """What the passes tell about the only layer."""
    manager = built.after("update", *passes, "reassociate", **options)
    (note,) = manager.context.notes.values()
    return note.told()


# -- the same result, without the gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("down", ["plain", "transposed"])
def test_r_is_the_same_in_every_spelling_and_on_every_side(where: str, down: str) -> None:
    layers = [Layer(f"l{index}", SHAPES[where], gradient=spelling, down=down, rule="sgd")
              for index, spelling in enumerate(GRADIENTS)]  # fmt: skip
    check(galore(*layers), layers=len(GRADIENTS))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("projector", "weight"), [("float", "float"), ("int4", "float")])
def test_whatever_the_optimizer_is(rule: str, projector: str, weight: str) -> None:
    # the sign of a tiny number flips with its rounding, in single places
    check(galore(Layer(rule=rule, projector=projector, weight=weight)), tolerance=1e-4)


@pytest.mark.parametrize("addition", ["add", "addmm"])
@pytest.mark.parametrize("accumulate", [2, 5])
@pytest.mark.parametrize("where", SHAPES)
def test_micro_batches_are_projected_one_by_one(accumulate: int, addition: str, where: str) -> None:
    built = galore(Layer(shape=SHAPES[where], accumulate=accumulate, addition=addition, rule="sgd"))
    check(built)
    assert len(built.gemms()) == 2 * accumulate + 1


@pytest.mark.parametrize("gradient", ["mm", "bmm", "transposed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_bf16_within_its_rounding(gradient: str, accumulate: int) -> None:
    check(galore(Layer(gradient=gradient, accumulate=accumulate, rule="sgd", dtype=torch.bfloat16)), tolerance=2e-2)


AFTER: dict[str, Callable[[Tensor, Tensors], Tensor]] = {
    "a number": lambda g, t: g * 0.25,
    "a quotient": lambda g, t: g / 7,
    "a 0-d tensor": lambda g, t: g * t["scale"],
    "an inverse": lambda g, t: g / t["scale"],
    "a sign": lambda g, t: -g,
    "a cast": lambda g, t: g.to(torch.float64).to(torch.float32),
    "all of it": lambda g, t: (-(g / t["scale"]) * 3).t().contiguous().t() * t["scale"],
}


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("down", ["plain", "transposed"])
def test_scales_and_casts_commute(name: str, down: str) -> None:
    layer = Layer(after=AFTER[name], accumulate=2, rule="sgd", down=down)
    check(galore(layer, extra={"scale": torch.tensor(0.3)}))


def test_a_bf16_gradient_that_is_cast_up_projects_in_bf16() -> None:
    layer = Layer(rule="sgd", dtype=torch.bfloat16, after=lambda g, t: g.to(torch.float32))
    built = galore(layer)
    check(built, tolerance=2e-2)
    skinny = [node for node in built.graph.nodes if is_gemm(node) and 4 in shape(node)]
    assert {node.meta["val"].dtype for node in skinny} == {torch.bfloat16}


@pytest.mark.parametrize("beta", [1, 0.9])
@pytest.mark.parametrize("alpha", [1, 0.1])
def test_what_a_down_projection_adds_stays_and_joins_the_update(alpha: float, beta: float) -> None:
    """Momentum as Inductor spells it."""

    def body(t: Tensors) -> None:
        gradient = t["dy"].t() @ t["x"]
        m = torch.addmm(0.5 * t["m"], gradient, t["p"].t(), alpha=alpha, beta=beta)
        write(t, {"m": m, "w": torch.addmm(t["w"], m, t["p"], alpha=-0.1)})

    inputs = {"dy": torch.randn(7, 20), "x": torch.randn(7, 12), "p": torch.randn(4, 12), "m": torch.randn(20, 4)}
    built = build(body, {**inputs, "w": torch.randn(20, 12)})
    manager = check(built)
    (layer,) = manager.context.layers
    assert [node.name for node in layer.states] == ["m"]
    assert layer.down not in layer.region
    assert layer.down.users.keys() <= set(layer.region)
    assert {anchor.args[0].name for anchor in layer.anchors} == {"m", "w"}


def test_every_layer_of_a_step_is_rewritten() -> None:
    spellings = itertools.product([(9, 8), (6, 10)], ["mm", "transposed"])
    layers = [Layer(f"l{at}", size, gradient=gradient, rule="sgd") for at, (size, gradient) in enumerate(spellings)]
    check(galore(*layers, shuffle=3), layers=4)


def test_layers_that_share_their_input_each_take_it() -> None:
    """Query and key: one X, two dY."""
    layers = [Layer("q", (9, 8), rank=3, rule="sgd"), Layer("k", (5, 8), rank=3, rule="sgd")]
    inputs = {**SHARED, **layers[0].inputs(), **layers[1].inputs()}

    def body(t: Tensors) -> None:
        for layer in layers:
            new = layer.step({**own(layer, t), "x0": t["q_x0"]})
            write(t, {f"{layer.name}_{name}": value for name, value in new.items()})

    check(build(body, inputs), layers=2)


SPELLINGS = ["view", "mm", "einsum", "bmm"]


@pytest.mark.parametrize("where", SHAPES)
def test_a_symbolic_token_count_runs_at_other_sizes(where: str) -> None:
    layers = [
        Layer(f"l{index}", SHAPES[where], gradient=spelling, rule="sgd") for index, spelling in enumerate(SPELLINGS)
    ]
    activations = [f"{layer.name}_{name}" for layer in layers for name in ("dy0", "x0")]
    built = galore(*layers, symbolic=activations)
    check(built, layers=len(layers))
    for name in activations:
        place = built.names.index(name)
        first, *others = built.inputs[place].shape
        built.inputs[place] = torch.randn(first + 5, *others)
    again = galore(*layers, values=dict(zip(built.names, built.inputs, strict=True)))
    assert_near(built.run(), again.run(), 1e-5)


def test_r_that_others_read_too_is_replaced_for_all() -> None:
    layer = Layer(rule="sgd")

    def body(t: Tensors) -> Tensor:
        low = layer.project(layer.full_gradient(own(layer, t)), t["a_p"])
        m = 0.9 * t["a_m"] + low
        write(t, {"a_m": m, "a_w": t["a_w"] - m @ t["a_p"]})
        return low.norm()

    check(build(body, {**SHARED, **layer.inputs()}))


# -- readers that prevent it ------------------------------------------------------------------------------------------


@torch.library.custom_op("qgalore_tests::watch", mutates_args=())
def watch(gradient: Tensor) -> Tensor:
    """Somebody's hook."""
    return gradient.clone()


@watch.register_fake
def _(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


READERS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "its norm": ("linalg_vector_norm|pow|abs", lambda g: torch.linalg.vector_norm(g)),
    "a sum": ("sum", torch.sum),
    "a hook's clone": ("clone", torch.clone),
    "a custom op": ("qgalore_tests.watch", lambda g: watch(g)),
    "a product": ("permute", lambda g: g @ g.t()),
}


def read(spelling: str, reader: Callable[[Tensor], Tensor], **layer: Any) -> Built:
    kept: list[Tensor] = []

    def keep(gradient: Tensor, t: Tensors) -> Tensor:
        kept.append(gradient)
        return gradient

    layers = Layer(gradient=spelling, rule="sgd", after=keep, **layer)
    return galore(layers, also=lambda t: reader(kept.pop()))


@pytest.mark.parametrize(
    ("name", "spelling"), [*zip(READERS, ["mm", "bmm", "transposed", "mm", "transposed"], strict=True)]
)
def test_a_second_reader_of_the_gradient_is_named(name: str, spelling: str) -> None:
    expected, reader = READERS[name]
    built = read(spelling, reader)
    before = built.gemms()
    facts = noted(built)
    assert facts["reassociated"] is False
    assert facts["not_reassociated"].startswith("the gradient has another reader: ")
    assert any(word in facts["not_reassociated"] for word in expected.split("|"))
    assert built.gemms() == before
    assert "<" in facts["inequality"] or ">=" in facts["inequality"]


def test_a_reader_of_one_micro_batches_product_is_named() -> None:
    def body(t: Tensors) -> Tensor:
        first = t["x"].t() @ t["dy"]
        m = 0.9 * t["m"] + (first + t["x"].t() @ t["dy"]).t() @ t["p"].t()
        write(t, {"m": m, "w": t["w"] - m @ t["p"]})
        return first.sum()

    inputs = {"dy": torch.randn(7, 20), "x": torch.randn(7, 12), "p": torch.randn(4, 12), "m": torch.randn(20, 4)}
    facts = noted(build(body, {**inputs, "w": torch.randn(20, 12)}))
    assert "another reader: sum" in facts["not_reassociated"]


def test_a_gradient_that_the_step_returns_is_told_with_a_remedy() -> None:
    facts = noted(read("mm", lambda gradient: gradient))
    assert "returns it, or leaves it in .grad (call zero_grad in the step)" in facts["not_reassociated"]


def test_a_clipped_gradient_is_read_by_its_norm() -> None:
    """``clip_grad_norm_`` before the projection: the factor commutes, but its norm is taken of G."""

    def clip(gradient: Tensor, t: Tensors) -> Tensor:
        return gradient * (1.0 / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)

    facts = noted(galore(Layer(rule="sgd", after=clip)))
    assert facts["not_reassociated"].startswith("the gradient has another reader")


def test_a_gradient_that_is_no_product_is_left_and_its_node_is_named() -> None:
    built = galore(Layer(rule="sgd", after=lambda g, t: torch.tanh(g)))
    facts = noted(built)
    assert facts["not_reassociated"] == "the gradient is no sum of matrix products: tanh (aten.tanh.default)"


def test_a_gradient_that_is_given_is_left_with_a_remedy() -> None:
    layer = Layer(after=lambda gradient, t: t["g"])
    built = galore(layer, extra={"g": torch.randn(20, 12)})
    facts = noted(built)
    assert facts["not_reassociated"] == (
        "the gradient comes into the graph with g: compile the backward in the same step"
    )


def test_a_refresh_op_that_takes_the_gradient_is_a_reader_like_another() -> None:
    facts = noted(galore(Layer(refresh="svd")))
    assert "qgalore.refresh_.default" in facts["not_reassociated"]


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "rewritten"),
    [(4, True), (8, True), (300, False)],
)
def test_cost_asks_for_fewer_operations_and_fewer_bytes(tokens: int, rewritten: bool) -> None:
    # through the factors 2 · 4 · (8 + 6) operations a token, through the gradient 2 · 8 · 6 and 2 · 4 · 8 · 6 once
    layer = Layer(shape=(8, 6), rank=4, tokens=tokens, rule="sgd")
    facts = noted(galore(layer), reassociate="cost")
    assert facts["reassociated"] is rewritten
    if not rewritten:
        assert facts["not_reassociated"] == 'reassociate="cost" keeps the gradient'
    assert noted(galore(layer), reassociate="memory")["reassociated"] is True


def test_cost_and_memory_agree_where_both_fall() -> None:
    layer = Layer(shape=(40, 30), rank=2, tokens=6, rule="sgd")
    assert noted(galore(layer), reassociate="cost")["reassociated"] is True


@pytest.mark.parametrize("refresh", [None, "svd"])
def test_never_leaves_every_gradient_and_says_so(refresh: str | None) -> None:
    built = galore(Layer(refresh=refresh))
    before = built.gemms()
    facts = noted(built, "refresh", reassociate="never")
    assert facts["reassociated"] is False
    assert facts["not_reassociated"] == 'reassociate="never" keeps the gradient'
    assert "operations" in facts["inequality"]
    assert built.gemms() == before


@pytest.mark.parametrize("mode", ["memory", "cost", "never"])
def test_the_inequality_of_a_symbolic_token_count_is_told_in_t(mode: str) -> None:
    layer = Layer(shape=(40, 30), rank=2, rule="sgd")
    facts = noted(galore(layer, symbolic=["a_dy0", "a_x0"]), reassociate=mode)
    assert facts["inequality"] == (
        "operations 280*T < 2400*T + 4800 for every T; bytes " + facts["inequality"].partition("bytes ")[2]
    )
    assert facts["reassociated"] is (mode != "never")


def test_the_inequality_of_a_known_token_count_is_two_numbers() -> None:
    facts = noted(galore(Layer(shape=(40, 30), rank=2, tokens=10, rule="sgd")))
    assert facts["inequality"].startswith("operations 2,800 < 28,800; bytes ")


# -- the estimate -----------------------------------------------------------------------------------------------------


def counted(built: Built, up: fx.Node) -> tuple[int, int]:
    """Operations and elements moved of all products in a graph but the up-projection."""
    operations = elements = 0
    for node in built.graph.nodes:
        if is_gemm(node) and node is not up:
            (m, k), (_, n) = map(shape, operands(node))
            operations += 2 * m * k * n
            elements += m * k + k * n + m * n * (2 if node.target is aten.addmm.default else 1)
    return operations, elements


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize(("accumulate", "rank", "dtype"), [(1, 2, torch.bfloat16), (3, 5, torch.float32)])
def test_the_estimate_is_what_the_products_of_both_graphs_do(
    where: str, accumulate: int, rank: int, dtype: torch.dtype
) -> None:
    layer = Layer(shape=SHAPES[where], rank=rank, accumulate=accumulate, addition="addmm", rule="sgd", dtype=dtype)
    built = galore(layer)
    found = built.layer()
    estimate, before = cost(found), counted(built, found.up)
    built.after("update", "reassociate")
    after = counted(built, found.up)
    assert estimate.tokens == layer.tokens
    assert [int(side.subs(T, layer.tokens)) for side in estimate.operations] == [before[0], after[0]]
    size = dtype.itemsize
    assert [int(side.subs(T, layer.tokens)) for side in estimate.traffic] == [size * before[1], size * after[1]]


def test_unequal_micro_batches_count_by_their_mean() -> None:
    def body(t: Tensors) -> None:
        gradient = t["a"].t() @ t["b"] + t["c"].t() @ t["d"]
        m = 0.9 * t["m"] + gradient @ t["p"].t()
        write(t, {"m": m, "w": t["w"] - m @ t["p"]})

    inputs = {"a": torch.randn(8, 20), "b": torch.randn(8, 12), "c": torch.randn(4, 20), "d": torch.randn(4, 12)}
    rest = {"p": torch.randn(4, 12), "m": torch.randn(20, 4), "w": torch.randn(20, 12)}
    assert cost(build(body, {**inputs, **rest}).layer()).tokens == 6


@pytest.mark.parametrize("slope", [-3, -1, 0, 1, 2])
@pytest.mark.parametrize("constant", [-17, -4, -1, 0, 1, 3, 10])
def test_the_words_say_exactly_where_the_inequality_holds(slope: int, constant: int) -> None:
    words = Cost(sympy.Integer(0), sympy.expand(slope * T + constant)).where()
    holds = [t for t in range(1, 40) if slope * t + constant < 0]
    if words == "for every T":
        assert holds == list(range(1, 40))
    elif words == "for no T":
        assert holds == []
    else:
        sign, bound = words.removeprefix("for T ").split()
        assert holds == [t for t in range(1, 40) if (t < int(bound) if sign == "<" else t > int(bound))]


def test_the_text_of_a_symbolic_estimate_tells_its_range() -> None:
    pair = Cost(sympy.expand(10 * T + 100), sympy.expand(30 * T))
    other = Cost(*reversed(pair))
    assert str(Projection(pair, other, None)) == (
        "operations 30*T < 10*T + 100 for T < 5; bytes 10*T + 100 < 30*T for T > 5"
    )
    assert str(Projection(pair, other, 5)) == "operations 150 >= 150; bytes 150 >= 150"


def test_an_unmatched_parameter_is_none_of_its_business() -> None:
    def body(t: Tensors) -> None:
        write(t, {"w": t["w"] - t["dy"].t() @ t["x"]})

    built = build(body, {"dy": torch.randn(7, 20), "x": torch.randn(7, 12), "w": torch.randn(20, 12)})
    manager = built.after("update", "reassociate")
    assert manager.records[1].matches == manager.records[1].skipped == []
    assert built.gemms() == [(20, 12)]


def test_a_weight_whose_sizes_are_symbolic_costs_what_tracing_saw() -> None:
    found = galore(Layer(shape=(8, 6), rank=4)).layer()
    env = ShapeEnv()
    symbolic = tuple(
        env.create_symintnode(env.create_symbol(size, ConstantSource(name)), hint=size)
        for name, size in zip("mn", found.shape, strict=True)
    )
    assert str(cost(replace(found, shape=symbolic))) == str(cost(found))
