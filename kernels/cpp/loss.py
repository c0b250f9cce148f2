"""Losses over a vocabulary on a CPU: some rows of the logits at a time, from their product to the products that read
their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.loss import parsed
from qgalore_compile.kernels.loss import in_blocks


def kernel(text: str) -> cpu.Kernel:
    """The kernel of a text's program."""
    return cpu.kernel(str(parsed(text).program))


def run(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Run a :class:`LossProgram` (its text); tensors as for its ``share``."""
    program = parsed(text)
    _, results, _, rest = program.share(written, read)
    launch = _block_by_block(text).on([*results, *rest], numbers)

    def finish(logits: Tensor, first: int) -> None:
        launch(logits, first, first, first + len(logits), 0, program.program.space.groups)

    in_blocks(program, written, read, finish)


@cache
def _block_by_block(text: str) -> cpu.BlockByBlock:
    """The kernel of a text's program, its logits handed in block by block; one a process."""
    program = parsed(text)
    return cpu.BlockByBlock(kernel(text), program.logits, program.program.space.columns)
