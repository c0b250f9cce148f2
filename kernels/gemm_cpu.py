"""Products with prologues and an epilogue on a CPU: the library's GEMM on blocks that stay in cache.

The product is computed block by block into one buffer, which the epilogue consumes before the next block is computed:
the m × n product is never stored, nor is a decoded operand larger than a block.  Blocks are whole rows where the left
operand is decoded or none is, and whole groups of columns where the right one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import lcm

import torch
from torch import Tensor

from qgalore_compile.kernels import cpu
from qgalore_compile.kernels.evaluate import MEMORY_DTYPES
from qgalore_compile.kernels.gemm import VALUE, GemmProgram, Operand

BLOCK_BYTES = 1 << 20
"""A block of the product at most: it has to stay in the second-level caches until the epilogue has read it."""


@cache
def parsed(text: str) -> GemmProgram:
    """The program of a text, one a process."""
    return GemmProgram.parse(text)


def run(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Run a :class:`GemmProgram`; arguments as for :meth:`GemmProgram.share`."""
    program = parsed(text)
    left, right, own = program.share(written, read)
    epilogue = cpu.kernel(str(program.epilogue)).arguments(own, numbers)
    space, dtype = program.epilogue.space, MEMORY_DTYPES[program.epilogue.buffer(program.product).memory]
    sources = _Source(program.left, left, dtype), _Source(program.right, right, dtype)
    row_block, group_block = _blocks(program, dtype, sources[0])
    columns = min(group_block * space.width, space.columns)
    product = torch.empty(row_block * columns, dtype=dtype)
    for group_0, group_1 in _ranges(space.groups, group_block):
        column_0, column_1 = group_0 * space.width, min(group_1 * space.width, space.columns)
        right_block = sources[1].block(column_0, column_1, columns=True)
        for row_0, row_1 in _ranges(space.rows, row_block):
            left_block = sources[0].block(row_0, row_1, columns=False)
            size = (row_1 - row_0, column_1 - column_0)
            block = product[: size[0] * size[1]].view(size)
            torch.mm(left_block, right_block, out=block)
            epilogue.place(program.product, block, row_0, column_0)
            epilogue.run(row_0, row_1, group_0, group_1)


def _blocks(program: GemmProgram, dtype: torch.dtype, left: _Source) -> tuple[int, int]:
    """Rows and groups of a block."""
    space = program.epilogue.space
    elements = BLOCK_BYTES // dtype.itemsize
    groups = space.groups
    if program.right.prologue is not None:
        inner = left.inner
        # a block of the decoded operand is no larger than one of the product
        step = lcm(space.width, program.right.prologue.space.width) // space.width
        groups = min(groups, max(1, elements // (inner * space.width)) // step * step or step)
    columns = min(groups * space.width, space.columns)
    rows = max(1, min(space.rows, elements // columns))
    if program.left.prologue is not None and program.left.transposed:
        width = program.left.prologue.space.width
        rows = max(width, rows // width * width)
    return rows, groups


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, step):
        yield first, min(first + step, count)


class _Source:
    """An operand, handed out in blocks; a decoded one is decoded into one buffer again and again.

    Attributes:
        inner: k, the size that both operands share.
    """

    def __init__(self, operand: Operand, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.operand = operand
        self.whole = tensors[0].t() if operand.transposed else tensors[0]
        self.at: tuple[int, int] | None = None
        if operand.prologue is not None:
            kernel = cpu.kernel(str(operand.prologue))
            names = [buffer.name for buffer in operand.prologue.buffers if buffer.name != VALUE]
            self.prologue = kernel.arguments(dict(zip(names, tensors, strict=True)), ())
            self.dtype = MEMORY_DTYPES[operand.prologue.buffer(VALUE).memory]
            self.scratch = torch.empty(0, dtype=self.dtype)
        self.dtype = dtype

    @property
    def inner(self) -> int:
        """k, seen from a left operand."""
        if self.operand.prologue is None:
            return self.whole.shape[1]
        space = self.operand.prologue.space
        return space.rows if self.operand.transposed else space.columns

    def block(self, first: int, last: int, *, columns: bool) -> Tensor:
        """Rows, or columns, first..last of the operand."""
        prologue = self.operand.prologue
        if prologue is None:
            return self.whole[:, first:last] if columns else self.whole[first:last]
        space = prologue.space
        by_columns = columns != self.operand.transposed  # of the value as it is stored
        rows = (0, space.rows) if by_columns else (first, last)
        places = (first, last) if by_columns else (0, space.columns)
        size = (rows[1] - rows[0], places[1] - places[0])
        if self.at != (first, last):
            if self.scratch.numel() < size[0] * size[1]:
                self.scratch = torch.empty(size[0] * size[1], dtype=self.scratch.dtype)
            value = self.scratch[: size[0] * size[1]].view(size)
            self.prologue.place(VALUE, value, rows[0], places[0])
            self.prologue.run(*rows, places[0] // space.width, -(-places[1] // space.width))
            self.at = (first, last)
        value = self.scratch[: size[0] * size[1]].view(size)
        return value.t() if self.operand.transposed else value
