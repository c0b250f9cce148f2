"""The operators that a fused graph calls: a program's text and its tensors.

The text is an argument of the operator, not a key into a registry: what a compiled graph calls is complete in itself,
for the caches of compiled graphs and for other processes.  What runs it is looked up by the tensors' device
(:mod:`qgalore_compile.kernels.lowering`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qgalore_compile._ops import called_directly, define, numbered
from qgalore_compile.kernels import lowering
from qgalore_compile.kernels.ir.gemm import GemmProgram, parsed
from qgalore_compile.kernels.ir.loss import LossProgram
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.ir.rows import RowsProgram
from qgalore_compile.kernels.lowering import Lowering


def _lowering(tensors: Sequence[Tensor]) -> Lowering:
    device = tensors[0].device
    found = lowering.of(device)
    if found is None:
        known = " and ".join(lowering.devices())
        raise NotImplementedError(f"generated kernels run on {known}, these tensors are on {device.type!r}")
    return found


def _run(program: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    _lowering(written).run_program(program, written, read, numbers)


def _run_gemm(program: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    _lowering(written).run_gemm(program, written, read, numbers)


def _run_rows(program: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    found = _lowering(written)
    assert found.run_rows is not None  # `row_blocks` asks
    found.run_rows(program, written, read, numbers)


def _run_loss(program: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    found = _lowering(written)
    assert found.run_loss is not None  # `chunked_loss` asks
    found.run_loss(program, written, read, numbers)


def _nothing(program: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    return None


_ROW_MAJOR = torch.Tag.needs_contiguous_strides
"""Inductor may lay a tensor out as its own inputs lie, whatever strides the graph says: what follows from the transpose
of a momentum, say.  Kernels read rows."""

run_program = define(
    "run_program(str program, Tensor(a!)[] written, Tensor[] read, int[] numbers) -> ()", _run, _nothing, _ROW_MAJOR
)
"""Run a :class:`BlockProgram` (its text) over its whole space; tensors as for ``gemm.named``."""
called_directly(run_program, _run)
numbered(run_program, "numbers", _run, _nothing)

run_gemm = define(
    "run_gemm(str program, Tensor(a!)[] written, Tensor[] read, int[] numbers) -> ()", _run_gemm, _nothing, _ROW_MAJOR
)
"""Run a :class:`GemmProgram` (its text); tensors as for ``GemmProgram.share``."""
called_directly(run_gemm, _run_gemm)
numbered(run_gemm, "numbers", _run_gemm, _nothing)


run_rows = define(
    "run_rows(str program, Tensor(a!)[] written, Tensor[] read, int[] numbers) -> ()", _run_rows, _nothing, _ROW_MAJOR
)
"""Run a :class:`RowsProgram` (its text); tensors as for ``RowsProgram.share``."""
called_directly(run_rows, _run_rows)
numbered(run_rows, "numbers", _run_rows, _nothing)


run_loss = define(
    "run_loss(str program, Tensor(a!)[] written, Tensor[] read, int[] numbers) -> ()", _run_loss, _nothing, _ROW_MAJOR
)
"""Run a :class:`LossProgram` (its text); tensors as for ``LossProgram.share``."""
called_directly(run_loss, _run_loss)
numbered(run_loss, "numbers", _run_loss, _nothing)


def _gemm(program: str, read: Sequence[Tensor]) -> Tensor:
    return _lowering(read).gemm(program, read)


def _gemm_fake(program: str, read: Sequence[Tensor]) -> Tensor:
    gemm = parsed(program)
    ((left, right),) = gemm.operands(read)
    shape = (gemm.left.size(left, 0), gemm.right.size(right, 1))
    plain = left[0] if gemm.left.prologue is None else right[0]
    return plain.new_empty(shape)


gemm = define("gemm(str program, Tensor[] read) -> Tensor", _gemm, _gemm_fake)
"""The product of a :class:`GemmProgram` (its text) without an epilogue; at least one operand is a tensor as it is."""
called_directly(gemm, _gemm)


@cache
def program_of(text: str) -> BlockProgram | GemmProgram | RowsProgram | LossProgram:
    """The program that an operator's first argument spells; one a process."""
    if text.startswith("rows "):
        return RowsProgram.parse(text)
    if text.startswith("loss "):
        return LossProgram.parse(text)
    return parsed(text) if text.startswith("gemm ") else BlockProgram.parse(text)
