"""Four bits for Adam's moments: sixteen entries each, placed by the error of the update that is divided from them.

Signed, for m, the entries are ±(k/8)² and 0 (there is no -1).  Unsigned, for √v, they are 10^(-1.5 (1 - k/15)²), dense
near a block's largest element, where most of a block lies, and without a zero, since an update divides by them.

Source: chosen here among 60 pairs of maps by the error of Adam's update after hundreds of steps
(``benchmarks/moments_rounding.py``); it is below that of the dynamic map (:mod:`.dynamic4`) and below that of v in
sixteen equal steps, as torchao's 4-bit optimizer has it.  Blocks of 128: 4-bit optimizers (arXiv 2309.01507).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qgalore_compile.formats.codebook import MomentCodebook

_SQUARES = tuple((k / 8) ** 2 for k in range(9))
SIGNED = (*(-each for each in _SQUARES[7:0:-1]), *_SQUARES)
UNSIGNED = tuple(10 ** (-1.5 * (1 - k / 15) ** 2) for k in range(16))


@dataclass(frozen=True)
class Moment4(MomentCodebook):
    """Squares for m, and a table without a zero for √v."""

    name: ClassVar[str] = "moment4"

    @property
    def entries(self) -> Sequence[float]:
        return SIGNED if self.signed else UNSIGNED
