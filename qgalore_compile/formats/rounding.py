"""Stochastic rounding of float32 to bfloat16 and float16: what keeps a weight moving by less than its own step.

A number between two neighbours of the shorter format becomes the upper one with the probability of its place between
them, so that the mean of what is stored is the number; to nearest, a norm's weight of 1 stays 1 under any update below
2**-8.  Both formats take 16 random bits an element (:func:`qgalore_compile.rng.random_bits`):

- bfloat16 is the upper half of a float32.  The bits that are cut are as many as those that are drawn, so adding the
  draw before the cut carries with exactly the right probability, below the normal numbers too: no bias at all.
- float16 has neighbours 2**(e - 10) apart, and 2**-24 below 2**-14.  A normal number leaves 13 bits over, and goes up
  where draw + 1/2 < 65536 × fraction: no bias.  Below the normal numbers more bits are left over than are drawn: a
  bias of 2**-17 steps at most, 2**-41.

A finite number stays finite: beyond the largest one of the format it becomes that.  NaN and infinities stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore_compile._ops import define

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that there is stochastic rounding to."""

CUT = -(1 << 16)
"""Of a float32's bits, as an int32: those that bfloat16 has."""
EXPONENT = 0x7F800000
"""Of a float32's bits: alone they are the power of two below the number."""
LEAST_NORMAL = 2.0**-14
STEP = 2.0**-10
"""Of float16: the least normal number, and the distance of neighbours of 1."""


def _stochastic_round(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    inside = x.clamp(-most, most)
    if dtype == torch.bfloat16:
        rounded = ((inside.view(torch.int32) + noise) & CUT).view(torch.float32)
    else:
        power = (inside.view(torch.int32) & EXPONENT).view(torch.float32)
        step = power.clamp(min=LEAST_NORMAL) * STEP
        level = inside / step
        floor = level.floor()
        rounded = (floor + (noise.to(torch.float32) + 0.5 < (level - floor) * 65536.0)) * step
    return torch.where(x.abs() < torch.inf, rounded, x).to(dtype).contiguous()


_stochastic_round_op = define(
    "stochastic_round(Tensor x, Tensor noise, ScalarType dtype) -> Tensor",
    _stochastic_round,
    lambda x, noise, dtype: x.new_empty(x.shape, dtype=dtype),
)


def round_to(x: Tensor, dtype: torch.dtype, noise: Tensor | None = None) -> Tensor:
    """``x`` in another floating-point dtype.

    Args:
        x: float32 of any shape; with ``noise`` None any floating-point tensor.
        dtype: bfloat16 or float16; with ``noise`` None any.
        noise: 16 random bits an element, int32 of x's shape, for stochastic rounding; None rounds to nearest, ties to
            even.

    Raises:
        TypeError: noise for another dtype, or an ``x`` that is not float32.
        ValueError: noise of another shape.
    """
    if noise is None:
        return x.to(dtype)
    if dtype not in DTYPES or x.dtype != torch.float32:
        known = " and ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise TypeError(f"stochastic rounding is of float32 to {known}, not of {x.dtype} to {dtype}; pass noise=None")
    if noise.shape != x.shape:
        raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")
    return _stochastic_round_op(x, noise, dtype)  # type: ignore[no-any-return]
