"""What waits for a node that replaces several comes to stand behind it, in order, and nothing else moves."""

from __future__ import annotations

import torch
from graphs import position, traced
from torch import Tensor, fx

from qgalore_compile.passes.nodes import ANCHOR
from qgalore_compile.passes.placement import base, move_behind

aten = torch.ops.aten


def order(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def named(graph: fx.Graph, target: object) -> fx.Node:
    return next(node for node in graph.nodes if node.target is target)


def test_a_base_is_what_views_are_taken_of() -> None:
    graph = traced(lambda x: x.t().unsqueeze(0)[:, 1:] * 2, torch.ones(3, 4)).graph
    (x,) = graph.find_nodes(op="placeholder")
    product = named(graph, aten.mul.Tensor)
    assert base(product.all_input_nodes[0]) is x
    assert base(product) is product


def test_readers_of_the_results_and_what_reads_them_move_behind() -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        early = x.exp()
        return early.sin().cos() + y.neg().tanh()

    graph = traced(step, torch.ones(3), torch.ones(3)).graph
    call, early, reader = (
        named(graph, aten.tanh.default),
        named(graph, aten.exp.default),
        named(graph, aten.sin.default),
    )
    reader.replace_input_with(early, call)  # as where a call has taken the place of what stood earlier
    move_behind(call, [call])
    graph.lint()
    assert position(graph, call) < position(graph, reader) < position(graph, named(graph, aten.cos.default))
    assert position(graph, early) < position(graph, call)


def test_an_anchor_that_overwrites_what_the_call_reads_moves_behind_also_through_a_view() -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        seen = x.t()
        aten.copy_.default(x, y * 2)
        return seen

    graph = traced(step, torch.ones(3, 4), torch.ones(3, 4)).graph
    anchor, view = named(graph, ANCHOR), named(graph, aten.permute.default)
    (end,) = graph.find_nodes(op="output")
    with graph.inserting_before(end):
        call = graph.call_function(aten.neg.default, (view,))
    move_behind(call, [call])
    assert position(graph, call) < position(graph, anchor)


def test_a_call_that_nobody_waits_for_moves_nothing() -> None:
    graph = traced(lambda x: (x.exp(), x.sin()), torch.ones(3)).graph
    before = order(graph)
    call = named(graph, aten.sin.default)
    move_behind(call, [call])
    assert order(graph) == before
