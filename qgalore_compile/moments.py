"""What becomes of Adam's moments when a projector changes: they are coordinates in the old basis.

With C = P_newᵀ P_old on the left side (P_new P_oldᵀ on the right, where everything below is transposed), t the updates
that the moments hold, m̂ = m / (1 - β1ᵗ) and v̂ = v / (1 - β2ᵗ):

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

import torch
from torch import Tensor

from qgalore_compile import formats
from qgalore_compile.projection import Side

ON_REFRESH = ("keep", "reset", "rotate")
_STORED = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


def stored_moments(state: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that a parameter's moments are stored in: [m, v], or [codes, absmax] of each."""
    return [state[name] for name in _STORED if name in state]


def follow_(
    stored: Sequence[Tensor],
    how: str,
    old: Tensor,
    new: Tensor,
    side: Side,
    *,
    updates: int,
    betas: tuple[float, float],
) -> None:
    """Let stored moments follow the projector, in place.

    Args:
        stored: of :func:`stored_moments`.
        how: one of ``ON_REFRESH``.
        old, new: the projectors, decoded, float32.
        side: of the projection.
        updates: how many the moments hold.  None: there is nothing to follow.
        betas: of those updates.
    """
    if how == "keep" or updates == 0:
        return
    eight_bit = len(stored) == len(_STORED)
    parts = [stored[:2], stored[2:]] if eight_bit else [stored[:1], stored[1:]]
    if how == "reset":
        values = [torch.zeros(part[0].shape, dtype=torch.float32, device=part[0].device) for part in parts]
    else:
        m, v = (
            formats.dequantize_dynamic8(part[0], part[1], signed) if eight_bit else part[0]
            for part, signed in zip(parts, (True, False), strict=True)
        )
        values = list(rotated(m, v, change_of_basis(old, new, side), side, updates=updates, betas=betas))
    for part, value, signed in zip(parts, values, (True, False), strict=True):
        encoded = formats.quantize_dynamic8(value, signed=signed)[:2] if eight_bit else [value]
        for tensor, each in zip(part, encoded, strict=True):
            tensor.copy_(each)


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
