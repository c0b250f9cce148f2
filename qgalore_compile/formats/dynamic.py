"""Dynamic 8-bit blocks along the flattened tensor: bitsandbytes' map, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qgalore_compile._ops import define
from qgalore_compile.formats.arithmetic import Arithmetic, nonzero
from qgalore_compile.formats.base import Format, Grouped, Part
from qgalore_compile.formats.grouping import check_float, from_groups, to_groups

BLOCK_SIZE = 256
"""Elements in a block of the dynamic 8-bit format (bitsandbytes' block-wise Adam uses the same)."""


class Dynamic8(NamedTuple):
    """``codes`` uint8, shaped like the tensor; ``absmax`` float32 (ceil(numel / 256),); ``signed``: which map."""

    codes: Tensor
    absmax: Tensor
    signed: bool


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
    check_float(x)
    codes, absmax = _quantize_dynamic8_op(x, signed)
    return Dynamic8(codes, absmax, signed)


def _quantize_dynamic8(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    count = x.numel()
    if count == 0:
        return _quantize_dynamic8_fake(x, signed)
    blocks = to_groups(x.to(torch.float32).reshape(-1), BLOCK_SIZE)
    absmax = blocks.abs().amax(-1, keepdim=True)
    codes = nearest_entry(blocks / torch.where(absmax > 0, absmax, 1.0), signed)
    return from_groups(codes.to(torch.uint8), count).reshape(x.shape), absmax.squeeze(-1)


def nearest_entry(unit: Tensor, signed: bool) -> Tensor:
    """The code of the entry nearest to each number of at most 1 in size, float32 whole numbers."""
    size = unit.abs().clamp(max=1.0)
    decade = (size.log10().ceil() + _DECADES).clamp(0.0, _DECADES)  # log10(0) = -inf lands in decade 0
    power, width = _dynamic_scale(decade, signed)
    position = (size * power + 0.8) / 0.9 * width - 0.5
    to_zero = 0.5 - 0.175 / 0.9 if signed else 0.5 - 0.125 / 0.9  # half of the smallest entry, in units of p below w
    seam = width - torch.where(decade > 0, 0.3, to_zero)
    entry = torch.where(position < seam, width - 1, position.round().maximum(width).minimum(2 * width - 1))
    entry = torch.where((decade == _DECADES) & (position >= 2 * width - 0.75), 2 * width, entry)
    return torch.where(unit < 0, 127 - entry.clamp(max=127), 127 + entry) if signed else entry - 1


def _quantize_dynamic8_fake(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, x.new_empty((x.numel() + BLOCK_SIZE - 1) // BLOCK_SIZE, dtype=torch.float32)


_quantize_dynamic8_op = define(
    "quantize_dynamic8(Tensor x, bool signed) -> (Tensor, Tensor)", _quantize_dynamic8, _quantize_dynamic8_fake
)


def dequantize_dynamic8(codes: Tensor, absmax: Tensor, signed: bool, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Float tensor of the shape of ``codes``: map entry times the block's absmax, computed in float32."""
    values: Tensor = _dequantize_dynamic8_op(codes, absmax, signed)
    return values.to(dtype)


def _dequantize_dynamic8(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    if codes.numel() == 0:
        return _dequantize_dynamic8_fake(codes, absmax, signed)
    entries = dynamic_map(signed, codes.device)  # 256 closed forms and a look-up, rather than a closed form an element
    values = entries.index_select(0, codes.reshape(-1).to(torch.int32))
    return from_groups(to_groups(values, BLOCK_SIZE) * absmax.unsqueeze(-1), codes.numel()).reshape(codes.shape)


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


@dataclass(frozen=True)
class Dynamic8Blocks(Grouped):
    """The dynamic map as a format.  Attributes: ``signed``, which map."""

    width: int = BLOCK_SIZE
    axis: str = "flat"
    signed: bool = True

    name: ClassVar[str] = "dynamic8"
    default_axis: ClassVar[str] = "flat"
    rounds: ClassVar[bool] = False

    @property
    def inline(self) -> bool:
        """bitsandbytes' blocks have operators of their own."""
        return self.width == BLOCK_SIZE and self.axis == "flat"

    @property
    def least(self) -> int:
        return 128 if self.signed else 1

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("codes", "u8", "element"), Part("absmax", "f32", "group")

    def store(self, on: Arithmetic, x: Any, noise: Any) -> list[Any]:
        absmax = on.group_max(on.abs(x))
        return [on.dynamic8_code(x, nonzero(on, absmax), self.signed), absmax]

    def load(self, on: Arithmetic, stored: Sequence[Any]) -> Any:
        return on.dynamic8_value(stored[0], self.signed) * stored[1]

    def encode(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        return list(quantize_dynamic8(x, signed=self.signed)[:2]) if self.inline else super().encode(x)

    def decode(self, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.inline:
            return super().decode(stored, shape, dtype)
        return dequantize_dynamic8(stored[0], stored[1], self.signed, dtype=dtype)

    @property
    def words(self) -> tuple[str, ...]:
        return () if self.signed else ("unsigned",)

    def unsigned(self) -> Format:
        return replace(self, signed=False)
