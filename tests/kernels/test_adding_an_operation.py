"""Adding an operation: a row in four tables, as CONTRIBUTING says, and every language computes it."""

from __future__ import annotations

import pytest
import torch
from graphs import traced
from kernels_support import assert_like, compiled, evaluated, filled
from torch import Tensor, fx

from qgalore_compile.kernels.cpp import spelling as cpp
from qgalore_compile.kernels.ir import program as ir
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.read import spelling
from qgalore_compile.kernels.read.from_graph import from_graph
from qgalore_compile.kernels.read.region import Output, Refusal, RefusedError

aten = torch.ops.aten

SPACE = Space(5, 21, 8)


@pytest.fixture
def hypot(monkeypatch: pytest.MonkeyPatch) -> None:
    """√(x² + y²), which no table has.  The evaluator takes PyTorch's function of the same name."""
    assert "hypot" not in ir.POINTWISE
    monkeypatch.setitem(ir.POINTWISE, "hypot", 2)
    monkeypatch.setitem(ir.OPERATIONS, "hypot", (2, 0))  # which the table above is made into
    monkeypatch.setitem(cpp.SPELLING, "hypot", "std::hypot({0}, {1})")
    monkeypatch.setitem(spelling.POINTWISE, aten.hypot.default, spelling._plain("hypot"))


def graph() -> tuple[fx.Graph, fx.Node]:
    """A step that calls it, and what it returns."""
    x, y = torch.randn(SPACE[:2]), torch.randn(SPACE[:2])
    traced_step = traced(lambda x, y: aten.hypot.default(x, y) * 0.5 + x, x, y).graph
    (end,) = traced_step.find_nodes(op="output")
    return traced_step, end.args[0]


def read() -> BlockProgram:
    """The program of that step."""
    step, result = graph()
    nodes = [node for node in step.nodes if node.op == "call_function"]
    return from_graph(nodes, [Output(result)], [SPACE]).program


def expected(made: BlockProgram, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    x, y = (tensors[buffer.name] for buffer in made.buffers if buffer.access == "in")
    (out,) = (buffer.name for buffer in made.written())
    return {**tensors, out: torch.hypot(x, y) * 0.5 + x}


def test_without_its_rows_it_is_refused_and_named() -> None:
    with pytest.raises(RefusedError, match=r"hypot: aten\.hypot\.default") as refused:
        read()
    assert refused.value.refusal is Refusal.OPERATION


@pytest.mark.usefixtures("hypot")
def test_a_region_with_it_is_read_written_as_text_and_evaluated() -> None:
    made = read()
    assert BlockProgram.parse(str(made)) == made
    tensors = filled(made)
    assert_like(evaluated(made, tensors), expected(made, tensors), made)


@pytest.mark.compiles
@pytest.mark.usefixtures("hypot")
def test_it_is_compiled_for_a_cpu() -> None:
    made = read()
    tensors = filled(made)
    assert_like(compiled(made, tensors), expected(made, tensors), made)


@pytest.mark.triton
@pytest.mark.usefixtures("hypot")
def test_it_is_compiled_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import interpreted

    from qgalore_compile.kernels.triton import spelling as triton
    from qgalore_compile.kernels.triton.kernels import region_kernel

    monkeypatch.setitem(triton.SPELLING, "hypot", "tl.sqrt_rn({0} * {0} + {1} * {1})")
    made = read()
    tensors = filled(made)
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    interpreted.launch(region_kernel(made), found, {})
    assert_like(found, expected(made, tensors), made)
