"""The published quantiser, kept for parity tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qgalore_compile.formats.arithmetic import Arithmetic
from qgalore_compile.formats.base import Grouped, Part
from qgalore_compile.formats.grouping import check_grouped, from_groups, to_groups


class OfficialGroups(NamedTuple):
    """``codes`` uint8 (..., n), one a byte at any width; ``scale``, ``zero`` float32 (..., ceil(n / group_size))."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int


def quantize_official(x: Tensor, group_size: int = 256, *, bits: int) -> OfficialGroups:
    """Q-GaLore's published quantiser: integer zero point clamped to 0..2**bits - 1, range at least 1e-5.

    Equal to the published code wherever ``group_size`` divides the row.  A group that does not straddle zero
    saturates: for parity tests, not for training.  Source: q_galore_torch/utils/quantization.py.
    """
    check_grouped(x, group_size)
    top = 2**bits - 1
    grouped = to_groups(x.to(torch.float32), group_size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / top
    zero = (-(low / scale).round()).clamp(0, top)
    codes = ((grouped / scale).round() + zero).clamp(0, top).to(torch.uint8)
    return OfficialGroups(from_groups(codes, x.shape[-1]), scale.squeeze(-1), zero.squeeze(-1), group_size)


def dequantize_official(
    codes: Tensor, scale: Tensor, zero: Tensor, group_size: int = 256, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``(codes - zero) * scale`` by group, computed in float32."""
    grouped = to_groups(codes, group_size).to(torch.float32)
    return from_groups((grouped - zero.unsqueeze(-1)) * scale.unsqueeze(-1), codes.shape[-1]).to(dtype)


@dataclass(frozen=True)
class Official(Grouped):
    """The published quantiser as a format, to nearest alone.  Attributes: ``name``, "official8" or "official4"."""

    name: str = "official8"  # type: ignore[misc]  # a name of its own for each object

    rounds: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("codes", "u8", "element"), Part("scale", "f32", "group"), Part("zero", "f32", "group")

    def store(self, on: Arithmetic, x: Any, noise: Any) -> list[Any]:
        top = 2.0 ** int(self.name[-1]) - 1
        low, high = on.group_min(x), on.group_max(x)
        scale = on.maximum(high - low, 1e-5) / top
        zero = on.minimum(on.maximum(-on.round(low / scale), 0.0), top)
        codes = on.minimum(on.maximum(on.round(x / scale) + zero, 0.0), top)
        return [on.to_int(codes), scale, zero]

    def load(self, on: Arithmetic, stored: Sequence[Any]) -> Any:
        codes, scale, zero = stored
        return (on.to_float(codes) - zero) * scale
