"""How the scale of a group is kept: as it is, or as a power of two.

=========  ==========================  =============================================================================
name       stored                      meaning
=========  ==========================  =============================================================================
float32    float32 a group             any positive number
pow2       uint8 a group               2**(e - 127), the least that is not below the number: a shift (ZeroQuant-FP's M1)
pow2row    uint8 a group, float32 row  S / 2**e with S the row's largest: shifts within a row (ZeroQuant-FP's M2)
=========  ==========================  =============================================================================

Source: ZeroQuant-FP (arXiv 2307.09782), section 3.  "pow2row" needs the whole row before the first code, so it is for
what is encoded at once, projectors and exports; kernels read it and do not write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qgalore_compile.formats.arithmetic import Arithmetic, OnTensors, power_of_two
from qgalore_compile.formats.base import FormatError, Grouped, Part
from qgalore_compile.formats.rotation import is_size

_MOST_SHIFT = 126


@dataclass(frozen=True)
class Scaled(Grouped):
    """Groups with a scale each.

    Attributes:
        scaling: how it is kept.
        rotated: whether a group is rotated before (:mod:`~qgalore_compile.formats.rotation`).
    """

    scaling: str = "float32"
    rotated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotated and not is_size(self.width):
            raise FormatError(f"{self.name}: rotations are of a power of two of elements, not of {self.width}")

    @property
    def trains(self) -> bool:
        return self.scaling != "pow2row"

    @property
    def words(self) -> tuple[str, ...]:
        return (*([self.scaling] if self.scaling != "float32" else []), *(["rotated"] if self.rotated else []))


def parts(scaling: str, name: str) -> tuple[Part, ...]:
    """What is stored of scales."""
    if scaling == "float32":
        return (Part(name, "f32", "group"),)
    exponent = Part(f"{name}_exponent", "u8", "group")
    return (exponent,) if scaling == "pow2" else (exponent, Part(name, "f32", "row"))


def store(scaling: str, on: Arithmetic, scale: Any) -> tuple[list[Any], Any]:
    """(a value for each part, the scales that they stand for) of scales that are not negative."""
    if scaling == "float32":
        return [scale], scale
    if scaling == "pow2":
        kept = [on.bits(power_of_two(on, scale)) >> 23]
        return kept, load(scaling, on, kept)
    if not isinstance(on, OnTensors):
        raise FormatError("scales that are powers of two within a row are not written by generated kernels; use pow2")
    row = scale.amax(-2, keepdim=True)
    below = on.bits(row / on.where(scale > 0.0, scale, row + (row == 0.0)))
    shift = ((below >> 23) - 127).clamp(0, _MOST_SHIFT)  # ⌊log2⌋: the scale that is kept is not below the one given
    kept = [shift, row]
    return kept, load(scaling, on, kept)


def load(scaling: str, on: Arithmetic, stored: Sequence[Any]) -> Any:
    """The scales, from a value for each part."""
    if scaling == "float32":
        return stored[0]
    if scaling == "pow2":
        return on.from_bits(stored[0] << 23)
    return stored[1] * on.from_bits((127 - stored[0]) << 23)
