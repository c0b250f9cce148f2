"""What passes share: how a node takes another's place, and what is told of a layer."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from graphs import traced
from passes_support import Built, Layer, galore
from torch import fx

from qgalore_compile import formats
from qgalore_compile.backend.records import layer_record, note_of
from qgalore_compile.passes.context import Context, LayerNote
from qgalore_compile.passes.mutation import FUNCTIONALIZED, Mutation
from qgalore_compile.passes.nodes import aten, erase_dead, is_gemm, make, operands

# -- replace ----------------------------------------------------------------------------------------------------------


def context_of(built: Built) -> Context:
    context = Context()
    context.updates = built.updates()
    return context


def copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        return make(graph, node.target, *node.args, **node.kwargs)  # type: ignore[arg-type]


def test_readers_fields_of_layers_and_the_line_of_source_move_to_the_new_node() -> None:
    built = galore(Layer(), Layer("b"))
    context = context_of(built)
    layer, other = context.layers
    old, held = layer.down, (other.down, other.low, other.up, other.gradient)
    old.meta["stack_trace"] = "the user's line"
    expected = built.run()
    new = copied(built.graph, old)
    context.replace(built.graph, old, new)
    assert not old.users
    assert layer.down is layer.low is new
    assert new.meta["stack_trace"] == "the user's line"
    assert (other.down, other.low, other.up, other.gradient) == held
    erase_dead(built.graph, old)
    built.module.recompile()
    assert all(torch.equal(value, expected[name]) for name, value in built.run().items())


def test_a_field_may_hold_another_node_than_readers_read() -> None:
    built = galore(Layer())
    context = context_of(built)
    (layer,) = context.layers
    old = layer.up
    product = copied(built.graph, old)
    with built.graph.inserting_before(old):
        result = make(built.graph, aten.mul.Tensor, product, 1)
    readers = set(old.users)
    context.replace(built.graph, old, result, up=product)
    assert layer.up is product
    assert set(result.users) == readers


def test_readers_that_are_not_meant_stay() -> None:
    built = galore(Layer())
    (layer,) = (context := context_of(built)).layers
    old, new = layer.down, copied(built.graph, layer.down)
    stays = next(iter(old.users))
    context.replace(built.graph, old, new, where=lambda user: user is not stays)
    assert set(old.users) == {stays}


def test_a_mutating_op_that_reads_the_new_node_forgets_what_tracing_saw() -> None:
    built = galore(Layer(refresh="svd"))
    (node,) = built.operator(FUNCTIONALIZED)
    node.meta["eager_input_vals"] = ((), {})
    (gradient,) = Mutation(node)["factors"]
    context_of(built).replace(built.graph, gradient, copied(built.graph, gradient))
    assert "eager_input_vals" not in node.meta


def test_facts_are_found_once_and_stay_true() -> None:
    """A product by what an op leaves in the codes: before it is replaced, the codes are computed."""
    stored = formats.quantize_int8(torch.randn(8, 12), 4)[:3]
    module = traced(
        lambda x, codes, scale, offset: x @ formats.dequantize_int8((codes + 1).to(torch.uint8), scale, offset, 4).t(),
        torch.randn(5, 12), *stored,
    )  # fmt: skip
    graph, context = module.graph, Context()
    (gemm,) = (node for node in graph.nodes if is_gemm(node))
    x, codes, *_ = graph.find_nodes(op="placeholder")
    facts = context.facts(graph)
    weight = operands(gemm)[1]
    assert facts.storage(weight) == set(graph.find_nodes(op="placeholder")) - {x}
    new = next(node for node in graph.nodes if node.target is aten.add.Tensor and codes in node.all_input_nodes)
    with graph.inserting_before(new):
        product = make(graph, aten.mm.default, x, make(graph, aten.permute.default, x, [1, 0]))
    assert facts.storage(product) is None
    context.replace(graph, new, product)
    assert context.facts(graph) is facts
    assert facts.storage(weight) is None


# -- notes ------------------------------------------------------------------------------------------------------------


def test_a_note_tells_what_has_been_told_and_takes_no_other_word() -> None:
    context = Context()
    context.note("w").update_function = "generated, 1 kernel"
    context.note("w").reassociated = False
    assert context.told("w") == {"update_function": "generated, 1 kernel", "reassociated": False}
    assert context.told("of another") == {}
    assert set(context.notes) == {"w"}
    with pytest.raises(AttributeError):
        context.note("w").updated_function = "x"  # type: ignore[attr-defined]


def test_a_record_gives_back_the_note_that_it_was_made_of() -> None:
    note = LayerNote(ops=3, reassociated=True, not_fused="a reason")
    assert note_of(layer_record("w", (2, 3), **note.told())) == note
    assert note_of(layer_record("w", (2, 3))) == LayerNote(reassociated=False)


def test_every_field_of_a_note_is_told_by_a_pass_and_read_by_somebody() -> None:
    root = Path(__file__).parents[2]

    def attributes(folder: str, context: type[ast.expr_context]) -> set[str]:
        trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (root / folder).rglob("*.py"))
        nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        return {node.attr for node in nodes if isinstance(node.ctx, context)}

    names = {each.name for each in fields(LayerNote)}
    assert names <= attributes("passes", ast.Store)
    assert names <= attributes("qgalore_compile/reports", ast.Load) | attributes("qgalore_compile/backend", ast.Load)
