"""Losses over a vocabulary on a CPU: some rows of the logits at a time, from their product to the products that read
their gradient."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.loss import parsed
from qgalore_compile.kernels.loss import in_blocks


def kernel(text: str) -> cpu.Kernel:
    """The kernel of a text's program."""
    return cpu.kernel(str(parsed(text).program))


def run(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Run a :class:`LossProgram` (its text); tensors as for its ``share``."""
    plan = _plan(text)
    _, results, _, rest = plan.program.share(written, read)
    addresses, held = plan.kernel.addresses(plan.order, [*results, *rest]), cpu.packed(numbers)

    def finish(logits: Tensor, first: int) -> None:
        addresses[plan.place] = logits.data_ptr() - first * logits.shape[1] * logits.element_size()
        plan.kernel.launch(plan.kernel.pack(*addresses), plan.pitches, held, first, first + len(logits), 0, plan.groups)

    in_blocks(plan.program, written, read, finish)


class _Plan:
    """What the calls of a text have in common.

    Attributes:
        program, kernel: the text's.
        place: of the logits among the program's buffers; ``order`` has those of the other ones.
        pitches: of all buffers, as a launch takes them.
        groups: of a row.
    """

    def __init__(self, text: str) -> None:
        self.program = parsed(text)
        self.kernel = kernel(text)
        names = [buffer.name for buffer in self.program.program.buffers]
        self.place = names.index(self.program.logits)
        self.order = [place for place in self.kernel.order if place != self.place]
        self.pitches: Any = (ctypes.c_int64 * len(names))(*self.kernel.pitches)
        self.groups = self.program.program.space.groups


@cache
def _plan(text: str) -> _Plan:
    """Of a text, one a process."""
    return _Plan(text)
