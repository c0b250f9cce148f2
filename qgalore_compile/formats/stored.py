"""``Stored``: tensors beside the format that they are in, read as floats and written as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore_compile.formats.base import Format
from qgalore_compile.formats.operators import decode, encode


class Stored(NamedTuple):
    """A tensor in a format.

    Attributes:
        format: of it.
        parts: what it is stored in, in the format's order.
        shape: of the floats.
    """

    format: Format
    parts: Sequence[Tensor]
    shape: Sequence[int]

    def load(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The floats."""
        return decode(self.parts, self.shape, self.format, dtype)

    def store_(self, value: Tensor, noise: Tensor | None = None, ok: Tensor | None = None) -> None:
        """Write floats, in place.

        Args:
            value: of ``shape``.
            noise: 16 random bits an element, for stochastic rounding; None rounds to nearest.
            ok: 0-d bool; where it is False everything stays.
        """
        for part, new in zip(self.parts, encode(value, self.format, noise), strict=True):
            part.copy_(new if ok is None else torch.where(ok, new, part))

    def codes(self) -> Tensor | None:
        """The integer code of each element, int32 of ``shape``; None of floats."""
        form = self.format.grouped
        return None if form is None else form.codes(self.parts, self.shape)

    def code_step(self) -> Tensor | None:
        """How far the value of the farther neighbour in code is from each element's; None of floats."""
        form, codes = self.format.grouped, self.codes()
        if form is None or codes is None:
            return None
        value = self.load(torch.float64)
        sides = [self._replace(parts=form.with_codes(self.parts, each)) for each in form.neighbours(codes)]
        return torch.maximum(*((side.load(torch.float64) - value).abs() for side in sides))
