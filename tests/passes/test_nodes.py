"""Facts about single nodes, and how a pass makes a new one."""

from __future__ import annotations

import pytest
import torch
from graphs import traced
from passes_support import Layer, galore
from torch import Tensor, fx

from qgalore_compile.passes import nodes

aten = torch.ops.aten


def test_anchors_are_the_copies_into_inputs_alone() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        aten.copy_.default(x, y + 1)
        return aten.copy.default(x, y)

    graph = traced(function, torch.ones(2), torch.ones(2)).graph
    (anchor,) = nodes.anchors(graph)
    assert anchor.target is aten.copy_.default
    assert nodes.is_anchor(anchor)


@pytest.mark.parametrize("form", ["float", "int4"])
def test_results_of_a_mutating_op_know_what_they_were(form: str) -> None:
    built = galore(Layer(refresh="svd", projector=form))
    (call,) = built.operator(nodes.FUNCTIONALIZED)
    bases = nodes.Mutation(call).written
    before = [nodes.previous_version(result) for result in sorted(call.users, key=lambda user: user.args[1])]
    assert before == bases
    assert nodes.previous_version(call) is None


def test_operands_of_an_addmm_are_its_matrices() -> None:
    module = traced(lambda c, a, b: torch.addmm(c, a, b), torch.ones(2, 4), torch.ones(2, 3), torch.ones(3, 4))
    (gemm,) = (node for node in module.graph.nodes if nodes.is_gemm(node))
    assert [operand.name for operand in nodes.operands(gemm)] == ["a_1", "b_1"]


def test_same_sizes_are_told_in_any_order_and_for_symbols() -> None:
    inputs = torch.ones(5, 3), torch.ones(3, 5), torch.ones(5, 4)
    module = traced(lambda a, b, c: (a + 1, b.t() + a, c + 1), *inputs)
    a, b, c = module.graph.find_nodes(op="placeholder")
    assert nodes.same_sizes(a, nodes.shape(b))
    assert not nodes.same_sizes(a, nodes.shape(c))
    module = traced(lambda a: a.t() + 1, torch.ones(5, 3), symbolic=[0])
    (a,), (output,) = module.graph.find_nodes(op="placeholder"), module.graph.find_nodes(op="output")
    assert nodes.same_sizes(a, nodes.shape(output.args[0]))


def test_a_new_node_has_the_fake_value_that_tracing_would_have_left() -> None:
    module = traced(lambda x: x + 1, torch.ones(4, 3), symbolic=[0])
    graph = module.graph
    (x,) = graph.find_nodes(op="placeholder")
    with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
        made = nodes.make(graph, aten.permute.default, x, [1, 0])
        allocation = nodes.make(graph, aten.full.default, [], 1.0, dtype=torch.float32)
    assert str(nodes.shape(made)) == str(tuple(reversed(nodes.shape(x))))
    assert nodes.is_scalar(allocation)
    assert nodes.value(allocation).fake_mode is nodes.value(x).fake_mode


def test_a_transpose_of_a_transpose_and_a_cast_to_the_same_dtype_are_no_new_nodes() -> None:
    module = traced(lambda x: x.t(), torch.ones(4, 3))
    (x,), (turned,) = (module.graph.find_nodes(op="placeholder"),
                       module.graph.find_nodes(op="call_function", target=aten.permute.default))  # fmt: skip
    before = len(module.graph.nodes)
    assert nodes.transpose(module.graph, turned) is x
    assert nodes.cast(module.graph, x, torch.float32) is x
    assert len(module.graph.nodes) == before


def test_dead_nodes_go_with_what_only_they_read() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    kept = graph.call_function(aten.neg.default, (x,))
    dead = graph.call_function(aten.abs.default, (graph.call_function(aten.relu.default, (kept,)),))
    written = graph.call_function(aten.copy_.default, (x, kept))
    graph.output(kept)
    nodes.erase_dead(graph, dead)
    nodes.erase_dead(graph, written)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [
        aten.neg.default, aten.copy_.default
    ]  # fmt: skip
