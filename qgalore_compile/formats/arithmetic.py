"""The arithmetic that a format is written in, once: on tensors, or as instructions of a program.

A format's ``load`` and ``store`` compute with operators (``+ - * / < & | << >>``) and with the functions of an
:class:`Arithmetic`.  Handed :class:`OnTensors` they run, which is what ``decode`` and ``encode`` do; handed that of a
program builder (``kernels/ir/arithmetic.py``) they are recorded.  So there is one formula, and a generated kernel can
mean no other one than the eager optimizer does.

Floats are float32, integers int32.  A value of a group stands beside those of its elements without ado.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from qgalore_compile.formats.rotation import rotated


class Arithmetic(Protocol):
    """What formats compute with; ``Any`` is a tensor or a program's value."""

    def where(self, condition: Any, first: Any, second: Any) -> Any: ...
    def floor(self, x: Any) -> Any: ...
    def round(self, x: Any) -> Any:
        """To nearest, ties to even."""

    def abs(self, x: Any) -> Any: ...
    def minimum(self, x: Any, bound: Any) -> Any: ...
    def maximum(self, x: Any, bound: Any) -> Any: ...
    def to_int(self, x: Any) -> Any: ...
    def to_float(self, x: Any) -> Any: ...
    def bits(self, x: Any) -> Any:
        """The same 32 bits as an integer."""

    def from_bits(self, x: Any) -> Any: ...
    def group_max(self, x: Any) -> Any: ...
    def group_min(self, x: Any) -> Any: ...
    def rotate(self, x: Any, back: bool) -> Any:
        """Every whole group by the randomised Hadamard matrix of its size, or back (``rotation.py``)."""

    def dynamic8_value(self, codes: Any, signed: bool) -> Any:
        """bitsandbytes' map, from codes to entries."""

    def dynamic8_code(self, x: Any, divisor: Any, signed: bool) -> Any:
        """The code of the entry nearest to x / divisor."""


class OnTensors:
    """On tensors of (..., groups, width), groups' values being (..., groups, 1).

    Args:
        short: elements of the last group of a row where it is a short one, filled up; 0 where all are whole.
        size: of a whole group, which rotations are of.
    """

    floor, round, abs = staticmethod(torch.floor), staticmethod(torch.round), staticmethod(torch.abs)

    def __init__(self, short: int = 0, size: int = 0) -> None:
        self._short, self._size = short, size

    @staticmethod
    def where(condition: Tensor, first: Any, second: Any) -> Tensor:
        if not isinstance(first, Tensor) and not isinstance(second, Tensor):
            dtype = torch.float32 if isinstance(first, float) else torch.int32  # not PyTorch's default dtype
            first = torch.tensor(first, dtype=dtype, device=condition.device)
        return torch.where(condition, first, second)

    @staticmethod
    def minimum(x: Tensor, bound: Any) -> Tensor:
        return torch.minimum(x, bound) if isinstance(bound, Tensor) else x.clamp(max=bound)

    @staticmethod
    def maximum(x: Tensor, bound: Any) -> Tensor:
        return torch.maximum(x, bound) if isinstance(bound, Tensor) else x.clamp(min=bound)

    @staticmethod
    def to_int(x: Tensor) -> Tensor:
        return x.to(torch.int32)

    @staticmethod
    def to_float(x: Tensor) -> Tensor:
        return x.to(torch.float32)

    @staticmethod
    def bits(x: Tensor) -> Tensor:
        return x.view(torch.int32)

    @staticmethod
    def from_bits(x: Tensor) -> Tensor:
        return x.view(torch.float32)

    @staticmethod
    def group_max(x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True)

    @staticmethod
    def group_min(x: Tensor) -> Tensor:
        return x.amin(-1, keepdim=True)

    def rotate(self, x: Tensor, back: bool) -> Tensor:
        if x.shape[-1] != self._size:
            return x
        if not self._short:
            return rotated(x, back)
        return torch.cat([rotated(x[..., :-1, :], back), x[..., -1:, :]], dim=-2)

    @staticmethod
    def dynamic8_value(codes: Tensor, signed: bool) -> Tensor:
        from qgalore_compile.formats.dynamic import dynamic_map

        return dynamic_map(signed, codes.device).index_select(0, codes.reshape(-1)).reshape(codes.shape)

    @staticmethod
    def dynamic8_code(x: Tensor, divisor: Tensor, signed: bool) -> Tensor:
        from qgalore_compile.formats.dynamic import nearest_entry

        return nearest_entry(x / divisor, signed)


def goes_up(on: Arithmetic, fraction: Any, noise: Any) -> Any:
    """Whether stochastic rounding goes up, for fractions in [0, 1) and 16-bit draws k: k + 1/2 < 65536 f.

    The half makes it unbiased to 2**-17; floor(x + k / 2**16) would be biased and, above 128, would lose the low bits.
    """
    return on.to_float(noise) + 0.5 < fraction * 65536.0


def to_whole(on: Arithmetic, level: Any, noise: Any) -> Any:
    """A number rounded to a whole one: to nearest with ``noise`` None, else stochastically."""
    if noise is None:
        return on.round(level)
    floor = on.floor(level)
    return on.where(goes_up(on, level - floor, noise), floor + 1.0, floor)


def nonzero(on: Arithmetic, scale: Any) -> Any:
    """What to divide by: the scale, or 1 where a group holds nothing but zeros."""
    return on.where(scale > 0.0, scale, 1.0)


def power_of_two(on: Arithmetic, scale: Any) -> Any:
    """The least power of two that is not smaller, for scales of at least 0, of which 0 stays: from the bits, since no
    two libraries have the same logarithm.  Beyond 2**127 it is infinite, as it is of NaN, which would else become 0.

    Source: ZeroQuant-FP (arXiv 2307.09782), M1.
    """
    bits = on.minimum(on.bits(scale), 0x7F800000)
    return on.from_bits((bits + 0x007FFFFF) & 0x7F800000)
