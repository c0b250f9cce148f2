"""An update becomes two calls of generated kernels that compute the same, or stays, with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import after, results, targets, traced
from kernels_support import evaluated_kernels
from passes_support import RULES, Built, Layer, galore
from support import assert_within_contract
from torch import Tensor, fx, nn

import qgalore_compile as qg
from qgalore_compile import formats, rng
from qgalore_compile.kernels import lowering
from qgalore_compile.kernels.ir.gemm import GemmProgram
from qgalore_compile.kernels.ops import program_of, run_gemm, run_program
from qgalore_compile.passes.nodes import Mutation, anchors, is_gemm, shape, value

aten = torch.ops.aten
PASSES = ("update", "reassociate", "fuse")


@pytest.fixture(autouse=True)
def no_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs are evaluated, unless the test says that it compiles."""
    compiles = request.node.get_closest_marker("compiles")
    with nullcontext() if compiles else evaluated_kernels():
        yield


def calls(graph: fx.Graph) -> list[Mutation]:
    found = (Mutation.of(node, run_program, run_gemm) for node in graph.nodes)
    return [call for call in found if call]


def fused(*layers: Layer, count: int | None = None, **how: Any) -> tuple[Built, Any]:
    """Build a step twice, fuse one, compare; the fused one and its pass manager."""
    torch.manual_seed(0)
    plain = galore(*layers, **how)
    torch.manual_seed(0)
    built = galore(*layers, **how)
    plain.after(*PASSES[:-1])
    manager = built.after(*PASSES)
    record = manager.records[-1]
    assert (len(record.matches), record.skipped) == (len(layers) if count is None else count, [])
    # a refresh decodes and encodes by itself; everything else is within the contract
    assert_within_contract(built.run(), plain.run())
    return built, manager


