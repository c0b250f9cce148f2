"""Adam's two moments as they are stored, and what becomes of them when a projector changes.

**Stored.**  In 32 bits m and v as they are.  In fewer m and **√v**, in 8 bits each in the dynamic blocks of
:mod:`~qgalore_compile.formats`: v spans twice m's decades, and where it rounded to 0 and m did not, N = m̂ / (0 + ε).
Two things keep √v from falling behind m, where blocks have their own absolute maxima and m forgets sooner than √v:

*   Its least code is 1, not 0: √v is at least 3.25e-7 of its block's maximum.  An element below that is taken for
    larger than it is, and moves less than it might.
*   κ |m| ≤ √v, with the largest κ for which that passes from one step to the next (Cauchy and Schwarz):

        (β1 m + (1 - β1) g)² ≤ (β1² / (β2 κ²) + (1 - β1)² / (1 - β2)) (β2 v + (1 - β2) g²)
        κ² = (1 - β2) (1 - β1² / β2) / (1 - β1)²                          the first factor is then 1 / κ² again

    Float moments obey it by themselves, whatever the gradients; coded ones are held to it, by √v ← max(√v, κ |m|)
    before √v is used and stored.  So no element moves by more than √(1 - β2ᵗ) / ((1 - β1ᵗ) κ) learning rates in step
    t, which at the default betas never exceeds 1 / κ = 7.27 (:func:`least_root`).  Where β1² ≥ β2 there is no such
    bound, not in float32 either: κ = 0, and the least code alone remains.

Largest |N| of 200 steps on gradients spread over nine decades in a block (``test_moments_bounded.py``), betas
0.9 and 0.999, gradients in every, every second and every third step, and 10⁶ times as large in every fiftieth:

==================  =======  =======  =======  =======
stored              every    second   third    bursts
==================  =======  =======  =======  =======
float32             1.0      1.1      1.1      1.2
v                   4.8e5    m̂ / ε    m̂ / ε    m̂ / ε
√v                  7.9e3    m̂ / ε    m̂ / ε    m̂ / ε
√v, least code 1    5.4      3.6      3.2      3.0
√v, κ alone         3.0      3.1      3.1      3.1
both                3.0      2.9      2.7      2.5
==================  =======  =======  =======  =======

A step rounds them stochastically in formats with groups that take draws, all but dynamic 8-bit blocks: to nearest, √v
in four bits falls with its group's maximum alone, since a step takes 0.05 % off it and codes lie 12 % apart or more.

**When a projector changes** they are coordinates in the old basis.  With C = P_newᵀ P_old on the left side
(P_new P_oldᵀ on the right, where everything below is transposed), t the updates that the moments hold,
m̂ = m / (1 - β1ᵗ) and v̂ = v / (1 - β2ᵗ):

=========  ==========================================================================================================
keep       nothing: each moment now belongs to another direction
reset      m = v = 0.  The step count goes on, since random bits depend on it, and so the bias correction does not start
           again: the k-th update after a reset is (1 - β1ᵏ) / √(1 - β2ᵏ) times a fresh Adam's, up to 6.6 times at the
           default betas
rotate     m̂ ← C m̂ and v̂ ← (C∘C) (v̂ - m̂²)₊ + (C m̂)²: the mean is carried over, and so is the variance, as if the
           coordinates were uncorrelated; v stays at least 0
=========  ==========================================================================================================

Both projectors are the stored ones, decoded: those that R was and will be projected with.  Source: LDAdam (arXiv
2410.16103).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore_compile.formats import Format, FormatError, decode, encode
from qgalore_compile.formats.base import dtype_of
from qgalore_compile.subspace.projection import Side

ON_REFRESH = ("keep", "reset", "rotate")
SHORT = {"8bit": "dynamic8/256", "4bit": "moment4/128", "32bit": "float32"}
"""What the group key ``moments`` may say in place of a format's text."""


