"""What of a section is handed over, and what is computed again where it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import traced
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qgalore_compile.passes.crossing import crossing, is_view

aten = torch.ops.aten

T, N = 8, 16


def crosses(function: Callable[..., Any], *inputs: Tensor, changed: tuple[int, ...] = ()) -> list[str]:
    """Names of what crosses, where ``function`` is the section, and an addition reads each of its results."""

    def read(*given: Tensor) -> list[Tensor]:
        return [result + 1 for result in tree_leaves(function(*given))]

    graph = traced(read, *inputs).graph
    (output,) = graph.find_nodes(op="output")
    readers = set(output.all_input_nodes)
    section = {node for node in graph.nodes if node.op == "call_function" and node not in readers}
    results = dict.fromkeys(node for reader in readers for node in reader.all_input_nodes)
    given = {node for index, node in enumerate(graph.find_nodes(op="placeholder")) if index not in changed}
    return sorted(node.name for node in crossing(section, results, given))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(T, N).to(dtype), torch.randn(N, N).to(dtype)


def test_a_product_crosses() -> None:
    assert crosses(lambda x, w: x @ w, *inputs()) == ["mm"]


def test_a_cast_is_made_again_from_the_half_as_large_tensor_behind_it() -> None:
    assert crosses(lambda x, w: (x @ w).float(), *inputs(torch.bfloat16)) == ["mm"]


def test_what_a_product_reads_is_in_memory_and_crosses() -> None:
    def layer(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x @ w)
        return gate, gate @ w

    assert crosses(layer, *inputs()) == ["mm_1", "sigmoid"]


def test_what_no_call_reads_is_computed_again() -> None:
    def layer(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return torch.sigmoid(y), y

    assert crosses(layer, *inputs()) == ["mm"]


def test_one_sum_crosses_rather_than_both_terms() -> None:
    assert crosses(lambda x, w: x @ w + (x * 2) @ w, *inputs()) == ["add"]


def test_a_mean_crosses_rather_than_all_that_it_is_of() -> None:
    assert crosses(lambda x, w: (x @ w).mean(-1, keepdim=True).expand(T, N) * 2, *inputs()) == ["mean"]


def test_a_view_never_crosses() -> None:
    assert crosses(lambda x, w: (x @ w).t().reshape(N * T), *inputs()) == ["clone"]
    assert crosses(lambda x, w: (x @ w).view(T * N), *inputs()) == ["mm"]
    assert crosses(lambda x, w: tuple((x @ w).split(4, -1)), *inputs()) == ["mm"]


def test_what_follows_from_inputs_alone_does_not_cross() -> None:
    assert crosses(lambda x, w: (x * 2 + 1, w.t()), *inputs()) == []


def test_it_does_where_an_input_will_have_changed() -> None:
    assert crosses(lambda x, w: x * 2 + 1, *inputs(), changed=(0,)) == ["add"]


@pytest.mark.parametrize(("shape", "view"), [((T * N,), True), ((N, T), False)])
def test_a_reshape_is_a_view_where_it_copies_nothing(shape: tuple[int, ...], view: bool) -> None:
    module = traced(lambda x: x * 2, torch.randn(T, N) if view else torch.randn(N, T).t())
    (source,) = module.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    node = module.graph.call_function(aten.reshape.default, (source, list(shape)))
    node.meta["val"] = source.meta["val"].reshape(shape)
    assert is_view(node) == view
