"""What follows from a whole graph: products behind a node, where it is stored, and how it is decoded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import traced
from passes_support import Layer, galore
from torch import Tensor, fx

from qgalore_compile.passes import PASSES, Context, Pass, PassManager, PassRecord
from qgalore_compile.passes.facts import MOST_GEMMS, Facts
from qgalore_compile.passes.nodes import FUNCTIONALIZED, is_gemm

A = torch.randn(4, 4)


def facts(function: Any, *inputs: Tensor) -> tuple[Facts, list[fx.Node]]:
    """Facts about a graph, and the nodes that it returns."""
    graph = traced(function, *(given.clone() for given in inputs)).graph  # tracing takes one tensor for one input
    (output,) = graph.find_nodes(op="output")
    return Facts(graph), list(output.args[0])


def test_products_are_found_through_other_operations_and_not_through_products() -> None:
    known, (both, one, itself) = facts(lambda a, b: ((a @ b).exp() + (b @ a).t(), ((a @ b) @ a).tanh(), a @ b), A, A)
    assert len(known.gemms(both)) == 2
    assert len(known.gemms(one)) == 1
    assert known.gemms(itself) == (itself,)


def test_products_are_not_found_through_0_d_tensors() -> None:
    known, (clipped, given) = facts(lambda a, b: (a * (a @ b).norm(), a + 1), A, A)
    assert known.gemms(clipped) == known.gemms(given) == ()


@pytest.mark.parametrize(("count", "known"), [(MOST_GEMMS, MOST_GEMMS), (MOST_GEMMS + 1, 0)])
def test_too_many_products_are_none(count: int, known: int) -> None:
    found, (total, behind) = facts(lambda a, b: ((s := sum((a * i) @ b for i in range(1, count + 1))), s.exp()), A, A)
    assert len(found.gemms(total)) == len(found.gemms(behind)) == known


def test_storage_is_the_inputs_behind_a_node_unless_a_product_is_there_too() -> None:
    known, (decoded, mixed, scaled) = facts(lambda a, b, c: (a.abs() * b, (a @ b) * c, c * (a @ b).sum()), A, A, A)
    assert {node.name for node in known.storage(decoded) or ()} == {"a_1", "b_1"}
    assert known.storage(mixed) is None
    assert {node.name for node in known.storage(scaled) or ()} == {"c_1"}


def test_inputs_that_are_written_are_known() -> None:
    assert {node.name for node in Facts(galore(Layer(rule="sgd")).graph).written} == {"a_m", "a_w"}


def test_equal_decodings_are_equal_up_to_transposition_casts_and_copies() -> None:
    known, (plain, cast, turned, back, other, more) = facts(
        lambda a: (
            a * 2, (a * 2).double().float() * 1.0, (a * 2).t().clone(), (a * 2).t().contiguous().t(), a * 3, a * 2 + 0.5
        ),
        A,
    )  # fmt: skip
    assert known.same_decoding(plain, turned)
    assert known.same_decoding(plain, back)
    assert [known.transposed(node) for node in (plain, turned, back)] == [False, True, False]
    assert not known.same_decoding(plain, other)
    assert not known.same_decoding(plain, more)
    assert known.same_decoding(plain, cast) or cast.target is torch.ops.aten.mul.Tensor


def test_a_detour_through_integers_is_part_of_the_decoding() -> None:
    known, (plain, rounded) = facts(lambda a: (a * 1.5, (a * 1.5).to(torch.int8).float()), A)
    assert not known.same_decoding(plain, rounded)


def test_a_transposition_inside_a_decoding_counts() -> None:
    known, (first, second) = facts(lambda a, b: (a * b, a.t() * b), A, A)
    assert not known.same_decoding(first, second)


def test_what_a_mutating_op_returns_is_stored_and_decoded_as_its_argument() -> None:
    built = galore(Layer(refresh="svd"))
    known = Facts(built.graph)
    (call,) = built.operator(FUNCTIONALIZED)
    results = {result.args[1]: result for result in call.users}
    assert known.storage(results[2]) == {built.node("a_p")}
    assert known.same_decoding(results[2], built.node("a_p"))
    (down,) = known.gemms(results[1])
    assert is_gemm(down)


# -- while passes rewrite the graph -----------------------------------------------------------------------------------


def asked_of_all(each: Pass) -> Pass:
    """A pass before which everything is asked of every node, and behind which all answers must be those of now."""

    def run(graph: fx.Graph, record: PassRecord, context: Context) -> None:
        facts = context.facts(graph)
        for node in graph.nodes:
            facts.storage(node), facts.gemms(node), facts.transposed(node)
        each.run(graph, record, context)
        assert context.facts(graph) is facts
        now = Facts(graph)
        for node in graph.nodes:
            if node.op == "call_function":
                assert facts.storage(node) == now.storage(node), (each.name, node)
                assert set(facts.gemms(node)) == set(now.gemms(node)), (each.name, node)

    return replace(each, run=run)


LAYERS = {
    "int8": [Layer(weight="int8", projector="int4", refresh="svd"), Layer("b", (12, 20), weight="int8")],
    "accumulated": [
        Layer(accumulate=2, addition="addmm", refresh="randomized", follow="rotate"),
        Layer("b", rule="lion"),
    ],
    "given": [Layer(after=lambda gradient, tensors: torch.tanh(gradient), projector="int4")],
}


@pytest.mark.parametrize("options", [{}, {"reassociate": "never"}, {"gemm": "bf16"}], ids=str)
@pytest.mark.parametrize("without", [(), ("fuse", "fuse_products")], ids=["fused", "outlined"])
@pytest.mark.parametrize("layers", LAYERS)
def test_what_is_known_stays_true_behind_every_pass(layers: str, without: tuple[str, ...], options: Any) -> None:
    built = galore(*LAYERS[layers])
    chosen = [asked_of_all(each) for each in PASSES if each.name not in without]
    PassManager(chosen, lint=True, **options)(built.graph)


def test_all_passes_share_the_facts_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fx.Graph] = []
    init = Facts.__init__
    monkeypatch.setattr(Facts, "__init__", lambda self, graph: (made.append(graph), init(self, graph))[1])
    built = galore(Layer(weight="int8", projector="int4", refresh="svd"), Layer("b"))
    built.after()
    assert made == [built.graph]
