"""What is live, byte by byte, computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import after, traced
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from qgalore_compile import formats
from qgalore_compile.passes.liveness import Live, liveness, readers
from qgalore_compile.passes.nodes import Mutation, make

aten = torch.ops.aten

N = 8
MATRIX = N * N * 4


def curve(function: Any, *inputs: Tensor, **options: Any) -> list[int]:
    """Live bytes at each call, in order."""
    return [size for _, size in liveness(traced(function, *inputs, **options).graph).curve]


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(N, N, dtype=dtype)


def test_inputs_are_resident_and_results_die_behind_their_last_reader() -> None:
    def step(x: Tensor) -> Tensor:
        first = x @ x
        second = first @ x
        return second @ x

    assert curve(step, matrix()) == [MATRIX, 2 * MATRIX, 2 * MATRIX]


def test_what_is_returned_lives_to_the_end() -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        first = x @ x
        second = x @ first
        return first, (second @ x) @ x

    assert curve(step, matrix()) == [MATRIX, 2 * MATRIX, 3 * MATRIX, 3 * MATRIX]


def test_a_view_is_its_base() -> None:
    def step(x: Tensor) -> Tensor:
        first = x @ x
        turned = first.t().reshape(N // 2, 2 * N)
        return turned @ turned.t()

    quarter = (N // 2) ** 2 * 4
    sizes = curve(step, matrix())
    assert sizes[:2] == [MATRIX, MATRIX]  # the product, and its transpose
    assert sizes[-1] == sizes[-2] + quarter


def test_a_base_lives_as_long_as_its_views() -> None:
    def step(x: Tensor) -> Tensor:
        turned = (x @ x).t()
        other = x @ x
        return other @ turned

    assert curve(step, matrix()) == [MATRIX, MATRIX, 2 * MATRIX, 3 * MATRIX]


def test_pointwise_operations_with_one_reader_are_fused_and_keep_what_they_read() -> None:
    def step(x: Tensor) -> Tensor:
        return ((x @ x) * 2 + 1).tanh() @ x

    assert curve(step, matrix()) == [MATRIX, MATRIX, MATRIX, 2 * MATRIX, 2 * MATRIX]


def test_a_pointwise_operation_with_two_readers_is_stored() -> None:
    def step(x: Tensor) -> Tensor:
        doubled = (x @ x) * 2
        return doubled.tanh() + doubled.sin()

    assert curve(step, matrix()) == [MATRIX, 2 * MATRIX, MATRIX, MATRIX, 2 * MATRIX]


def test_a_pointwise_operation_into_a_product_is_stored() -> None:
    assert curve(lambda x: (x * 2) @ x, matrix()) == [MATRIX, 2 * MATRIX]


def test_a_reduction_fuses_what_it_reads() -> None:
    assert curve(lambda x: (x * x).sum(), matrix()) == [0, 4]


def test_a_write_back_stores_nothing() -> None:
    def step(x: Tensor) -> None:
        aten.copy_.default(x, x * 2 + 1)

    assert curve(step, matrix()) == [0, 0, 0]


def test_a_value_that_is_written_back_dies_there() -> None:
    def step(x: Tensor) -> Tensor:
        aten.copy_.default(x, x @ x)
        return torch.ones(N, N) @ torch.ones(N, N)

    *_, ones, other, product = curve(step, matrix())
    assert (ones, other, product) == (MATRIX, 2 * MATRIX, 3 * MATRIX)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2), (torch.uint8, 1), (torch.bool, 1)]
)
def test_bytes_follow_the_dtype(dtype: torch.dtype, size: int) -> None:
    assert curve(lambda x: x.flip(0), matrix(dtype))[-1] == N * N * size


def test_a_symbolic_size_counts_as_the_one_that_tracing_saw() -> None:
    assert curve(lambda x, w: x @ w, torch.zeros(6, N), matrix(), symbolic=[0]) == [6 * N * 4]


def test_several_results_of_one_op_are_stored_each() -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax, _ = formats.quantize_dynamic8(x @ x, signed=True)
        return codes, absmax

    assert curve(step, matrix()) == [MATRIX, MATRIX + N * N + 4, N * N, N * N + 4]


def test_the_result_of_an_op_that_changes_its_argument_in_place_is_the_argument() -> None:
    graph = fx.Graph()
    with FakeTensorMode() as mode:
        low, schedule = mode.from_tensor(matrix()), mode.from_tensor(torch.zeros(6, dtype=torch.float64))
    x, due = graph.placeholder("x"), graph.placeholder("due")
    x.meta["val"], due.meta["val"] = low, schedule
    product = make(graph, aten.mm.default, x, x)
    changed = {"low": product, "schedule": due}
    _, (new, unread) = Mutation.call(graph, torch.ops.qgalore.refresh_.default, changed, factors=[x])
    graph.erase_node(unread)
    graph.output(make(graph, aten.mm.default, new, x))
    assert [size for _, size in liveness(graph).curve] == [MATRIX, MATRIX, MATRIX, 2 * MATRIX]


def test_a_call_of_a_function_holds_what_is_largest_inside_and_then_its_results() -> None:
    group = 8

    def step(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return x @ formats.dequantize_int8(codes, scale, offset, group).t()

    stored = formats.quantize_int8(torch.randn(4 * N, N), group)[:3]
    module = traced(step, torch.zeros(2, N), *stored)
    after(module, "update", "opaque")
    result, weight = 2 * 4 * N * 4, 4 * N * N * 4
    live = liveness(module.graph)
    assert [size for _, size in live.curve] == [weight + result, result]
    assert live.peak == weight + result
    assert live.holds == ()  # nothing of this graph is live then


def test_the_peak_tells_where_it_is_and_what_it_holds_largest_first() -> None:
    def step(x: Tensor, v: Tensor) -> Tensor:
        small = x @ v
        large = v @ v.t()
        return large @ small.tanh()

    live = liveness(traced(step, matrix(), torch.zeros(N, 2)).graph)
    assert live.peak == MATRIX + 3 * 2 * N * 4 - 2 * N * 4
    assert live.at == {size: name for name, size in reversed(live.curve)}[live.peak]
    assert live.holds[0] == Live(live.holds[0].node, (N, N), "torch.float32", MATRIX)
    assert [item.bytes for item in live.holds] == sorted((item.bytes for item in live.holds), reverse=True)
    assert sum(item.bytes for item in live.holds) == live.peak


def test_readers_of_a_node_are_its_users_and_those_of_its_views() -> None:
    def step(x: Tensor) -> Tensor:
        return x.t().unsqueeze(0).sum() + (x @ x).sum()

    module = traced(step, matrix())
    (x,) = module.graph.find_nodes(op="placeholder")
    assert {node.target for node in readers(x)} == {
        aten.permute.default, aten.unsqueeze.default, aten.sum.default, aten.mm.default,
    }  # fmt: skip
