"""Regions of FX graphs become programs that compute the same, or there is a sentence that names the node in the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import results, traced
from torch import Tensor, fx

from qgalore_compile import formats, rng
from qgalore_compile.formats.grouping import to_groups
from qgalore_compile.kernels.ir.evaluate import evaluate
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.read.from_graph import from_graph
from qgalore_compile.kernels.read.region import Output, Refusal, RefusedError, Region, candidates
from qgalore_compile.passes.nodes import anchors, shape, value, written

aten = torch.ops.aten
GROUP = 8


def region_of(module: fx.GraphModule, spaces: list[Space] | None = None) -> Region:
    """All of a graph as a region: what it stores goes to the inputs' storage, what it returns to tensors of its own."""
    graph = module.graph
    stored = anchors(graph)
    nodes = [node for node in graph.nodes if node.op == "call_function" and node not in stored]
    outputs = [Output(node, target) for target, node in map(written, stored)]
    (end,) = graph.find_nodes(op="output")
    outputs += [Output(node) for node in end.all_input_nodes if node not in stored]
    domain = max((shape(output.node) for output in outputs), key=lambda sizes: torch.Size(sizes).numel())
    return from_graph(nodes, outputs, candidates(nodes, domain) if spaces is None else spaces)


def check(function: Callable[..., Any], *inputs: Tensor, exact: bool = False, within: float = 1e-6) -> Region:
    """Trace, read, evaluate, and compare with the graph itself, ``within`` this of the largest element; the region."""
    module = traced(function, *inputs)
    region = region_of(module)
    assert BlockProgram.parse(str(region.program)) == region.program
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    given = dict(zip(placeholders, (each.clone() for each in inputs), strict=True))
    own = {name: output.node for output, name in region.outputs.items() if name not in region.buffers}
    tensors = {name: given[node] for name, node in region.buffers.items()}
    tensors |= {name: torch.empty(shape(node), dtype=value(node).dtype) for name, node in own.items()}
    evaluate(region.program, tensors, region.numbers)
    found = [*(tensors[name] for name in own), *given.values()]
    expected = results(module, inputs)
    stored = len(anchors(module.graph))
    expected = [*expected[: len(own)], *expected[len(own) + stored :]] if len(expected) > len(found) else expected
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        if exact or not other.is_floating_point():
            assert torch.equal(one, other)
        else:
            assert (one - other).abs().max() <= within * other.abs().max() + 1e-30
    return region


# -- regions ----------------------------------------------------------------------------------------------------------


def int8_update(
    codes: Tensor, scale: Tensor, offset: Tensor, u: Tensor, lr: Tensor, step: Tensor, param: int = 3
) -> None:
    weight = formats.dequantize_int8(codes, scale, offset, GROUP) - lr * u
    noise = rng.random_bits(weight.shape, seed=-5, step=step, param=param)
    new = formats.quantize_int8(weight, GROUP, noise=noise)
    for target, stored in zip((codes, scale, offset), new[:3], strict=True):
        aten.copy_.default(target, stored)


def int8_inputs(m: int, n: int) -> list[Tensor]:
    stored = formats.quantize_int8(torch.randn(m, n), GROUP)
    return [*stored[:3], torch.randn(m, n), torch.tensor(0.1), torch.tensor(7.0)]


@pytest.mark.parametrize(("m", "n"), [(5, 24), (5, 21), (1, 16), (3, 8), (1, 21), (8, 8)])
def test_an_int8_weight_is_decoded_updated_and_encoded_with_stochastic_rounding(m: int, n: int) -> None:
    region = check(lambda *t: int8_update(*t), *int8_inputs(m, n), exact=True)
    assert [buffer.access for buffer in region.program.buffers].count("inout") == 3
    assert list(region.numbers.values()) == [-5, 3]


@pytest.mark.parametrize("step", [7, 2**24, 2**31, 2**33 + 5])
def test_a_step_counter_of_64_bits_is_exact_in_bias_corrections_and_random_bits(step: int) -> None:
    def update(*t: Tensor) -> None:
        codes, scale, offset, u, lr, count = t
        count = count + 1
        bias = -torch.expm1(count.to(torch.float64) * math.log(1 - 1e-9)).to(torch.float32)
        int8_update(codes, scale, offset, u * bias + (count - 2**24).to(torch.float32) * 1e-9, lr, count)

    check(update, *int8_inputs(5, 24)[:5], torch.tensor(step), exact=True)


