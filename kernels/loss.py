"""A loss over a vocabulary some rows at a time, and what its labels may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qgalore_compile._ops import define
from qgalore_compile.kernels.ir.loss import LossProgram

SMALL = 1 << 20
"""Logits, by elements, below which a loss stays with Inductor."""
BLOCK_BYTES = 1 << 26
"""Of logits that exist at a time.  Of 4,096 × 49,152 on two EPYC cores half of it takes 8 % longer; twice as much is no
faster."""


def _below(index: Tensor, count: int) -> Tensor:
    if index.numel():
        low, high = (int(each) for each in index.aminmax())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise IndexError(f"label {wrong} is none of the {count} that there are logits for (0 to {count - 1})")
    return index.clone()


below = define("below(Tensor index, int count) -> Tensor", _below, lambda index, count: torch.empty_like(index))
"""An integer tensor as it is, where all of it is from 0 to ``count`` - 1; IndexError elsewhere, as ``gather``'s."""


def in_blocks(
    program: LossProgram, written: Sequence[Tensor], read: Sequence[Tensor], finish: Callable[[Tensor, int], None]
) -> None:
    """Compute the logits block by block, and the gradients from what ``finish`` leaves of each.

    Args:
        program: of which
        written, read: are the tensors.
        finish: given a block and its first row, replaces it by its gradient.
    """
    gradients, _, (left, right, *bias), _ = program.share(written, read)
    hidden, weight = (each.t() if flag else each for each, flag in zip((left, right), program.transposed, strict=True))
    rows, columns = len(hidden), weight.shape[1]
    step = min(rows, max(1, BLOCK_BYTES // (columns * hidden.element_size())))
    step = -(-rows // -(-rows // step))  # equal blocks
    # many blocks' sums are rounded to a narrow type once
    sums = {name: _Sum(each) for name, each in gradients.items() if name != "hidden"}
    logits = hidden.new_empty((step, columns))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        block, given = logits[: last - first], hidden[first:last]
        if bias:
            torch.addmm(bias[0], given, weight, out=block)
        else:
            torch.mm(given, weight, out=block)
        finish(block, first)
        if "hidden" in gradients:
            torch.mm(block, weight.t(), out=gradients["hidden"][first:last])
        if "weight" in sums:
            sums["weight"].add_product(block.t(), given)
        if "bias" in sums:
            sums["bias"].add(block.sum(0, dtype=torch.float32))
    for each in sums.values():
        each.finish()


class _Sum:
    """A sum over blocks, in float32."""

    def __init__(self, out: Tensor) -> None:
        self.out = out
        self.total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        self.empty = True

    def add(self, part: Tensor) -> None:
        if self.empty:
            self.total.copy_(part)
        else:
            self.total.add_(part)
        self.empty = False

    def add_product(self, left: Tensor, right: Tensor) -> None:
        if self.out.dtype != torch.float32:
            self.add(left @ right)
            return
        if self.empty:
            torch.mm(left, right, out=self.total)
        else:
            torch.addmm(self.total, left, right, out=self.total)
        self.empty = False

    def finish(self) -> None:
        if self.total is not self.out:
            self.out.copy_(self.total)
