"""Adam's two moments as they are stored, and what becomes of them when a projector changes.

**Stored.**  In 32 bits m and v as they are.  In 8 bits m and **√v**, each in the dynamic blocks of
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

import torch
from torch import Tensor

from qgalore_compile import formats
from qgalore_compile.subspace.projection import Side

ON_REFRESH = ("keep", "reset", "rotate")
IN_8_BITS = ("exp_avg", "exp_avg_absmax", "exp_avg_sq_root", "exp_avg_sq_root_absmax")
IN_32_BITS = ("exp_avg", "exp_avg_sq")
"""Names in a parameter's state.  8 bits had v under ``exp_avg_sq`` once, hence another name for √v."""


def zeros(shape: Sequence[int], eight_bit: bool, device: torch.device) -> dict[str, Tensor]:
    """The moments before the first step, by name."""
    if not eight_bit:
        return {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in IN_32_BITS}
    # One element stands for all: to encode an embedding's 131 M zeros would take 2.5 GB for a while.
    zero = torch.zeros(1, dtype=torch.float32, device=device)
    blocks = -(-math.prod(shape) // formats.BLOCK_SIZE)
    codes, absmax, root_codes, root_absmax = encode(zero, zero, True)
    parts = codes.expand(shape), absmax.expand(blocks), root_codes.expand(shape), root_absmax.expand(blocks)
    return {name: part.clone() for name, part in zip(IN_8_BITS, parts, strict=True)}


def stored_moments(state: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that a parameter's moments are stored in: [m, v], or [codes, absmax] of m and of √v."""
    return [state[name] for name in (IN_8_BITS if IN_8_BITS[-1] in state else IN_32_BITS)]


def decode(stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """m and v, float32, of :func:`stored_moments`."""
    if len(stored) == len(IN_32_BITS):
        return stored[0], stored[1]
    codes, absmax, root_codes, root_absmax = stored
    root = formats.dequantize_dynamic8(root_codes, root_absmax, False)
    return formats.dequantize_dynamic8(codes, absmax, True), root * root


def encode(m: Tensor, v: Tensor, eight_bit: bool, *, root: Tensor | None = None) -> list[Tensor]:
    """What :func:`stored_moments` is to hold; ``root``: √v where it is known."""
    if not eight_bit:
        return [m, v]
    codes, absmax, _ = formats.quantize_dynamic8(m, signed=True)
    root_codes, root_absmax, _ = formats.quantize_dynamic8(v.sqrt() if root is None else root, signed=False)
    return [codes, absmax, root_codes.clamp(min=LEAST_CODE), root_absmax]


LEAST_CODE = 1
"""Of √v: the map's smallest entry that is not 0."""


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
    m, v = decode(stored)
    if how == "reset":
        m, v = torch.zeros_like(m), torch.zeros_like(v)
    else:
        m, v = rotated(m, v, change_of_basis(old, new, side), side, updates=updates, betas=betas)
    for tensor, value in zip(stored, encode(m, v, len(stored) == len(IN_8_BITS)), strict=True):
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
