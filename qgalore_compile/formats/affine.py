"""INT8 groups, and INT4 groups packed two codes a byte: smallest and largest element get the first and last code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qgalore_compile.formats.grouping import check_grouped, from_groups, to_groups
from qgalore_compile.formats.packing import pack_int4, unpack_int4


class Int8Groups(NamedTuple):
    """``codes`` uint8 (..., n); ``scale`` and ``offset`` float32 (..., ceil(n / group_size))."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    group_size: int


class Int4Groups(NamedTuple):
    """``packed`` uint8 (..., ceil(columns / 2)), planar; ``scale``, ``offset`` float32 (..., ceil(columns / group))."""

    packed: Tensor
    scale: Tensor
    offset: Tensor
    columns: int
    group_size: int


def _round_up(fraction: Tensor, noise: Tensor) -> Tensor:
    """Whether stochastic rounding goes up, for fractions in [0, 1) and 16-bit draws k: k + 1/2 < 65536 f.

    The half makes it unbiased to 2**-17; floor(x + k / 2**16) would be biased and, above 128, would lose the low bits.
    """
    return noise.to(torch.float32) + 0.5 < fraction * 65536.0


def _affine_codes(x: Tensor, group_size: int, bits: int, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., n) in uint8, scale and offset (..., groups).  min and max get the codes 0 and 2**bits - 1."""
    check_grouped(x, group_size)
    top = 2**bits - 1
    n = x.shape[-1]
    if x.numel() == 0:
        empty = x.new_zeros((*x.shape[:-1], -(-n // group_size)), dtype=torch.float32)
        return torch.zeros_like(x, dtype=torch.uint8), empty, empty.clone()
    grouped = to_groups(x.to(torch.float32), group_size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / top
    level = (grouped - low) / torch.where(scale > 0, scale, 1.0)
    if noise is None:
        codes = level.round()
    else:
        floor = level.floor()
        codes = floor + _round_up(level - floor, to_groups(noise, group_size))
    return from_groups(codes.clamp(0, top).to(torch.uint8), n), scale.squeeze(-1), low.squeeze(-1)


def _affine_values(codes: Tensor, scale: Tensor, offset: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    n = codes.shape[-1]
    if codes.numel() == 0:
        return codes.to(dtype)
    grouped = to_groups(codes, group_size).to(torch.float32)
    return from_groups(grouped * scale.unsqueeze(-1) + offset.unsqueeze(-1), n).to(dtype)


def quantize_int8(x: Tensor, group_size: int = 256, *, noise: Tensor | None = None) -> Int8Groups:
    """Asymmetric min-max INT8 groups of ``x`` (..., n).

    Args:
        x: floating-point tensor of at least one dimension.
        group_size: elements that share a scale and an offset; 256 is Q-GaLore's.
        noise: 16 random bits an element, of x's shape (:func:`qgalore_compile.rng.random_bits`), for stochastic
            rounding; None rounds to nearest, ties to even.

    Raises:
        TypeError: x is not floating point.
        ValueError: x is 0-d, or group_size < 1.

    Source: Q-GaLore (arXiv 2407.08296) section 3.4, with an offset in place of the clamped zero point.
    """
    return Int8Groups(*_affine_codes(x, group_size, 8, noise), group_size)


def dequantize_int8(
    codes: Tensor, scale: Tensor, offset: Tensor, group_size: int = 256, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``codes * scale + offset`` by group, computed in float32, returned as ``dtype`` in the shape of ``codes``."""
    return _affine_values(codes, scale, offset, group_size, dtype)


# -- INT4, two codes a byte -----------------------------------------------------------------------------------------


def quantize_int4(x: Tensor, group_size: int = 256, *, noise: Tensor | None = None) -> Int4Groups:
    """Asymmetric min-max INT4 groups of ``x`` (..., n), packed two a byte; arguments and errors as for INT8."""
    codes, scale, offset = _affine_codes(x, group_size, 4, noise)
    return Int4Groups(pack_int4(codes), scale, offset, x.shape[-1], group_size)


def dequantize_int4(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    columns: int,
    group_size: int = 256,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Float tensor (..., columns) of what :func:`quantize_int4` returned, computed in float32."""
    return _affine_values(unpack_int4(packed, columns), scale, offset, group_size, dtype)
