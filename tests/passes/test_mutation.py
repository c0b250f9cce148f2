"""One view of a call that changes tensors, for calls that tracing left and for new ones."""

from __future__ import annotations

import pytest
import torch
from kernels_support import load, program
from passes_support import Built, Layer, galore
from torch import fx

from qgalore_compile.kernels import ops
from qgalore_compile.kernels.ir.program import Space
from qgalore_compile.passes.kernel_calls import KernelCall, kernel_calls
from qgalore_compile.passes.mutation import FUNCTIONALIZED, Mutation
from qgalore_compile.passes.nodes import previous_version, value

REFRESH = torch.ops.qgalore.refresh_.default
COPY = program(Space(20, 12, 4), "x f32 element in", "y f32 element inout", numbers=("seed",))
COPY.store("y", COPY.emit("add", (load(COPY, "x"), load(COPY, "y"))))


def refreshed(form: str = "int4") -> tuple[Built, Mutation]:
    built = galore(Layer(refresh="svd", projector=form))
    (node,) = built.operator(FUNCTIONALIZED)
    found = Mutation.of(node)
    assert found is not None
    return built, found


@pytest.mark.parametrize("form", ["float", "int4"])
def test_arguments_are_what_the_schema_calls_them_changed_ones_too(form: str) -> None:
    built, call = refreshed(form)
    parts = ["a_p"] if form == "float" else ["a_p_codes", "a_p_scale", "a_p_offset"]
    assert call.op is REFRESH
    assert [built.name_of[node.name] for node in call["projector"]] == parts
    assert built.name_of[call["schedule"].name] == "a_schedule"
    assert call["method"] == "svd"
    assert call.written == [call["low"], *call["projector"], call["schedule"]]


def test_only_a_call_of_one_of_the_given_ops_is_one() -> None:
    _, call = refreshed()
    assert Mutation.of(call.node, REFRESH) == call
    assert Mutation.of(call.node, ops.run_program) is None
    assert Mutation.of(call["low"]) is None


def test_results_are_counted_as_what_is_written_and_none_is_made_for_what_nobody_reads() -> None:
    _, call = refreshed()
    for index, result in call.results():
        assert call.result(index) is result
        assert call.before(result) is previous_version(result) is call.written[index]
    last = len(call.written) - 1
    unread = call.result(last)
    assert unread is not None
    for user in list(unread.users):
        call.node.graph.erase_node(user)
    call.node.graph.erase_node(unread)
    assert call.result(last) is None


def test_other_arguments_make_tracings_forgotten_and_what_is_written_stays() -> None:
    built, call = refreshed()
    call.node.meta["eager_input_vals"] = ((), {})
    before, x = call.written, built.node("a_x0")
    assert call.with_(factors=[x])["factors"] == [x]
    assert call.written == before
    assert "eager_input_vals" not in call.node.meta
    assert call.node in x.users
    for name in ("projector", "colour"):
        with pytest.raises(ValueError, match=f"takes no {name}, or changes it"):
            call.with_(**{name: []})


def added() -> tuple[fx.Graph, Mutation, fx.Node]:
    built = galore(Layer())
    weight = built.node("a_w")
    with built.graph.inserting_before(next(iter(built.graph.find_nodes(op="output")))):
        call, (result,) = Mutation.call(
            built.graph, ops.run_program, {"written": [weight]}, program=str(COPY), read=[weight], numbers=[7]
        )
    return built.graph, call, result


def test_a_new_call_is_as_functionalisation_leaves_one() -> None:
    graph, call, result = added()
    assert call.node.kwargs == {
        "program": str(COPY), "read": call.reads, "numbers": [7], "_written_length": 1, "_written_0_base_index": 0,
        "_all_bases": call.written,
    }  # fmt: skip
    assert result.args == (call.node, 1)
    assert previous_version(result) is call.written[0]
    assert value(result) is value(call.written[0])
    assert value(call.node)[0] is None
    graph.lint()


def test_calls_of_generated_kernels_are_seen_alike_in_both_forms() -> None:
    graph, call, _ = added()
    (found,) = kernel_calls(graph)
    assert found == KernelCall(call.node, call)
    assert (found.text, found.reads) == (str(COPY), call.reads)
    assert found.device == torch.device("cpu")
    product = graph.call_function(ops.gemm, ("gemm …", call.reads))
    product.meta["val"] = value(call.written[0])
    other = KernelCall.of(product)
    assert other is not None
    assert (other.mutation, other.text, other.reads) == (None, "gemm …", call.reads)
    assert KernelCall.of(call.written[0]) is None
