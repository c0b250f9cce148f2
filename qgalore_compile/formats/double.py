"""Scales that are quantised once more: a wrapper of formats with one scale a group.

As in QLoRA (arXiv 2305.14314), section 3, and bitsandbytes: from all scales their mean is taken, and what is left is
kept in dynamic 8-bit blocks of 256.  Codes are made with the scales as they were before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qgalore_compile.formats.base import Format, FormatError, Part
from qgalore_compile.formats.dynamic import Dynamic8Blocks
from qgalore_compile.formats.operators import decode, encode
from qgalore_compile.formats.symmetric import Symmetric

_SCALES = Dynamic8Blocks()


@dataclass(frozen=True)
class Double(Format):
    """Attributes: ``inner``, the format of the codes."""

    inner: Symmetric

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Symmetric) or self.inner.scaling != "float32" or self.inner.axis != "rows":
            raise FormatError(f"{self.inner}: double quantisation is of rows with one float32 scale a group")
        _ = self.inner.text  # Dynamo reads what is there

    @property
    def grouped(self) -> Symmetric:
        return self.inner

    @property
    def inline(self) -> bool:
        """Two nodes in a graph: codes, and scales."""
        return True

    @property
    def parts(self) -> tuple[Part, ...]:
        name = self.inner.scale_name
        codes = self.inner.parts[:-1]
        return (*codes, Part(name, "u8", "group"), Part(f"{name}_absmax", "f32", "block"),
                Part(f"{name}_mean", "f32", "scalar"))  # fmt: skip

    @property
    def bits(self) -> float:
        return self.inner.bits - (32 - _SCALES.bits) / self.inner.width

    def shape_of(self, part: Part, shape: Sequence[int]) -> tuple[int, ...]:
        scales = self.inner.shape_of(self.inner.parts[-1], shape)
        if part.extent == "scalar":
            return ()
        if part.extent == "block":
            return _SCALES.shape_of(_SCALES.parts[1], scales)
        return scales if part.extent == "group" else self.inner.shape_of(part, shape)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        *codes, scale = encode(x, self.inner, noise)
        mean = scale.mean() if scale.numel() else scale.new_zeros(())
        return [*codes, *_SCALES.encode(scale - mean), mean]

    def decode(self, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        *codes, scale, absmax, mean = stored
        return decode([*codes, _SCALES.decode([scale, absmax], scale.shape) + mean], shape, self.inner, dtype)

    def flat(self) -> Format:
        raise FormatError(f"{self}: double quantisation is of rows, and moments have groups along the flattened tensor")

    def __str__(self) -> str:
        return f"{self.inner}+double"
