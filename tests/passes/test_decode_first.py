"""gemm("…", codes) -> decode, mm(decoded) on a GPU, where a model finds that faster; the numbers stay.

Graphs are compiled for a GPU that is not there and interpreted on the CPU (``interpreted.triton_on_cpus``).
"""

from __future__ import annotations

import importlib

import pytest
import torch
from graphs import after, results, targets, traced
from passes_support import Layer, galore
from quantised_products import GROUP, forward_and_input_gradient, stored_int8
from support import assert_within_contract
from torch import Tensor, fx

pytest.importorskip("triton")

from interpreted import Calls

from qgalore_compile import formats
from qgalore_compile.backend.dry_run import final_graph
from qgalore_compile.formats import Format
from qgalore_compile.formats.operators import decode, encode
from qgalore_compile.kernels import ops
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.passes import PASSES, PassManager
from qgalore_compile.passes.nodes import FUNCTIONALIZED, TRITON, Mutation, aten, value

pytestmark = pytest.mark.triton

T, M, N = 8, 16, 24
NAMES = ("update", "reassociate", "fuse", "fuse_products", "decode_first")
UPDATE = Layer("a", weight="int8", projector="int4")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding before is faster: these products are too small for it."""
    module = importlib.import_module("qgalore_compile.passes.decode_first")  # the package's name is the function
    monkeypatch.setattr(module, "decodes_first", lambda product, target: True)


def inputs() -> list[Tensor]:
    return [torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N)]


def decodings(graph: fx.Graph) -> list[Mutation]:
    """Calls that write nothing but what they have decoded."""
    found = (Mutation.of(node, ops.run_program) for node in graph.nodes)
    return [call for call in found if call and call.written[0].target is aten.empty.memory_format]


@pytest.mark.usefixtures("calls", "always")
def test_a_product_becomes_a_librarys_behind_its_decoding() -> None:
    module = traced(forward_and_input_gradient, *inputs())
    record = after(module, *NAMES).records[-1]
    assert (len(record.matches), record.skipped) == (2, [])
    decode = [aten.empty.memory_format, FUNCTIONALIZED, targets(module.graph)[2]]
    assert targets(module.graph) == [*decode, aten.permute.default, aten.mm.default, *decode, aten.mm.default]
    for call in decodings(module.graph):
        program = BlockProgram.parse(call.program)
        assert program.space[:2] == (M, N)
        assert [value(base).shape for base in call.written] == [(M, N)]


@pytest.mark.usefixtures("calls", "always")
def test_an_update_takes_its_projector_as_it_is() -> None:
    built = galore(UPDATE)
    manager = built.after(*NAMES)
    (layer,) = manager.context.layers
    (up,) = filter(None, (Mutation.of(node, ops.run_gemm) for node in built.graph.nodes))
    assert layer.up is up.node
    assert layer.down is not None
    assert layer.down.target is aten.mm.default
    program = ops.program_of(up.program)
    assert program.left.prologue is program.right.prologue is None
    assert program.epilogue is not None
    assert any(result in up.reads for call in decodings(built.graph) for _, result in call.results())


@pytest.mark.usefixtures("always")
def test_numbers_stay_with_both_kinds_of_products_and_triton_calls(calls: Calls) -> None:
    layers = [UPDATE, Layer("b", (12, 20), weight="int8", projector="int4")]
    torch.manual_seed(0)
    plain = galore(*layers)
    torch.manual_seed(0)
    built = galore(*layers)
    plain.after("update", "reassociate")
    manager = PassManager([each for each in PASSES if each.name in (*NAMES, "triton_calls")], lint=True)
    fakes = [value(node) for node in built.graph.find_nodes(op="placeholder")]
    with torch._inductor.config.patch(post_grad_custom_post_pass=manager):
        made = final_graph(built.module, fakes, is_inference=False)
    assert len(manager.records[-2].matches) == 4
    cloned = [given.clone() for given in built.inputs]
    calls.runner(made)(*cloned)
    assert_within_contract(dict(zip(built.names, cloned, strict=True)), plain.run())


@pytest.mark.usefixtures("calls", "always")
def test_a_projection_of_a_transposed_operand_keeps_its_transpose() -> None:
    packed = formats.quantize_int4(torch.randn(4, N), GROUP)

    def step(x: Tensor, y: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
        projector = formats.dequantize_int4(*stored, N, GROUP)
        return x @ projector.t(), projector.t() @ y

    given = [torch.randn(T, N), torch.randn(4, T), *packed[:3]]
    module = traced(step, *given)
    expected = results(module, given)
    assert len(after(module, *NAMES).records[-1].matches) == 2
    for one, other in zip(results(module, given), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("calls", "always")
def test_an_unknown_number_of_tokens_is_no_obstacle() -> None:
    module = traced(forward_and_input_gradient, *inputs(), symbolic=[0, 1])
    assert len(after(module, *NAMES).records[-1].matches) == 2
    more = [torch.randn(T + 3, N), torch.randn(T + 3, M), *inputs()[2:]]
    for one, other in zip(results(module, more)[:2], forward_and_input_gradient(*more), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("calls")
def test_small_products_stay_as_they_are() -> None:
    module = traced(forward_and_input_gradient, *inputs())
    record = after(module, *NAMES).records[-1]
    assert (record.matches, record.skipped, record.ops) == ([], [], {})


@pytest.mark.parametrize("columns", [N, N - 3], ids=["aligned", "rows that begin anywhere"])
def test_operands_that_are_rotated_are_decoded_before_however_small(calls: Calls, columns: int) -> None:
    """A product's tile takes k in parts, and a group is rotated as a whole."""
    form = Format.parse("int8/8+rotated")
    weight, projector = (form.encode(torch.randn(M, size)) for size in (columns, 8))

    def step(x: Tensor, dy: Tensor, m: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
        """Forward, input gradient, and momentum in a subspace."""

        def floats() -> tuple[Tensor, Tensor]:
            return decode(stored[:3], (M, columns), form), decode(stored[3:], (M, 8), form)

        w, p = floats()
        y, dx = x @ w.t(), dy @ w
        momentum = 0.9 * m + p.t() @ (dy.t() @ x)
        old, p = floats()
        for part, new in zip(stored[:3], encode(old - 0.1 * (p @ momentum), form), strict=True):
            aten.copy_.default(part, new)
        aten.copy_.default(m, momentum)
        return y, dx

    given = [torch.randn(T, columns), torch.randn(T, M), torch.randn(8, columns), *weight, *projector]
    module, plain = (traced(step, *given) for _ in range(2))
    fakes = [value(node) for node in module.graph.find_nodes(op="placeholder")]
    manager = PassManager([each for each in PASSES if each.name in (*NAMES, "triton_calls")], lint=True)
    with torch._inductor.config.patch(post_grad_custom_post_pass=manager):
        made = final_graph(module, fakes, is_inference=False)
    records = {each.name: each for each in manager.records}
    assert len(records["fuse_products"].matches) == 3  # R's among them
    assert len(records["decode_first"].matches) == 4  # and the update's
    assert records["triton_calls"].skipped == []
    cloned = [each.clone() for each in given]
    returned = calls.runner(made)(*cloned)
    names = [str(index) for index in range(len(given) + 2)]
    found = dict(zip(names, [*returned, *cloned], strict=True))
    assert_within_contract(found, dict(zip(names, results(plain, given), strict=True)))


@pytest.mark.usefixtures("always")
def test_a_graph_on_cpus_is_left_alone() -> None:
    module = traced(forward_and_input_gradient, *inputs())
    record = after(module, *NAMES).records[-1]
    assert (record.matches, record.skipped, record.ops) == ([], [], {})


@pytest.mark.usefixtures("calls", "always")
def test_triton_calls_turns_the_decoding_into_a_kernel_that_equal_layers_share() -> None:
    built = galore(*(Layer(name, weight="int8", projector="int4") for name in "abc"))
    built.after(*NAMES, "triton_calls")
    calls = built.operator(TRITON)
    assert len(calls) == 3 * (1 + 1 + 1 + 1)  # a decoding for each product, the region, the write-back
    assert len({call.kwargs["kernel_idx"] for call in calls}) == 3
