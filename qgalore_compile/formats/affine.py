"""The storage formats: INT8 groups, packed INT4 groups and dynamic 8-bit blocks, as pure functions.

====================  ======================  =================================  =======================
format                used for                code of x                          grouped along
====================  ======================  =================================  =======================
INT8 groups           weights                 round((x - min) / s), 0..255       the last dimension
INT4 groups, packed   projectors              round((x - min) / s), 0..15        the last dimension
dynamic 8-bit blocks  Adam's two moments      nearest entry of a fixed map       the flattened tensor
official groups       parity with Q-GaLore    clamp(round(x / s) + zero)         the last dimension
====================  ======================  =================================  =======================

A *group* is ``group_size`` neighbours of one row; a row that it does not divide ends in a short group, so no shape is
refused.  Affine groups store ``scale`` s = (max - min) / (2**bits - 1) and ``offset`` = min, both float32.  The
published Q-GaLore code stores an integer zero point clamped to 0..2**bits - 1 instead, which saturates every group
that does not straddle zero; it is kept as :func:`quantize_official` so that parity can be tested.  The dynamic map
needs no official variant: it is bitsandbytes' map, entry for entry.

All arithmetic is float32, whatever the input's dtype.  Affine formats need max - min within float32.  Nothing here
looks at values on the host, so every function traces into one graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qgalore_compile._ops import define

BLOCK_SIZE = 256
"""Elements in a block of the dynamic 8-bit format (bitsandbytes' block-wise Adam uses the same)."""


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


class Dynamic8(NamedTuple):
    """``codes`` uint8, shaped like the tensor; ``absmax`` float32 (ceil(numel / 256),); ``signed``: which map."""

    codes: Tensor
    absmax: Tensor
    signed: bool


class OfficialGroups(NamedTuple):
    """``codes`` uint8 (..., n), one a byte at any width; ``scale``, ``zero`` float32 (..., ceil(n / group_size))."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int


# -- groups along the last dimension --------------------------------------------------------------------------------


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"only floating-point tensors can be quantised, got {x.dtype}; convert it with .float() first")


def _check(x: Tensor, group_size: int) -> None:
    _check_float(x)
    if x.dim() == 0:
        raise ValueError("a 0-d tensor has no row to group; pass x.reshape(1)")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")


def _to_groups(x: Tensor, group_size: int) -> Tensor:
    """(..., n) → (..., groups, width).  A short last group is filled up with its last element: same min, same max."""
    *leading, n = x.shape
    width = max(1, min(group_size, n))
    groups = -(-n // width)
    missing = groups * width - n
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*leading, missing)], dim=-1)
    return x.reshape(*leading, groups, width)


def _from_groups(x: Tensor, n: int) -> Tensor:
    """The inverse of :func:`_to_groups`: (..., groups, width) → (..., n)."""
    *leading, groups, width = x.shape
    flat = x.reshape(*leading, groups * width)
    return flat if groups * width == n else _drop_tail_op(flat, n)


# An op, not a slice: Inductor (torch 2.13) would compute a row of n elements with the scale of element j at j // width,
# split the loop into n // width runs of width (CppScheduling.try_loop_split, for widths above 8), and never compute
# the short group: weights of (512, 1376) in groups of 256 held garbage in their last 96 columns.
_drop_tail_op = define(
    "drop_tail(Tensor x, SymInt n) -> Tensor",
    lambda x, n: x[..., :n].contiguous(),
    lambda x, n: x.new_empty((*x.shape[:-1], n)),
)


def _round_up(fraction: Tensor, noise: Tensor) -> Tensor:
    """Whether stochastic rounding goes up, for fractions in [0, 1) and 16-bit draws k: k + 1/2 < 65536 f.

    The half makes it unbiased to 2**-17; floor(x + k / 2**16) would be biased and, above 128, would lose the low bits.
    """
    return noise.to(torch.float32) + 0.5 < fraction * 65536.0


def _affine_codes(x: Tensor, group_size: int, bits: int, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., n) in uint8, scale and offset (..., groups).  min and max get the codes 0 and 2**bits - 1."""
    _check(x, group_size)
    top = 2**bits - 1
    n = x.shape[-1]
    if x.numel() == 0:
        empty = x.new_zeros((*x.shape[:-1], -(-n // group_size)), dtype=torch.float32)
        return torch.zeros_like(x, dtype=torch.uint8), empty, empty.clone()
    grouped = _to_groups(x.to(torch.float32), group_size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / top
    level = (grouped - low) / torch.where(scale > 0, scale, 1.0)
    if noise is None:
        codes = level.round()
    else:
        floor = level.floor()
        codes = floor + _round_up(level - floor, _to_groups(noise, group_size))
    return _from_groups(codes.clamp(0, top).to(torch.uint8), n), scale.squeeze(-1), low.squeeze(-1)


def _affine_values(codes: Tensor, scale: Tensor, offset: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    n = codes.shape[-1]
    if codes.numel() == 0:
        return codes.to(dtype)
    grouped = _to_groups(codes, group_size).to(torch.float32)
    return _from_groups(grouped * scale.unsqueeze(-1) + offset.unsqueeze(-1), n).to(dtype)


# -- INT8 -----------------------------------------------------------------------------------------------------------


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


def pack_int4(codes: Tensor) -> Tensor:
    """(..., n) codes below 16 → (..., ceil(n / 2)) bytes, planar: low nibbles hold the first half of the row.

    Planar, not interleaved: unpacking is then two contiguous stores, which vectorise in generated CPU code.
    """
    half = -(-codes.shape[-1] // 2)
    low, high = codes[..., :half], codes[..., half:]
    if high.shape[-1] < half:  # an odd row: the last high nibble stays empty
        high = torch.nn.functional.pad(high, (0, half - high.shape[-1]))
    return low | (high << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_int4`: (..., ceil(columns / 2)) bytes → (..., columns) codes in uint8."""
    codes = torch.cat([packed & 15, packed >> 4], dim=-1)
    return codes if codes.shape[-1] == columns else codes[..., :columns]


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


# -- the published formula ------------------------------------------------------------------------------------------


def quantize_official(x: Tensor, group_size: int = 256, *, bits: int) -> OfficialGroups:
    """Q-GaLore's published quantiser: integer zero point clamped to 0..2**bits - 1, range at least 1e-5.

    Equal to the published code wherever ``group_size`` divides the row.  A group that does not straddle zero
    saturates: for parity tests, not for training.  Source: q_galore_torch/utils/quantization.py.
    """
    _check(x, group_size)
    top = 2**bits - 1
    grouped = _to_groups(x.to(torch.float32), group_size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / top
    zero = (-(low / scale).round()).clamp(0, top)
    codes = ((grouped / scale).round() + zero).clamp(0, top).to(torch.uint8)
    return OfficialGroups(_from_groups(codes, x.shape[-1]), scale.squeeze(-1), zero.squeeze(-1), group_size)


def dequantize_official(
    codes: Tensor, scale: Tensor, zero: Tensor, group_size: int = 256, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``(codes - zero) * scale`` by group, computed in float32."""
    grouped = _to_groups(codes, group_size).to(torch.float32)
    return _from_groups((grouped - zero.unsqueeze(-1)) * scale.unsqueeze(-1), codes.shape[-1]).to(dtype)


# -- dynamic 8-bit blocks -------------------------------------------------------------------------------------------
#
# bitsandbytes' dynamic map has seven decades below 1.  Decade e = 0..6 covers 10**(e-7)..10**(e-6) with w midpoints of
# equal intervals, w = 2**e where a sign is stored and 2**(e+1) where not; 0 and 1.0 complete the 256 entries, and the
# signed map has no -1.0.  Numbering an entry by its position p = w + k (k = 0..w-1 in the decade) makes positions run
# on from decade to decade, and in both directions the map is linear inside one:
#
#     value = 10**(e-6) * (0.9 * (p + 1/2) / w - 0.8)            code = 127 ± p (signed), p - 1 (unsigned)
#
# So the nearest entry is a rounding, but for three seams: between two decades (w - 0.3 in units of p), between the
# smallest entry and 0, and between the largest entry and 1.0 (2w - 0.75).  A decade misjudged by rounding in log10 is
# harmless: at its edge both neighbours give the same p.

_DECADES = 6.0  # the largest e


def _dynamic_scale(decade: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """10**(6 - e) and w of each element's decade e, float32."""
    return torch.pow(10.0, _DECADES - decade), torch.exp2(decade if signed else decade + 1)


def quantize_dynamic8(x: Tensor, *, signed: bool) -> Dynamic8:
    """``x`` of any shape in blocks of 256 along the flattened tensor: absmax scale, nearest entry of the dynamic map.

    Args:
        x: floating-point tensor; where ``signed`` is False, no element below zero.
        signed: the signed map (first moments) or the unsigned one (second moments).

    Raises:
        TypeError: x is not floating point.

    Source: bitsandbytes' create_dynamic_map(signed, max_exponent_bits=7, total_bits=8), in closed form: no search.
    """
    _check_float(x)
    codes, absmax = _quantize_dynamic8_op(x, signed)
    return Dynamic8(codes, absmax, signed)


def _quantize_dynamic8(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    count = x.numel()
    if count == 0:
        return _quantize_dynamic8_fake(x, signed)
    blocks = _to_groups(x.to(torch.float32).reshape(-1), BLOCK_SIZE)
    absmax = blocks.abs().amax(-1, keepdim=True)
    unit = blocks / torch.where(absmax > 0, absmax, 1.0)
    size = unit.abs().clamp(max=1.0)
    decade = (size.log10().ceil() + _DECADES).clamp(0.0, _DECADES)  # log10(0) = -inf lands in decade 0
    power, width = _dynamic_scale(decade, signed)
    position = (size * power + 0.8) / 0.9 * width - 0.5
    to_zero = 0.5 - 0.175 / 0.9 if signed else 0.5 - 0.125 / 0.9  # half of the smallest entry, in units of p below w
    seam = width - torch.where(decade > 0, 0.3, to_zero)
    entry = torch.where(position < seam, width - 1, position.round().maximum(width).minimum(2 * width - 1))
    entry = torch.where((decade == _DECADES) & (position >= 2 * width - 0.75), 2 * width, entry)
    codes = torch.where(unit < 0, 127 - entry.clamp(max=127), 127 + entry) if signed else entry - 1
    return _from_groups(codes.to(torch.uint8), count).reshape(x.shape), absmax.squeeze(-1)


def _quantize_dynamic8_fake(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, x.new_empty((x.numel() + BLOCK_SIZE - 1) // BLOCK_SIZE, dtype=torch.float32)


_quantize_dynamic8_op = define(
    "quantize_dynamic8(Tensor x, bool signed) -> (Tensor, Tensor)", _quantize_dynamic8, _quantize_dynamic8_fake
)


def dequantize_dynamic8(codes: Tensor, absmax: Tensor, signed: bool, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Float tensor of the shape of ``codes``: map entry times the block's absmax, computed in float32."""
    return _dequantize_dynamic8_op(codes, absmax, signed).to(dtype)  # type: ignore[no-any-return]


def _dequantize_dynamic8(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    if codes.numel() == 0:
        return _dequantize_dynamic8_fake(codes, absmax, signed)
    entries = dynamic_map(signed, codes.device)  # 256 closed forms and a look-up, rather than a closed form an element
    values = entries.index_select(0, codes.reshape(-1).to(torch.int32))
    return _from_groups(_to_groups(values, BLOCK_SIZE) * absmax.unsqueeze(-1), codes.numel()).reshape(codes.shape)


def _dequantize_dynamic8_fake(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


_dequantize_dynamic8_op = define(
    "dequantize_dynamic8(Tensor codes, Tensor absmax, bool signed) -> Tensor",
    _dequantize_dynamic8,
    _dequantize_dynamic8_fake,
)


def dynamic_map(signed: bool, device: torch.device | None = None) -> Tensor:
    """The 256 entries of the dynamic map in ascending order, float32: entry ``code`` is what that code means."""
    code = torch.arange(256, dtype=torch.float32, device=device)
    entry = (code - 127).abs() if signed else code + 1
    # + 1/2 keeps log2 away from whole numbers, where a vectorised log2 may fall on either side
    decade = ((entry + 0.5).log2().floor() - (0 if signed else 1)).clamp(0.0, _DECADES)
    power, width = _dynamic_scale(decade, signed)
    size = (0.9 * (entry + 0.5) / width - 0.8) / power
    largest = 128 if signed else 256
    size = torch.where(entry == largest, 1.0, torch.where(entry == (0 if signed else 1), 0.0, size))
    return torch.where(code < 127, -size, size) if signed else size
