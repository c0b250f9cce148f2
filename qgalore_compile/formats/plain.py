"""Floats as they are: float32, and bfloat16 with stochastic rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qgalore_compile.formats.base import Format, Part, dtype_of
from qgalore_compile.formats.rounding import round_to

_MEMORY = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Plain(Format):
    """Attributes: ``name``, "float32" or "bfloat16"."""

    name: str

    @property
    def inline(self) -> bool:
        return True

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("values", _MEMORY[self.name], "element"),)

    @property
    def bits(self) -> float:
        return 8.0 * dtype_of(self.parts[0]).itemsize

    def shape_of(self, part: Part, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        if self.name == "float32":
            return [x.to(torch.float32)]
        return [round_to(x.to(torch.float32), torch.bfloat16, noise)]

    def decode(self, stored: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return stored[0].to(dtype)

    def zeros(self, shape: Sequence[int], device: torch.device | str | None = None) -> list[Tensor]:
        return [torch.zeros(tuple(shape), dtype=dtype_of(self.parts[0]), device=device)]

    def __str__(self) -> str:
        return self.name
