"""Programs that read a gradient by blocks of rows, on a CPU: a block is made, and read while it is in cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import gcd

from torch import Tensor

from qgalore_compile.kernels import rows
from qgalore_compile.kernels.cpp import gemm
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.rows import RowsProgram, parsed


def kernel(text: str) -> cpu.Kernel:
    """The kernel of a text's program."""
    return cpu.kernel(str(parsed(text).program))


def run(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Run a :class:`RowsProgram` (its text) with a gradient that is made block by block; ``read`` as for its
    ``share``."""
    plan = _plan(text, rows.BLOCK_BYTES)
    operands, rest = plan.program.share(read)
    fill = rows.filling(plan.program.terms, operands, plan.program.rows)
    launch = plan.kernel.on([*written, *rest], numbers)
    for first, last, bounds in plan.blocks:
        block = gemm.scratch("gradient", (last - first, plan.program.columns), plan.dtype)
        fill(block, first, last)
        launch(block, first, *bounds)


class _Plan:
    """What the calls of a text have in common.

    Attributes:
        program, kernel: the text's.
        dtype: of the gradient.
        blocks: first row and last but one, and the bounds of the launch on them.
    """

    def __init__(self, text: str, block_bytes: int) -> None:
        self.program: RowsProgram = parsed(text)
        self.kernel = cpu.BlockByBlock(kernel(text), self.program.gradient, self.program.columns)
        self.dtype = MEMORY[self.program.program.buffer(self.program.gradient).memory].dtype
        step = max(1, block_bytes // (self.program.columns * self.dtype.itemsize))
        unit = self._unit()
        step = max(step // unit, 1) * unit
        self.blocks = [
            (first, min(first + step, self.program.rows), self._bounds(first, min(first + step, self.program.rows)))
            for first in range(0, self.program.rows, step)
        ]

    def _unit(self) -> int:
        """Rows that a block must be a multiple of: in a flat space a group may not lie in two of them."""
        space = self.program.program.space
        return 1 if space.rows > 1 else space.width // gcd(self.program.columns, space.width)

    def _bounds(self, first: int, last: int) -> tuple[int, int, int, int]:
        """Rows and groups of a launch."""
        space, columns = self.program.program.space, self.program.columns
        if space.rows > 1:
            return first, last, 0, space.groups
        return 0, 1, first * columns // space.width, -(-last * columns // space.width)


@cache
def _plan(text: str, block_bytes: int) -> _Plan:
    """Of a text, for blocks of that size; one a process."""
    return _Plan(text, block_bytes)