class MomentFormats(NamedTuple):
    """How a group's moments are stored.

    Attributes:
        text: as the group key has it.
        first, second: formats of m, and of √v or v, with groups along the flattened tensor.
        root: whether it is √v.
        names: of their parts in a parameter's state; of m's alone where a rule keeps no other.
    """

    text: str
    first: Format
    second: Format
    root: bool
    names: tuple[str, ...]

    @classmethod
    def parse(cls, moments: str | Format, count: int = 2) -> MomentFormats:
        """The formats that a group key means, of so many moments; FormatError for one that cannot hold moments."""
        text = str(moments)
        given = Format.parse(SHORT.get(text, text))
        if not given.trains:
            raise FormatError(f"moments={text!r} cannot be written by a step; {_allowed()}")
        own = given.flat()
        root = str(own) != "float32"
        names = [_names("exp_avg", own), _names("exp_avg_sq_root" if root else "exp_avg_sq", own)]
        return cls(text, own, own.unsigned(), root, tuple(chain.from_iterable(names[:count])))

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the tensors, by name."""
        return dict(zip(self.names, map(dtype_of, (*self.first.parts, *self.second.parts)), strict=False))

    def zeros(self, shape: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The moments before the first step, by name."""
        parts = [*self.first.zeros(shape, device), *self._above_zero(self.second.zeros(shape, device))]
        return dict(zip(self.names, parts, strict=False))

    def decode_first(self, stored: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """m of the tensors that it is stored in, those of the second moment left out or not."""
        return decode(stored[: len(self.first.parts)], shape, self.first)

    def encode_first(self, m: Tensor, noise: Tensor | None) -> list[Tensor]:
        """What is to be stored of m where it is the only moment.  It is rounded as √v is: nothing is divided by what
        has fallen to zero, and a momentum that a step moves by a twentieth would stay there."""
        return list(encode(m, self.first, noise))

    def decode(self, stored: Sequence[Tensor], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """m and v, float32 of ``shape``, of the tensors that they are stored in."""
        count = len(self.first.parts)
        first = decode(stored[:count], shape, self.first)
        second = decode(stored[count:], shape, self.second)
        return first, second * second if self.root else second

    @property
    def rounds(self) -> bool:
        """Whether √v is rounded stochastically: a step moves it by a twentieth of a percent, and codes of four bits are
        so far apart that to nearest it would fall with its group's maximum alone.  m, which a step moves by a tenth,
        is rounded to nearest, for draws would add more to an update than they take from it: over 600 steps on
        heavy-tailed gradients the update's error is 0.43 so, 0.69 all to nearest, and 0.57 all stochastically."""
        return self.root and self.second.rounds

    def encode(self, m: Tensor, v: Tensor, *, root: Tensor | None = None, noise: Tensor | None = None) -> list[Tensor]:
        """What is to be stored, in the order of ``names``.

        Args:
            m, v: the moments, float32.
            root: √v where it is known.
            noise: 16 random bits an element, for rounding √v stochastically; None rounds to nearest.
        """
        if not self.root:
            return [m, v]
        root = v.sqrt() if root is None else root
        return [*encode(m, self.first), *self._above_zero(encode(root, self.second, noise))]

    def _above_zero(self, parts: list[Tensor]) -> list[Tensor]:
        """√v with the least code in the place of zero's, where there is one to an element."""
        if self.root and self.second.least and self.second.parts[0].memory == "u8":
            return [parts[0].clamp(min=self.second.least), *parts[1:]]
        return parts


def _names(name: str, form: Format) -> list[str]:
    return [name, *(f"{name}_{part.name}" for part in form.parts[1:])]


def _allowed() -> str:
    return f"{', '.join(map(repr, SHORT))}, or a format whose groups are written apart, such as 'e4m3/128'"


def least_root(betas: tuple[float, float]) -> float:
    """κ, the least √v / |m| that gradients can make, bias correction aside; 0 where there is none."""
    beta1, beta2 = betas
    if beta1 * beta1 >= beta2:
        return 0.0
    return math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2)) / (1 - beta1)


def follow_(
    stored: Sequence[Tensor],
    how: str,
    old: Tensor,
    new: Tensor,
    side: Side,
    *,
    shape: Sequence[int],
    updates: int,
    betas: tuple[float, float],
    formats: MomentFormats,
) -> None:
    """Let stored moments follow the projector, in place.

    Args:
        stored: the tensors that they are stored in, in the order of ``formats.names``.
        how: one of ``ON_REFRESH``.
        old, new: the projectors, decoded, float32.
        side: of the projection.
        shape: of the moments, R's.
        updates: how many the moments hold.  None: there is nothing to follow.
        betas: of those updates.
        formats: how the moments are stored.
    """
    if how == "keep" or updates == 0:
        return
    m, v = formats.decode(stored, shape)
    if how == "reset":
        m, v = torch.zeros_like(m), torch.zeros_like(v)
    else:
        m, v = rotated(m, v, change_of_basis(old, new, side), side, updates=updates, betas=betas)
    for tensor, value in zip(stored, formats.encode(m, v), strict=True):
        tensor.copy_(value)


def change_of_basis(old: Tensor, new: Tensor, side: Side) -> Tensor:
    """C (r, r): coordinates in the new basis of the old basis' vectors."""
    return new.t() @ old if side == "left" else new @ old.t()


def rotated(
    m: Tensor, v: Tensor, change: Tensor, side: Side, *, updates: int, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Both moments in the new basis.

    Args:
        m, v: as stored, without bias correction: (m, r) on the right, (r, n) on the left, float32.
        change: C (r, r).
        updates: at least 1; betas: of those updates.
    """
    first, second = (-math.expm1(updates * math.log(beta)) if beta > 0 else 1.0 for beta in betas)
    squares = change.square()
    mean = m / first
    variance = (v / second - mean.square()).clamp(min=0.0)
    if side == "left":
        mean, variance = change @ mean, squares @ variance
    else:
        mean, variance = mean @ change.t(), variance @ squares.t()
    return mean * first, (variance + mean.square()) * second
