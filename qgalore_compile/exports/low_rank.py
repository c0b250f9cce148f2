"""A product of two thin matrices that makes up for the error of a quantised weight: LoRC and EoRA.

With the error E = W - Ŵ (m × n) a layer computes Ŵ x + B (A x), B (m × r) and A (r × n).

LoRC, *ZeroQuant-V2* (arXiv 2303.08302), minimises ‖E - B A‖: the truncated SVD of E.  EoRA (arXiv 2410.21271) minimises
‖(E - B A) X‖ over the inputs X (n × tokens) that the layer sees.  With X Xᵀ = Q Λ Qᵀ that is ‖(E - B A) Q √Λ‖, so it
takes the truncated SVD U Σ Vᵀ of E' = E Q √Λ, and goes back by A = A' (Q √Λ)⁻¹.

That inverse is never formed.  Of the factors B = U, A' = Σ Vᵀ = Uᵀ E' the second goes back to A = Uᵀ E Q √Λ (Q √Λ)⁻¹
= Uᵀ E.  So B A = U Uᵀ E, for both methods, which differ in what U is taken from, and no eigenvalue is divided by: in
directions that no input has, B A is the error's own projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_UNSEEN = 1e-12


class LowRank(NamedTuple):
    """``left`` B (m, r), with orthonormal columns, and ``right`` A (r, n), in the error's dtype."""

    left: Tensor
    right: Tensor


def lorc(error: Tensor, rank: int) -> LowRank:
    """The product of rank ``rank`` that is nearest to ``error`` (m, n): least ‖E - B A‖ (Frobenius), in float64.

    Raises:
        ValueError: error is not two-dimensional, or rank is not in 1 … min(m, n).
    """
    check_rank(error, rank)
    return _projected(error.double(), error.double(), rank, error.dtype)


def eora(error: Tensor, second_moment: Tensor, rank: int) -> LowRank:
    """The product of rank ``rank`` with the least ‖(E - B A) X‖ (Frobenius), in float64.

    Args:
        error: E (m, n).
        second_moment: X Xᵀ (n, n) of the layer's inputs X (n, tokens), times any positive number; it may be singular.
        rank: r.

    Raises:
        ValueError: error is not two-dimensional, rank is not in 1 … min(m, n), or second_moment has another shape or
            holds NaN or Inf.
    """
    check_rank(error, rank)
    n = error.shape[1]
    if second_moment.shape != (n, n):
        raise ValueError(f"{n} columns of an error need a second moment of {n} × {n}, got {tuple(second_moment.shape)}")
    if not bool(torch.isfinite(second_moment).all()):
        raise ValueError("the second moment of the inputs holds NaN or Inf; calibrate on other batches")
    values, vectors = torch.linalg.eigh(second_moment.double())
    strongest = float(values[-1])
    # What no input has counts for 10⁻⁶ of what they have most: of products that are equally good on the inputs, and
    # with fewer inputs than the rank there are many, the one nearest to the error.  Rounding puts zeros below 0, too.
    weights = values.clamp(min=_UNSEEN * strongest).sqrt() if strongest > 0 else torch.ones_like(values)
    seen = error.double() @ (vectors * weights)
    return _projected(error.double(), seen, rank, error.dtype)


def check_rank(error: Tensor, rank: int) -> None:
    """ValueError unless ``error`` is a matrix with a product of rank ``rank``."""
    if error.dim() != 2:
        raise ValueError(f"an error has two dimensions, got shape {tuple(error.shape)}")
    if not 1 <= rank <= min(error.shape):
        m, n = error.shape
        raise ValueError(f"rank {rank} is not in 1 … {min(m, n)}, the least side of {m} × {n}")


def _projected(error: Tensor, seen: Tensor, rank: int, dtype: torch.dtype) -> LowRank:
    left = torch.linalg.svd(seen, full_matrices=False).U[:, :rank]
    return LowRank(left.to(dtype), (left.mT @ error).to(dtype))
