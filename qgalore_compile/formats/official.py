"""The published quantiser, kept for parity tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
