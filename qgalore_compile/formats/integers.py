"""Integers of eight, six and four bits: a group's smallest and largest element get the first and the last code.

A group keeps ``scale`` s = (max - min) / (2**bits - 1) and ``offset`` = min.  A scale that is a power of two makes the
steps of a group a shift of its row's or of 1, as training in integers has it (:mod:`~qgalore_compile.formats.scaling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qgalore_compile.formats import affine, scaling
from qgalore_compile.formats.arithmetic import Arithmetic, nonzero, to_whole
from qgalore_compile.formats.base import FormatError, Part
from qgalore_compile.formats.symmetric import code_parts, joined, split

_CODE_BITS = {"int8": 8, "int6": 6, "int4": 4}


@dataclass(frozen=True)
class Integers(scaling.Scaled):
    """Steps between a group's smallest and largest element.

    Attributes:
        name: "int8", "int6" or "int4".
        planar: of int4, low nibbles hold the first half of a row: for projectors, which kernels only read.
    """

    name: str = "int8"  # type: ignore[misc]  # a name of its own for each object
    planar: bool = False

    def __post_init__(self) -> None:
        if self.planar and (self.name != "int4" or self.axis != "rows" or self.width < 1):
            raise FormatError(f"{self.name}: only int4 in rows is planar, in groups of at least 1 element")
        super().__post_init__()

    @property
    def inline(self) -> bool:
        """Q-GaLore's own two are plain PyTorch in a graph: below a backward of its own, AOTAutograd computes decoded
        weights again rather than keep them, for operations that it knows are cheap."""
        plain = self.axis == "rows" and self.scaling == "float32" and not self.rotated
        return plain and (self.name == "int8" or self.planar)

    @property
    def trains(self) -> bool:
        return super().trains and not self.planar

    @property
    def parts(self) -> tuple[Part, ...]:
        codes = (Part("codes", "u4", "element"),) if self.planar else code_parts(_CODE_BITS[self.name])
        return (*codes, *scaling.parts(self.scaling, "scale"), Part("offset", "f32", "group"))

    def store(self, on: Arithmetic, x: Any, noise: Any) -> list[Any]:
        x = on.rotate(x, False) if self.rotated else x
        bits = _CODE_BITS[self.name]
        low, high = on.group_min(x), on.group_max(x)
        kept, scale = scaling.store(self.scaling, on, (high - low) / (2.0**bits - 1))
        level = to_whole(on, (x - low) / nonzero(on, scale), noise)
        codes = on.to_int(on.minimum(on.maximum(level, 0.0), 2.0**bits - 1))
        return [*split(bits, codes), *kept, low]

    def load(self, on: Arithmetic, stored: Sequence[Any]) -> Any:
        count = 1 if self.planar else len(code_parts(_CODE_BITS[self.name]))
        scale = scaling.load(self.scaling, on, stored[count:-1])
        x = on.to_float(joined(stored[:count])) * scale + stored[-1]
        return on.rotate(x, True) if self.rotated else x

    def encode(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        if self.inline:
            quantize = affine.quantize_int4 if self.planar else affine.quantize_int8
            return list(quantize(x, self.width, noise=noise)[:3])
        return super().encode(x, noise)

    def decode(self, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.inline:
            return super().decode(stored, shape, dtype)
        codes, scale, offset = stored
        if self.planar:
            return affine.dequantize_int4(codes, scale, offset, shape[-1], self.width, dtype=dtype)
        return affine.dequantize_int8(codes, scale, offset, self.width, dtype=dtype)

    @property
    def words(self) -> tuple[str, ...]:
        return (*super().words, *(["planar"] if self.planar else []))
