"""Formats whose elements are a code times what their group shares, its largest magnitude: the common half of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qgalore_compile.formats import scaling
from qgalore_compile.formats.arithmetic import Arithmetic, nonzero
from qgalore_compile.formats.base import Part


@dataclass(frozen=True)
class Symmetric(scaling.Scaled):
    """Codes of x / s with s = max |x| / ``top``, of a group."""

    code_bits: ClassVar[int]
    scale_name: ClassVar[str] = "scale"

    @property
    @abstractmethod
    def top(self) -> float:
        """The largest entry."""

    @abstractmethod
    def code(self, on: Arithmetic, x: Any, noise: Any) -> Any:
        """The code of numbers within ±top; those beyond by a rounding are taken for it."""

    @abstractmethod
    def entry(self, on: Arithmetic, codes: Any) -> Any:
        """What a code stands for."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*code_parts(self.code_bits), *scaling.parts(self.scaling, self.scale_name))

    def store(self, on: Arithmetic, x: Any, noise: Any) -> list[Any]:
        x = on.rotate(x, False) if self.rotated else x
        wanted = on.group_max(on.abs(x))
        wanted = wanted if self.top == 1.0 else wanted / self.top
        kept, scale = scaling.store(self.scaling, on, wanted)
        codes = self.code(on, x / nonzero(on, scale), noise)
        return [*split(self.code_bits, codes), *kept]

    def load(self, on: Arithmetic, stored: Sequence[Any]) -> Any:
        count = len(code_parts(self.code_bits))
        scale = scaling.load(self.scaling, on, stored[count:])
        x = self.entry(on, joined(stored[:count])) * scale
        return on.rotate(x, True) if self.rotated else x


def code_parts(bits: int) -> tuple[Part, ...]:
    """What is stored of codes."""
    if bits == 6:
        return (Part("codes", "p4", "element"), Part("high", "p2", "element"))
    return (Part("codes", {4: "p4", 8: "u8"}[bits], "element"),)


def split(bits: int, codes: Any) -> list[Any]:
    """A value for each of those."""
    return [codes & 15, codes >> 4] if bits == 6 else [codes]


def joined(stored: Sequence[Any]) -> Any:
    """Codes, from a value for each of those."""
    return stored[0] if len(stored) == 1 else stored[0] | (stored[1] << 4)
