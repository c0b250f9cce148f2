"""NF4: the sixteen quantiles of a normal distribution, scaled to its block's largest magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qgalore_compile.formats.codebook import Codebook

ENTRIES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA (arXiv 2305.14314), appendix E."""


@dataclass(frozen=True)
class NF4(Codebook):
    """bitsandbytes' NF4, code for code; it packs the other nibble first."""

    name: ClassVar[str] = "nf4"
    scale_name: ClassVar[str] = "absmax"

    @property
    def least(self) -> int:
        return 8

    @property
    def entries(self) -> Sequence[float]:
        return ENTRIES
