"""A product has the rows that are read, and a gradient those that are not zero."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from graphs import after, results, targets, traced
from torch import Tensor, fx
from torch.nn.functional import linear

from qgalore_compile.passes.nodes import shape

aten = torch.ops.aten
B, S, V, D = 3, 5, 7, 4


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qgalore_compile.passes.row_slices"], "SMALL", 1)


def rewritten(read: Callable[[Tensor], Tensor], *, bias: bool = True, back: bool = True) -> tuple[int, fx.Graph]:
    """A linear layer of which some is read, and its gradients: how often the pass matched, and the graph, whose results
    are those of the graph before it."""

    def step(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        given = [each.detach().requires_grad_() for each in (x, w, b)]
        out = read(linear(given[0], given[1], given[2] if bias else None)).square().sum()
        return out.detach(), *(torch.autograd.grad(out, given if bias else given[:2]) if back else ())

    inputs = [torch.randn(B, S, D), torch.randn(V, D), torch.randn(V)]
    module = traced(step, *inputs)
    expected = results(module, inputs)
    manager = after(module, "row_slices")
    for one, other in zip(results(module, inputs), expected, strict=True):
        torch.testing.assert_close(one, other)
    return len(manager.records[-1].matches), module.graph


def rows(graph: fx.Graph) -> list[int]:
    """The length of the tokens' side in each product."""
    gemms = [node for node in graph.nodes if node.target in (aten.mm.default, aten.addmm.default)]
    return [shape(node.args[-2])[1] if shape(node)[0] == V else shape(node)[0] for node in gemms]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("read", "count"),
    [(lambda z: z[:, :-1].flatten(0, 1), B * (S - 1)), (lambda z: z[..., 1:, :].contiguous(), B * (S - 1)),
     (lambda z: z[1:], (B - 1) * S), (lambda z: z[:, 1:3], B * 2)],
    ids=["all but the last", "all but the first", "of the batch", "the middle"],
)  # fmt: skip
def test_forward_and_backward_multiply_the_rows_that_are_read(
    read: Callable[[Tensor], Tensor], count: int, bias: bool
) -> None:
    matches, graph = rewritten(read, bias=bias)
    assert matches == 2
    assert rows(graph) == [count] * 3
    assert all(shape(node)[-1] != V for node in graph.find_nodes(op="call_function", target=aten.slice_scatter.default))


def test_a_forward_alone_is_rewritten() -> None:
    assert rewritten(lambda z: z[:, :-1], back=False)[0] == 1


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda z: z, id="all rows"),
        pytest.param(lambda z: z[:, ::2], id="every second"),
        pytest.param(lambda z: z[..., 1:], id="columns"),
        pytest.param(lambda z: torch.cat([z[:, 1:], z[:, :-1]]), id="two slices"),
        pytest.param(lambda z: z[:, 1:] * z.sum(), id="another reader"),
    ],
)
def test_what_reads_more_or_otherwise_stays(read: Callable[[Tensor], Tensor]) -> None:
    matches, graph = rewritten(read)
    assert matches == 0
    assert rows(graph) == [B * S] * 3


def test_small_products_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qgalore_compile.passes.row_slices"], "SMALL", 1 << 20)
    matches, graph = rewritten(lambda z: z[:, :-1])
    assert matches == 0
    assert aten.slice_scatter.default in targets(graph)