def test_integers_of_64_bits_keep_all_of_them_until_they_are_told_otherwise() -> None:
    def step(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * n + 2**40, (x * 2**20).to(torch.int32), (x > 2**33).to(torch.float32) - x.to(torch.float32)

    check(step, torch.arange(-52, 53).view(5, 21) * 2**30, torch.tensor(3), exact=True)


@pytest.mark.parametrize("n", [24, 16, 21, 13, 7])
def test_int4_nibbles_are_decoded_also_of_odd_rows(n: int) -> None:
    def decode(packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return formats.dequantize_int4(packed, scale, offset, n, GROUP, dtype=torch.bfloat16)

    stored = formats.quantize_int4(torch.randn(4, n), GROUP)
    region = check(decode, *stored[:3], exact=True)
    assert sorted(buffer.memory for buffer in region.program.buffers) == ["bf16", "f32", "f32", "u4"]


def adam8(m: Tensor, m_absmax: Tensor, v: Tensor, v_absmax: Tensor, g: Tensor, step: Tensor) -> Tensor:
    first = 0.9 * formats.dequantize_dynamic8(m, m_absmax, True) + 0.1 * g
    second = 0.99 * formats.dequantize_dynamic8(v, v_absmax, False) + 0.01 * g * g
    for moment, absmax, new, signed in ((m, m_absmax, first, True), (v, v_absmax, second, False)):
        codes = formats.quantize_dynamic8(new, signed=signed)
        aten.copy_.default(moment, codes.codes)
        aten.copy_.default(absmax, codes.absmax)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)


@pytest.mark.parametrize("size", [(4, 256), (3, 171), (2, 512), (30, 10, 2), (1000,), (5, 21), (1,)])
def test_adam_with_dynamic_8_bit_moments_runs_over_blocks_of_the_flat_tensor(size: tuple[int, ...]) -> None:
    m = formats.quantize_dynamic8(torch.randn(size), signed=True)
    v = formats.quantize_dynamic8(torch.rand(size), signed=False)
    inputs = [m.codes, m.absmax, v.codes, v.absmax, torch.randn(size), torch.tensor(3.0)]
    region = check(adam8, *inputs)
    count = torch.Size(size).numel()
    assert region.program.space[:2] == (1, count)
    assert region.program.space.width >= min(count, formats.BLOCK_SIZE)


@pytest.mark.parametrize("size", [(5, 21), (7,), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion_and_sgd_with_momentum_are_pointwise(size: tuple[int, ...], dtype: torch.dtype) -> None:
    def lion(m: Tensor, g: Tensor, w: Tensor) -> None:
        aten.copy_.default(w, w * (1 - 0.1 * 0.01) - 0.1 * torch.sign(0.9 * m + 0.1 * g))
        aten.copy_.default(m, torch.lerp(m, g, 0.01))

    def sgd(m: Tensor, g: Tensor, w: Tensor) -> None:
        momentum = 0.9 * m + g
        # eager PyTorch on a CPU rounds `alpha` to bfloat16, the compiled step does not
        nesterov = g.add(momentum, alpha=0.9 if dtype == torch.float32 else 1)
        aten.copy_.default(w, w - 0.1 * nesterov)
        aten.copy_.default(m, momentum)

    inputs = [torch.randn(size).to(dtype) for _ in range(3)]
    short = dtype == torch.bfloat16
    for rule in (lion, sgd):
        # eager's lerp rounds once or, with ATen's default instructions, twice: to a neighbour in bfloat16
        region = check(rule, *inputs, exact=short and rule is sgd, within=2**-8 if short else 1e-6)
        assert {buffer.memory for buffer in region.program.buffers} <= {"f32", "bf16"}


def test_bf16_states_round_where_eager_pytorch_rounds() -> None:
    def step(m: Tensor, v: Tensor, g: Tensor, w: Tensor) -> None:
        first, second = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g.square()
        aten.copy_.default(m, first)
        aten.copy_.default(v, second)
        aten.copy_.default(w, w - 0.1 * first / (second.sqrt() + 1e-8))

    m, v, g, w = (torch.randn(5, 21).bfloat16() for _ in range(4))
    check(step, m, v.abs(), g, w, exact=True)
    check(step, m, v.abs(), g.float(), w.float())  # mixed: float32 results of bf16 states


def test_a_bf16_reduction_is_taken_in_float32_and_rounded_once() -> None:
    def step(x: Tensor) -> None:
        blocks = x.view(5, 3, 8)
        aten.copy_.default(x, ((blocks - blocks.amax(-1, keepdim=True)) * blocks.sum(-1, keepdim=True)).view(5, 24))

    check(step, torch.randn(5, 24).bfloat16(), exact=True)


def test_rows_columns_and_scalars_broadcast_also_where_the_matrix_is_square() -> None:
    def step(w: Tensor, by_row: Tensor, by_column: Tensor, one: Tensor) -> Tensor:
        return w * by_row.unsqueeze(1) + by_column * one.reshape(1, 1)

    for m, n in ((5, 21), (8, 8), (1, 6), (6, 1)):
        check(step, torch.randn(m, n), torch.randn(m), torch.randn(n), torch.randn(1))


def test_conditions_clamps_and_integers_are_read() -> None:
    def step(x: Tensor, codes: Tensor, ok: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.where(ok, x.clamp(-1, 1), x.clamp(min=0.5))
        some = torch.logical_and(x > 0.25, torch.logical_not(codes >= 100))
        return torch.where(some, kept, 0.0), (codes & 15).to(torch.float32).div(3), (x * 300).to(torch.int32)

    check(step, torch.randn(5, 21), torch.randint(0, 256, (5, 21), dtype=torch.uint8), torch.tensor(True))


def test_group_statistics_are_one_value_a_group() -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.view(4, 3, 8)
        scale = groups.square().mean(-1, keepdim=True).sqrt() + groups.sum(-1, keepdim=True)
        return (groups / (scale + 1)).view(4, 24), scale.squeeze(-1)

    region = check(step, torch.rand(4, 24) + 0.1)
    assert region.program.space == Space(4, 24, 8)


def test_equal_layers_have_equal_texts_whatever_the_order_of_their_nodes() -> None:
    def first(m: Tensor, v: Tensor, g: Tensor) -> Tensor:
        new_m = 0.9 * m + 0.1 * g
        new_v = 0.99 * v + 0.01 * g * g
        aten.copy_.default(m, new_m)
        aten.copy_.default(v, new_v)
        return new_m / (new_v.sqrt() + 1e-8)

    def second(g: Tensor, v: Tensor, m: Tensor) -> Tensor:
        square = 0.01 * g * g
        new_v = 0.99 * v + square
        root = new_v.sqrt() + 1e-8
        smaller = 0.1 * g
        new_m = 0.9 * m + smaller
        aten.copy_.default(m, new_m)
        aten.copy_.default(v, new_v)
        return new_m / root

    tensors = [torch.randn(5, 21) for _ in range(3)]
    assert str(region_of(traced(first, *tensors)).program) == str(region_of(traced(second, *tensors)).program)


def test_the_number_of_a_parameter_is_no_part_of_the_text() -> None:
    texts = set()
    for param in (3, 4):
        module = traced(lambda *t, param=param: int8_update(*t, param=param), *int8_inputs(5, 21))
        region = region_of(module)
        assert region.numbers["param0"] == param
        texts.add(str(region.program))
    assert len(texts) == 1


# -- spaces -----------------------------------------------------------------------------------------------------------


def test_spaces_that_shapes_suggest_come_before_plain_ones() -> None:
    module = traced(lambda *t: int8_update(*t), *int8_inputs(5, 21))
    nodes = list(module.graph.nodes)
    assert candidates(nodes, (5, 21))[0] == Space(5, 21, GROUP)
    assert candidates(nodes, (5, 21))[-2:] == [Space(5, 21, 21), Space(1, 105, 105)]
    assert candidates([], (0, 3)) == []
    assert candidates([], ()) == [Space(1, 1, 1)]


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(function: Callable[..., Any], *inputs: Tensor, spaces: list[Space] | None = None) -> RefusedError:
    with pytest.raises(RefusedError) as raised:
        region_of(traced(function, *inputs), spaces)
    text = str(raised.value)
    assert text.startswith(raised.value.refusal.value)
    assert f"at {raised.value.node.name}: {raised.value.node.target}" in text
    return raised.value


X = torch.ones(5, 21)
MATRIX = [Space(5, 21, 8)]
REFUSED: dict[str, tuple[Refusal, object, Callable[..., Any], tuple[Tensor, ...]]] = {
    "an unknown operation": (Refusal.OPERATION, aten.cumsum.default, lambda x: (x * 2).cumsum(-1) + 1, (X,)),
    "a transpose": (Refusal.OPERATION, aten.permute.default, lambda x: x.t() * 2, (X,)),
    "a part of a row": (Refusal.OPERATION, aten.slice.Tensor, lambda x: (x * 2, (x * 2)[:, 3:]), (X,)),
    "a rounding mode": (
        Refusal.OPERATION, aten.div.Tensor_mode, lambda x: torch.div(x, 3.0, rounding_mode="floor") + 1, (X,)
    ),
    "float64": (Refusal.DTYPE, "placeholder", lambda x: (x * 2).float(), (X.double(),)),
    "float64 in between": (
        Refusal.DTYPE, torch.ops.prims.convert_element_type.default, lambda x: (x.double() * 2).float(), (X,)
    ),
    "narrow integers that wrap around": (Refusal.DTYPE, aten.add.Tensor, lambda x: x + x, (X.to(torch.uint8),)),
    "narrow integers' squares": (Refusal.DTYPE, aten.pow.Tensor_Scalar, lambda x: x.square() / 2, (X.to(torch.uint8),)),
    "narrow integers without a sign of their own": (Refusal.DTYPE, aten.abs.default, lambda x: x.abs() / 2, (
        X.to(torch.int8),)),
    "a wide number cut to narrow ones": (
        Refusal.DTYPE, aten.minimum.default, lambda x, n: torch.minimum(x, n) / 2,
        (X.to(torch.uint8), torch.tensor(1000)),
    ),
    "a shift by more than the width": (Refusal.DTYPE, aten.__rshift__.Scalar, lambda x: (x >> 40) / 2, (
        X.to(torch.int32),)),
    "integers that become narrow but signed": (
        Refusal.DTYPE, torch.ops.prims.convert_element_type.default, lambda x: x.to(torch.int8) & 7,
        (X.to(torch.int32),),
    ),
    "a reduction in another type": (
        Refusal.DTYPE, aten.amax.default,
        lambda x: (x.view(5, 3, 8) - x.view(5, 3, 8).amax(-1, keepdim=True)).view(5, 24),
        (torch.ones(5, 24).to(torch.int32),),
    ),
    "another matrix": (Refusal.SHAPE, "placeholder", lambda x, y: x * y[:5, :21], (X, torch.ones(7, 40))),
    "rows cut apart": (Refusal.SHAPE, aten.view.default, lambda x, c: (x * c, x.view(7, 15) * 2), (X, torch.ones(21))),
    "blocks that are not rows' groups": (
        Refusal.SHAPE, torch.ops.qgalore.quantize_dynamic8.default,
        lambda x, r: torch.ops.qgalore.quantize_dynamic8(x * r, True)[0], (torch.ones(5, 300), torch.ones(5, 1)),
    ),
    "a row's value that is stored": (
        Refusal.SHAPE, aten.mul.Tensor,
        lambda x, r: ((x.view(5, 3, 8) - x.view(5, 3, 8).amax(-1, keepdim=True)).view(5, 24) * r, r * 2),
        (torch.ones(5, 24), torch.ones(5, 1)),
    ),
    "groups beside columns": (
        Refusal.BROADCAST, aten.mul.Tensor,
        lambda x: (x.view(6, 4, 4) * x.view(6, 4, 4).amax(-1).unsqueeze(1)).view(6, 16),
        (torch.ones(6, 16),),
    ),
    "a row's sum": (
        Refusal.REDUCTION, aten.sum.dim_IntList, lambda x: x - x.view(5, 3, 7).sum((1, 2)).unsqueeze(1), (X,)
    ),
    "a column's largest": (Refusal.REDUCTION, aten.amax.default, lambda x: x - x.amax(0), (X,)),
    "a sum over a group that is filled up": (
        Refusal.PADDING, aten.sum.dim_IntList, lambda x: x * to_groups(x, 8).sum(-1).amin(), (X,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_at_its_node(case: str) -> None:
    refusal, target, function, inputs = REFUSED[case]
    found = refused(function, *inputs)
    assert (found.refusal, found.node.op if target == "placeholder" else found.node.target) == (refusal, target)


def test_a_view_of_a_larger_input_is_refused() -> None:
    found = refused(lambda x: x * 2, torch.ones(5, 42)[:, ::2])
    assert (found.refusal, found.node.op) == (Refusal.STRIDES, "placeholder")


def test_a_symbolic_size_is_refused() -> None:
    module = traced(lambda x: x * 2, X, symbolic=[0])
    node = next(node for node in module.graph.nodes if node.target is aten.mul.Tensor)
    with pytest.raises(RefusedError) as raised:
        from_graph([node], [Output(node)], MATRIX)
    assert raised.value.refusal in (Refusal.SIZE, Refusal.SHAPE)
    assert candidates([node], shape(node)) == []


def test_every_refusal_is_provoked_by_some_test() -> None:
    seen = {refusal for refusal, *_ in REFUSED.values()} | {Refusal.STRIDES, Refusal.SIZE}
    seen |= {Refusal.DRAWS, Refusal.TILE}  # of products and GPUs: tests/passes/test_fuse_products.py, test_tiles.py
    seen |= {Refusal.READ, Refusal.LATE}  # of losses: tests/passes/test_losses.py
    assert seen == set(Refusal)


def test_the_reason_is_that_of_the_space_where_reading_went_furthest() -> None:
    inputs = int8_inputs(5, 21)

    def step(*t: Tensor) -> Tensor:
        int8_update(*t)
        return (formats.dequantize_int8(*t[:3], GROUP) * 2).cumsum(-1)

    found = refused(step, *inputs)
    assert (found.refusal, found.node.target) == (Refusal.OPERATION, aten.cumsum.default)
