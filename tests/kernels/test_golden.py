"""What the printers print for a step of `QGaLoreAdamW`: Adam's region and the write-back, in C++ and in Triton.

The texts stand in ``cpp/golden`` and ``triton/golden``.  A change of them that is meant is accepted by

    QGALORE_ACCEPT=1 pytest tests/kernels/test_golden.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from golden import ACCEPT, assert_golden
from kernels_support import evaluated_kernels
from support import compiled, training_step
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.kernels.cpp.printer import print_cpp
from qgalore_compile.kernels.ir.gemm import GemmProgram
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.ops import run_gemm, run_program
from qgalore_compile.passes.nodes import value

HERE = Path(__file__).parent


class Small(nn.Module):
    """One projected layer: a weight (24, 40) in groups of 16, the last one short."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


class Call(NamedTuple):
    """A call of a generated kernel: its program's text, and what it reads."""

    text: str
    read: list[Tensor]


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    """The calls of the update, "region" and "write-back"."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = qg.quantize_(Small(), group_size=16, targets=["linear"])
    groups = qg.param_groups(model, rank=8, quant_group_size=16, targets=["linear"])
    step, backend = compiled(training_step(model, qg.QGaLoreAdamW(groups, weight_decay=0.01)))
    with evaluated_kernels():
        step(torch.randn(5, 40))
    found = {}
    for name, op in (("region", run_program), ("write-back", run_gemm)):
        (node,) = backend.graphs[-1].graph.find_nodes(op="call_function", target=op)
        text, _, read, _ = node.args
        found[name] = Call(text, [value(each) for each in read])
    return found


def test_adams_region_in_cpp(calls: dict[str, Call]) -> None:
    assert_golden(HERE / "cpp/golden/adam.cpp", print_cpp(BlockProgram.parse(calls["region"].text)))


def test_the_write_back_in_cpp(calls: dict[str, Call]) -> None:
    program = GemmProgram.parse(calls["write-back"].text)
    assert program.epilogue is not None
    assert_golden(HERE / "cpp/golden/write_back.cpp", print_cpp(program.epilogue))


@pytest.mark.triton
def test_adams_region_in_triton(calls: dict[str, Call]) -> None:
    pytest.importorskip("triton")
    from qgalore_compile.kernels.triton.kernels import region_of

    assert_golden(HERE / "triton/golden/adam.txt", region_of(calls["region"].text).source)


@pytest.mark.triton
def test_the_write_back_in_triton(calls: dict[str, Call]) -> None:
    pytest.importorskip("triton")
    from qgalore_compile.kernels.triton.kernels import of_call
    from qgalore_compile.kernels.triton.targets import Target

    text, read = calls["write-back"]
    kernel, _ = of_call(GemmProgram.parse(text), text, read, Target.named("sm_90"), "ieee")
    assert_golden(HERE / "triton/golden/write_back.txt", kernel.source)


def test_a_text_that_differs_tells_the_difference_and_how_to_accept_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ACCEPT, raising=False)
    kept = tmp_path / "kept.txt"
    kept.write_text("one\ntwo\n")
    with pytest.raises(AssertionError, match=r"(?s)QGALORE_ACCEPT=1.*kept in kept\.txt.*-two\n\+three\n"):
        assert_golden(kept, "one\nthree\n")
    with pytest.raises(AssertionError, match=r"\+one\n"):
        assert_golden(tmp_path / "missing.txt", "one\n")
    monkeypatch.setenv(ACCEPT, "1")
    assert_golden(kept, "one\nthree\n")
    monkeypatch.delenv(ACCEPT)
    assert_golden(kept, "one\nthree\n")
