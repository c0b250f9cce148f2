"""aten.empty([m, n]) without a reader  ->  nothing."""

from __future__ import annotations

import torch
from torch import fx

from qgalore_compile.passes import PassManager
from qgalore_compile.passes.dead_allocations import dead_allocations
from qgalore_compile.passes.manager import Pass, PassRecord

aten = torch.ops.aten


def run(graph: fx.Graph) -> PassRecord:
    fx.GraphModule(torch.nn.Module(), graph)
    manager = PassManager([Pass("dead_allocations", "exact", dead_allocations)], lint=True)
    manager(graph)
    return manager.records[0]


def targets(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_an_allocation_without_a_reader_is_erased() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.empty.memory_format, ([4, 5],))
    graph.call_function(aten.full.default, ([], 1.0))
    graph.output(graph.call_function(aten.relu.default, (x,)))
    record = run(graph)
    assert len(record.matches) == 2
    assert record.ops == {"aten.empty.memory_format": -1, "aten.full.default": -1}
    assert targets(graph) == [aten.relu.default]


def test_a_chain_of_dead_allocations_goes_as_a_whole() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    empty = graph.call_function(aten.empty.memory_format, ([4, 5],))
    graph.call_function(aten.zeros_like.default, (empty,))
    graph.output(x)
    assert len(run(graph).matches) == 2
    assert targets(graph) == []


def test_an_allocation_that_is_read_stays() -> None:
    graph = fx.Graph()
    full = graph.call_function(aten.full.default, ([3], 1.0))
    graph.output(graph.call_function(aten.neg.default, (full,)))
    assert run(graph).matches == []
    assert targets(graph) == [aten.full.default, aten.neg.default]


def test_dead_nodes_that_allocate_nothing_or_have_an_effect_stay() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.copy_.default, (x, x))
    graph.call_function(aten.neg.default, (x,))  # Inductor's dead code elimination, not this pass's
    graph.output(x)
    assert run(graph).matches == []
    assert targets(graph) == [aten.copy_.default, aten.neg.default]