def floats_of(built: Built, layer: Layer) -> list[str]:
    """Nodes of the weight's size in floating point, besides what the step is given and writes."""
    m, n = layer.shape
    bases = {base for call in calls(built.graph) for base in call.written}
    versions = {version for call in calls(built.graph) for _, version in call.results()}
    given = bases | versions | {*anchors(built.graph), *built.placeholders}
    return [node.name for node in built.graph.nodes
            if shape(node) in ((m, n), (n, m)) and value(node).is_floating_point() and node not in given]  # fmt: skip


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_becomes_two_calls_on_either_side(rule: str, side: str) -> None:
    layer = Layer(rule=rule, side=side)
    built, _ = fused(layer)
    assert [call.op for call in calls(built.graph)] == [run_program, run_gemm]
    assert floats_of(built, layer) == []
    assert [found for found in built.gemms() if found in (layer.shape, layer.shape[::-1])] == []


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("weight", ["float", "int8"])
@pytest.mark.parametrize("projector", ["float", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_of_weight_and_projector_is_fused(
    dtype: torch.dtype, projector: str, weight: str, side: str
) -> None:
    layer = Layer(projector=projector, weight=weight, side=side, dtype=dtype, shape=(20, 13))
    built, _ = fused(layer)
    assert floats_of(built, layer) == []
    gemm = program_of(calls(built.graph)[-1].program)
    assert isinstance(gemm, GemmProgram)
    decoded = [each.prologue is not None for each in (gemm.left, gemm.right)]
    # a cast to the products' type is decoding, too
    assert decoded.count(True) == (projector == "int4" or dtype != torch.float32)


@pytest.mark.parametrize("sides", [(12, 20), (16, 16), (9, 7), (33, 8)])
@pytest.mark.parametrize("refresh", [None, "svd"])
def test_odd_and_square_shapes_with_a_refresh_are_fused(sides: tuple[int, int], refresh: str | None) -> None:
    fused(Layer(shape=sides, weight="int8", projector="int4", refresh=refresh, due=False))


def test_layers_are_fused_each_by_itself_and_equal_ones_share_their_texts() -> None:
    layers = [Layer(name, weight="int8") for name in "abc"] + [Layer("d", shape=(12, 20), rule="lion")]
    built, manager = fused(*layers)
    texts = [call.program for call in calls(built.graph)]
    assert len(texts) == 8
    assert len(set(texts)) == 4
    assert manager.context.notes["a_w_codes"].update_function == "generated, 2 kernels"
    assert manager.context.layers[0].region == []


def test_stochastic_rounding_takes_the_layers_own_random_bits() -> None:
    def step(
        dy: Tensor, x: Tensor, p: Tensor, m: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, at: Tensor
    ) -> None:
        momentum = 0.9 * m + dy.t() @ x @ p.t()
        weight = formats.dequantize_int8(codes, scale, offset, 8) - 0.1 * (momentum @ p)
        noise = rng.random_bits(weight.shape, seed=1, step=at, param=2)
        for part, new in zip((codes, scale, offset), formats.quantize_int8(weight, 8, noise=noise)[:3], strict=True):
            aten.copy_.default(part, new)
        aten.copy_.default(m, momentum)

    stored = formats.quantize_int8(torch.randn(20, 13), 8)[:3]
    inputs = [torch.randn(7, 20), torch.randn(7, 13), torch.randn(4, 13), torch.randn(20, 4), *stored, torch.tensor(3)]
    plain, module = traced(step, *inputs), traced(step, *inputs)
    after(plain, *PASSES[:-1])
    record = after(module, *PASSES).records[-1]
    assert len(record.matches) == 1
    assert calls(module.graph)[-1]["numbers"] == [1, 2]
    assert torch.ops.qgalore.random_bits.default not in targets(module.graph)
    found, expected = (
        dict(zip(map(str, range(99)), results(each, inputs), strict=False)) for each in (module, plain)
    )  # fmt: skip
    assert_within_contract(found, expected)


def test_random_bits_of_moments_are_drawn_where_the_moments_are() -> None:
    form = formats.Format.parse("dynamic4/8")

    def step(
        dy: Tensor, x: Tensor, p: Tensor, w: Tensor, codes: Tensor, absmax: Tensor, at: Tensor, ok: Tensor
    ) -> None:
        momentum = 0.9 * formats.decode([codes, absmax], (20, 4), form) + dy.t() @ x @ p.t()
        noise = rng.random_bits((80,), seed=1, step=at, param=2).view(20, 4)
        for part, new in zip((codes, absmax), formats.encode(momentum, form, noise), strict=True):
            aten.copy_.default(part, torch.where(ok, new, part))
        aten.copy_.default(w, w - 0.1 * (momentum @ p))

    stored = form.encode(torch.randn(20, 4))
    floats = [torch.randn(shape) for shape in ((7, 20), (7, 13), (4, 13), (20, 13))]
    inputs = [*floats, *stored, torch.tensor(3), torch.tensor(True)]
    plain, module = traced(step, *inputs), traced(step, *inputs)
    after(plain, *PASSES[:-1])
    record = after(module, *PASSES).records[-1]
    assert len(record.matches) == 1
    low, up = calls(module.graph)
    assert (low["numbers"], up["numbers"]) == ([1, 2], [])
    assert torch.ops.qgalore.random_bits.default not in targets(module.graph)
    for found, expected in zip(results(module, inputs), results(plain, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # codes too: of the same draws


def test_the_states_of_a_fused_layer_are_written_in_place() -> None:
    built, _ = fused(Layer(weight="int8"))
    low, up = calls(built.graph)
    names = built.name_of
    assert {names.get(base.name) for base in low.written} == {"a_m", "a_v", None}
    assert {names.get(base.name) for base in up.written} == {"a_w_codes", "a_w_scale", "a_w_offset"}
    for base in [*low.written, *up.written]:
        assert base.op == "placeholder" or base.target is aten.empty.memory_format


# -- what stays -------------------------------------------------------------------------------------------------------


def skipped(built: Built) -> tuple[str, Any]:
    before = targets(built.graph)
    expected = built.run()
    manager = built.after("update", "fuse")
    record = manager.records[-1]
    assert record.matches == []
    assert targets(built.graph) == before
    assert_within_contract(built.run(), expected)
    ((_, reason),) = record.skipped
    return reason, manager


def unknown_state(low: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    momentum = (0.9 * t["m"] + low).cumsum(-1)
    return momentum, {"m": momentum}


def test_a_rule_whose_states_cannot_be_read_leaves_the_layer_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "unknown", unknown_state)
    reason, manager = skipped(galore(Layer(rule="unknown")))
    assert reason == "an operation that generated kernels do not know (at cumsum: aten.cumsum.default)"
    assert manager.context.notes["a_w"].not_fused == reason
    assert manager.context.layers[0].region != []


UNKNOWN: dict[str, Any] = {
    "atan": torch.atan,
    "erfinv": torch.erfinv,
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(-1).values,
}


@pytest.mark.parametrize("unknown", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_operation_on_n_that_cannot_be_read_leaves_it_too(unknown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(low: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        momentum = 0.9 * t["m"] + low
        return unknown(momentum), {"m": momentum}

    monkeypatch.setitem(RULES, "unknown", rule)
    reason, _ = skipped(galore(Layer(rule="unknown")))
    assert reason.startswith("an operation that generated kernels do not know (at ")


# -- what stays between two programs ----------------------------------------------------------------------------------


def normed(low: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    momentum = 0.9 * t["m"] + low
    return momentum / momentum.square().sum((0, 1), keepdim=True).sqrt(), {"m": momentum}


def by_columns(low: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    momentum = 0.9 * t["m"] + low
    return momentum / momentum.square().sum(0, keepdim=True).sqrt(), {"m": momentum}


def limited(low: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    momentum = 0.9 * t["m"] + low
    return momentum / (momentum.abs().amax() + 1e-3), {"m": momentum}


def orthogonal(low: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Newton and Schulz's iteration on the momentum."""
    momentum = 0.9 * t["m"] + low
    wide = momentum if momentum.shape[0] <= momentum.shape[1] else momentum.t()
    x = wide / wide.norm()
    for _ in range(3):
        square = x @ x.t()
        x = 1.5 * x - 0.5 * square @ x
    return x if momentum.shape[0] <= momentum.shape[1] else x.t(), {"m": momentum}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rule", [normed, by_columns, limited, orthogonal], ids=lambda rule: rule.__name__)
def test_what_no_program_knows_stays_between_two(rule: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "foreign", rule)
    layer = Layer(rule="foreign", side=side, weight="int8", projector="int4")
    built, manager = fused(layer)
    assert [call.op for call in calls(built.graph)] == [run_program, run_gemm]
    told = manager.context.notes["a_w_codes"].update_function
    assert told is not None
    assert told.startswith("generated, 2 kernels, and between them Inductor's ")
    first, _ = calls(built.graph)
    assert {built.name_of.get(base.name) for base in first.written} == {"a_m"}  # which is N too, and written once


def test_a_write_back_may_read_a_statistic_of_the_new_moment() -> None:
    layer, low = nn.Linear(24, 16, bias=False), torch.zeros(16, 4)
    projector = torch.linalg.qr(torch.randn(24, 4))[0].T.contiguous()

    def step(x: Tensor) -> Tensor:
        loss = layer(x).square().mean()
        loss.backward()
        with torch.no_grad():
            momentum = 0.9 * low + layer.weight.grad @ projector.T
            low.copy_(momentum)
            layer.weight.copy_(layer.weight - 0.01 * momentum.norm() * (momentum @ projector))
        layer.weight.grad = None
        return loss.detach()

    (found,) = qg.explain(step, torch.randn(32, 24)).layers
    assert found["update_function"] == "generated, 2 kernels"


def test_one_layer_that_stays_does_not_keep_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "unknown", unknown_state)
    built = galore(Layer("a", rule="unknown"), Layer("b"))
    expected = built.run()
    record = built.after("update", "fuse").records[-1]
    assert (len(record.matches), len(record.skipped)) == (1, 1)
    assert_within_contract(built.run(), expected)


def test_another_device_is_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_registered", [replace(lowering.CPP, devices=("xpu",))])
    reason, _ = skipped(galore(Layer()))
    assert reason == "no generated kernels for 'cpu', only for 'xpu'"


# -- full rank --------------------------------------------------------------------------------------------------------


def full_rank(size: tuple[int, ...], *, eight_bits: bool = False, int8: bool = False) -> tuple[Any, fx.GraphModule]:
    """The record of the pass and the graph, compared with the graph before it."""

    def step(g: Tensor, x: Tensor, w: Tensor, m: Tensor, *absmax: Tensor) -> Tensor:
        gradient = (g.unsqueeze(-1) @ x.unsqueeze(0)).reshape(size) if len(size) == 2 else g * x
        old = formats.dequantize_dynamic8(m, absmax[0], True) if eight_bits else m
        momentum = 0.9 * old + 0.1 * gradient
        aten.copy_.default(w, w * 0.999 - 0.1 * torch.sign(momentum) - 0.01 * momentum)
        if eight_bits:
            stored = formats.quantize_dynamic8(momentum, signed=True)
            aten.copy_.default(m, stored.codes)
            aten.copy_.default(absmax[0], stored.absmax)
        else:
            aten.copy_.default(m, momentum)
        return gradient.sum()

    momentum: list[Tensor] = [torch.randn(size)]
    if eight_bits:
        momentum = list(formats.quantize_dynamic8(momentum[0], signed=True)[:2])
    factors = [torch.randn(size[0]), torch.randn(size[1])] if len(size) == 2 else [torch.randn(size), torch.ones(size)]
    inputs = [*factors, torch.randn(size), *momentum]
    module = traced(step, *inputs, names=["g", "x", "w", "m", "absmax"])
    expected = results(module, inputs)
    record = after(module, "update", "fuse").records[-1]
    found = results(module, inputs)
    named = [dict(zip(map(str, range(len(each))), each, strict=True)) for each in (found, expected)]
    assert_within_contract(*named)
    return record, module


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("size", [(256, 256), (300, 219)])
def test_a_large_update_at_full_rank_becomes_one_call(size: tuple[int, int], eight_bits: bool) -> None:
    record, module = full_rank(size, eight_bits=eight_bits)
    assert record.matches == ["w"]
    (call,) = calls(module.graph)
    assert call.op is run_program
    assert len(call.written) == (3 if eight_bits else 2)


@pytest.mark.parametrize("size", [(255, 257), (20, 12)])
def test_a_small_update_at_full_rank_stays(size: tuple[int, int]) -> None:
    record, module = full_rank(size)
    assert (record.matches, calls(module.graph)) == ([], [])


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_a_fused_graph_computes_the_same_compiled() -> None:
    """Three compiles."""
    built, _ = fused(Layer(weight="int8", projector="int4", shape=(20, 13)))
    assert not any(is_gemm(node) and shape(node) == (20, 13) for node in built.graph.nodes)
