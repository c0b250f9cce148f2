"""Floats of eight, six and four bits, from one description each.

=======  ====  ========  ========  ====  ==========  ==============================================================
name     bits  exponent  mantissa  bias  largest     standard
=======  ====  ========  ========  ====  ==========  ==============================================================
e4m3     8     4         3         7     448         OCP FP8; PyTorch's float8_e4m3fn
e5m2     8     5         2         15    57344       OCP FP8; PyTorch's float8_e5m2
e2m3     6     2         3         1     7.5         OCP microscaling FP6
e3m2     6     3         2         3     28          OCP microscaling FP6
e2m1     4     2         1         1     6           OCP microscaling FP4
e3m0     4     3         0         3     16          powers of two and 0
=======  ====  ========  ========  ====  ==========  ==============================================================

Ties go to the even code; e3m0, without a mantissa, takes the larger of two powers.

A group's scale takes its largest magnitude to the format's largest number, so nothing overflows: what a rounding
of the quotient puts beyond saturates.  No code is made of the infinities of e5m2 and of the NaN of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore_compile.formats.arithmetic import Arithmetic, OnTensors, to_whole
from qgalore_compile.formats.symmetric import Symmetric

_EXPONENT = 0x7F800000
"""Of a float32's bits: alone they are the power of two below the number."""


class Layout(NamedTuple):
    """Bits of an exponent and a mantissa; the exponent's bias; the largest number."""

    exponent: int
    mantissa: int
    bias: int
    top: float


LAYOUTS = {
    "e4m3": Layout(4, 3, 7, 448.0),
    "e5m2": Layout(5, 2, 15, 57344.0),
    "e2m3": Layout(2, 3, 1, 7.5),
    "e3m2": Layout(3, 2, 3, 28.0),
    "e2m1": Layout(2, 1, 1, 6.0),
    "e3m0": Layout(3, 0, 3, 16.0),
}


@dataclass(frozen=True)
class Minifloat(Symmetric):
    """Sign, exponent and mantissa of one of :data:`LAYOUTS`, subnormal numbers included."""

    name: str = "e4m3"  # type: ignore[misc]  # a name of its own for each object

    @property
    def least(self) -> int:
        return 1

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.name]

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return 1 + self.layout.exponent + self.layout.mantissa

    @property
    def top(self) -> float:
        return self.layout.top

    def neighbours(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Within a sign: between the two zeros there is no step."""
        sign = 1 << (self.code_bits - 1)
        magnitude = codes & (sign - 1)
        most = self.code(OnTensors(), torch.tensor([self.top]), None).to(codes.device)
        return codes & sign | (magnitude - 1).clamp(min=0), codes & sign | (magnitude + 1).minimum(most)

    def code(self, on: Arithmetic, x: Any, noise: Any) -> Any:
        _, mantissa, bias, top = self.layout
        least_normal = 2.0 ** (1 - bias)
        size = on.minimum(on.abs(x), top)
        power = on.from_bits(on.bits(size) & _EXPONENT)
        step = on.maximum(power, least_normal) * 2.0**-mantissa
        size = on.minimum(to_whole(on, size / step, noise) * step, top)
        normal = (on.bits(size) >> (23 - mantissa)) - ((127 - bias) << mantissa)
        subnormal = on.to_int(size * 2.0 ** (mantissa + bias - 1))
        magnitude = on.where(size < least_normal, subnormal, normal)
        # of the bits: what rounds to zero from below is the negative zero, as in PyTorch's casts
        return magnitude | on.where(on.bits(x) < 0, 1 << (self.code_bits - 1), 0)

    def entry(self, on: Arithmetic, codes: Any) -> Any:
        _, mantissa, bias, _ = self.layout
        sign = 1 << (self.code_bits - 1)
        magnitude = codes & (sign - 1)
        normal = on.from_bits((magnitude << (23 - mantissa)) + ((127 - bias) << 23))
        subnormal = on.to_float(magnitude) * 2.0 ** (1 - bias - mantissa)
        size = on.where(magnitude < (1 << mantissa), subnormal, normal)
        return on.where(codes < sign, size, -size)
