"""Sixteen entries of any kind, four bits a code: NF4 and the dynamic maps of four bits are tables for this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from qgalore_compile.formats.arithmetic import Arithmetic, goes_up
from qgalore_compile.formats.base import Format
from qgalore_compile.formats.symmetric import Symmetric


@dataclass(frozen=True)
class Codebook(Symmetric):
    """Codes 0 to 15 are the places of ``entries``, which ascend and end with 1.0."""

    code_bits: ClassVar[int] = 4

    @property
    def entries(self) -> Sequence[float]:
        """Sixteen numbers within ±1."""
        raise NotImplementedError

    @property
    def top(self) -> float:
        return 1.0

    def code(self, on: Arithmetic, x: Any, noise: Any) -> Any:
        entries = self.entries
        if noise is None:
            midpoints = [(low + high) / 2 for low, high in pairwise(entries)]
            return _above(on, x, midpoints)
        x = on.maximum(on.minimum(x, entries[-1]), entries[0])
        below = _above(on, x, entries[1:-1], inclusive=True)  # the last interval ends with the last entry
        low = self.entry(on, below)
        high = _select(on, below, [*entries[1:], entries[-1]])
        return below + on.where(goes_up(on, (x - low) / (high - low), noise), 1, 0)

    def entry(self, on: Arithmetic, codes: Any) -> Any:
        return _select(on, codes, self.entries)


@dataclass(frozen=True)
class MomentCodebook(Codebook):
    """A table for Adam's m and another for √v, which has no sign; groups are of the flattened tensor.

    Attributes:
        signed: whether it is m's.
    """

    axis: str = "flat"
    signed: bool = True

    scale_name: ClassVar[str] = "absmax"
    default_axis: ClassVar[str] = "flat"

    @property
    def words(self) -> tuple[str, ...]:
        return (*super().words, *(() if self.signed else ("unsigned",)))

    def unsigned(self) -> Format:
        return replace(self, signed=False)


def _above(on: Arithmetic, x: Any, bounds: Sequence[float], inclusive: bool = False) -> Any:
    """How many of the bounds x lies above."""
    found = [on.where(x >= bound if inclusive else x > bound, 1, 0) for bound in bounds]
    while len(found) > 1:  # in pairs: the sums of a chain would wait for each other
        pairs = zip(found[::2], found[1::2], strict=False)
        found = [*(one + other for one, other in pairs), *(found[-1:] if len(found) % 2 else [])]
    return found[0]


def _select(on: Arithmetic, codes: Any, entries: Sequence[float]) -> Any:
    """The entry of each code: one of two by its lowest bit, one of those by the next, and so on.

    Not a look-up: a gather of 16 elements took 45 cycles on a Xeon (Sapphire Rapids), this 19 operations on vectors.
    """
    found: list[Any] = list(entries)
    bit = 1
    while len(found) > 1:
        odd = (codes & bit) > 0
        found = [on.where(odd, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        bit <<= 1
    return found[0]
