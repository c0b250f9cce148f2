"""Dynamic blocks in four bits: bitsandbytes' map of three decades, for Adam's moments.

Signed, the map is ``create_dynamic_map(True, 3, 4)``: 0, 1, and 1, 2 and 4 midpoints of equal intervals in the decades
below 1, with either sign (there is no -1).  For the second moment, unsigned, there are 2, 4 and 8 of them, and no zero:
in its place stands the lower end of the lowest decade, 0.001, since an update divides by what is stored.

Sources: 8-bit optimizers (arXiv 2110.02861) for the map; 4-bit optimizers (arXiv 2309.01507) for blocks of 128, and for
leaving the zero out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from qgalore_compile.formats.codebook import MomentCodebook

_DECADES = 3


@cache
def entries(signed: bool) -> tuple[float, ...]:
    """The map in ascending order."""
    found = [1.0]
    for decade in range(_DECADES):
        count = 2**decade if signed else 2 ** (decade + 1)
        power = 10.0 ** (decade + 1 - _DECADES)
        found += [power * (0.1 + 0.9 * (place + 0.5) / count) for place in range(count)]
    if signed:
        return tuple(sorted([*found, 0.0, *(-each for each in found if each < 1.0)]))
    return tuple(sorted([*found, 10.0**-_DECADES]))


@dataclass(frozen=True)
class Dynamic4(MomentCodebook):
    """bitsandbytes' map, cut to three decades."""

    name: ClassVar[str] = "dynamic4"

    @property
    def entries(self) -> Sequence[float]:
        return entries(self.signed)
