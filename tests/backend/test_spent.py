"""Outputs whose backward is an error in eager mode do not keep a step from being compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qgalore_compile.backend import spent


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, fx.GraphModule]:
    """What a function returns as Dynamo's graph, outputs that are spent detached; and that graph."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        spent.detach(gm)
        gm.graph.lint()
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    return result, graphs[0]


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def halve(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(0.5)


def test_what_was_computed_from_weights_that_were_written_since_is_detached(net: nn.Sequential) -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        out = net(x)
        halve(net[1].weight)
        return out, out.sum()

    x = torch.randn(5, 3)
    expected = net(x).detach()
    (out, loss), _ = compiled(step, x)
    assert torch.equal(out, expected)
    assert torch.equal(loss, expected.sum())
    assert not out.requires_grad
    assert not loss.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(x)[1].backward()


def test_what_can_still_be_differentiated_stays_as_it_is(net: nn.Sequential) -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = net[0](x)  # whose backward reads no weight
        loss = net[1](hidden).sum()
        halve(net[0].weight)
        halve(net[1].weight)
        return hidden.square().sum(), loss, net[0].weight

    (square, loss, weight), _ = compiled(step, torch.randn(5, 3))
    assert square.requires_grad
    assert not loss.requires_grad
    assert weight is net[0].weight
    square.backward()
    assert net[0].weight.grad is not None


def test_a_graph_that_writes_no_leaf_is_left_alone(net: nn.Sequential) -> None:
    loss, graph = compiled(lambda x: net(x).sum(), torch.randn(5, 3))
    assert loss.requires_grad
    assert not graph.graph.find_nodes(op="call_method", target="detach")
    loss.backward()
