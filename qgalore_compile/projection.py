"""The projector: which side, to and fro, and how the subspace is found.

Shapes: G (m, n) gradient, P projector, r rank.  GaLore projects the smaller side:

=====  ======  ==============================  =======================  =====================
side   where   P                               down: R                  up: U
=====  ======  ==============================  =======================  =====================
right  m >= n  (r, n), rows of Vh              G P^T  (m, r)            N P   (m, n)
left   m < n   (m, r), columns of U            P^T G  (r, n)            P N   (m, n)
=====  ======  ==============================  =======================  =====================

A gradient comes as ``factors``: ``[G]``, or ``[dY1, X1, dY2, X2, …]`` with G = Σ dYᵢᵀ Xᵢ, dY (tokens, m) and X
(tokens, n).  With fewer tokens than the rank, G's singular vectors follow exactly from the QR of its factors, and G is
never formed.

Source: GaLore (arXiv 2403.03507), section 3; range finder: Halko, Martinsson and Tropp (SIAM Review 2011),
algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qgalore_compile import rng

Side = Literal["left", "right"]
OVERSAMPLING = 16
POWER_ITERATIONS = 2


def side_of(shape: Sequence[int]) -> Side:
    """The side on which a weight of this shape (m, n) is projected: "right" where m >= n."""
    return "right" if shape[0] >= shape[1] else "left"


def projector_shape(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """(r, n) on the right, (m, r) on the left, for a rank of at most min(m, n)."""
    m, n = shape
    return (rank, n) if side_of(shape) == "right" else (m, rank)


def project(grad: Tensor, projector: Tensor, side: Side) -> Tensor:
    """R: (m, r) on the right, (r, n) on the left."""
    return grad @ projector.t() if side == "right" else projector.t() @ grad


def project_back(low: Tensor, projector: Tensor, side: Side) -> Tensor:
    """(m, n) from (m, r) on the right, from (r, n) on the left."""
    return low @ projector if side == "right" else projector @ low


# -- finding the subspace ---------------------------------------------------------------------------------------------


def full_gradient(factors: Sequence[Tensor]) -> Tensor:
    """G (m, n) in float32, from itself or from its factors."""
    if len(factors) == 1:
        return factors[0].to(torch.float32)
    pairs = zip(factors[::2], factors[1::2], strict=True)
    products = [grad_output.to(torch.float32).t() @ inputs.to(torch.float32) for grad_output, inputs in pairs]
    return sum(products[1:], start=products[0])


def leading_subspace(
    factors: Sequence[Tensor], rank: int, side: Side, *, method: str, seed: int = 0, step: int = 0, param: int = 0
) -> Tensor:
    """The projector of a gradient, in float32: its ``rank`` leading singular vectors on ``side``.

    Args:
        factors: ``[G]`` or ``[dY1, X1, …]``, finite.
        rank: at most min(m, n).
        side: which singular vectors.
        method: "svd", exact; "randomized", a seeded range finder with two power iterations, within a few per cent of
            the exact energy.  Both are exact where the factors hold fewer tokens than the rank.
        seed, step, param: select the random numbers of the range finder and of the completion.

    Returns:
        (r, n) on the right, (m, r) on the left, orthonormal.  Signs are canonical: the entry of largest magnitude of
        each vector is positive, since a singular vector's sign is arbitrary and moments outlive a refresh.  Where the
        gradient's numerical rank is smaller, random directions orthogonal to the rest complete it, the same on every
        path, rather than whatever LAPACK leaves there.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    tokens = sum(factor.shape[0] for factor in factors[::2]) if len(factors) > 1 else None
    if tokens is not None and tokens < rank:
        vectors, values = _from_factors(factors, side)
    else:
        # columns of A = G (left) or G^T (right) span the space that is looked for; A is never the wide side's Gram
        full = full_gradient(factors)
        matrix = full if side == "left" else full.t()
        if method == "randomized" and rank + OVERSAMPLING < min(matrix.shape):
            sketch = rng.normal((matrix.shape[1], rank + OVERSAMPLING), seed=seed, step=step, param=param)
            vectors, values = _range_finder(matrix, sketch.to(matrix.device))
        else:
            vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    basis = _canonical_signs(_complete(vectors[:, :rank], values[:rank], rank, seed, step, param))
    return basis.contiguous() if side == "left" else basis.t().contiguous()


def sketched_subspace(
    factors: Sequence[Tensor], rank: int, side: Side, *, seed: int = 0, step: int = 0, param: int = 0
) -> Tensor:
    """A rough projector at the price of a few products: an orthonormal basis of A Ω, Ω random, A = G or G^T.

    The range finder without power iterations, oversampling or the SVD that would choose among the directions, and
    without G where the factors are given: 0.83 of the energy that the exact subspace catches, where singular values
    fall like i^-0.5.  Arguments and result are those of :func:`leading_subspace`.
    """
    m, n = factors[0].shape[-1 if len(factors) > 1 else 0], factors[-1].shape[-1]
    omega = rng.normal((n if side == "left" else m, rank), seed=seed, step=step, param=param).to(factors[0].device)
    if len(factors) == 1:
        full = full_gradient(factors)
        sketch = full @ omega if side == "left" else full.t() @ omega
    else:
        outer, inner = (factors[::2], factors[1::2]) if side == "left" else (factors[1::2], factors[::2])
        pairs = zip(outer, inner, strict=True)
        sketch = full_gradient([matrix for a, b in pairs for matrix in (a, b.to(torch.float32) @ omega)])
    vectors, triangle = torch.linalg.qr(sketch)
    # A's rank k < r shows on the diagonal: the columns of a Gaussian sketch are independent up to the k-th
    values = triangle.diagonal().abs()
    basis = _canonical_signs(_complete(vectors, values, rank, seed, step, param))
    return basis.contiguous() if side == "left" else basis.t().contiguous()


def _from_factors(factors: Sequence[Tensor], side: Side) -> tuple[Tensor, Tensor]:
    """Left singular vectors (d, tokens) and values of A from QR of both factors: G = Qy (Ry Rx^T) Qx^T."""
    grad_outputs = torch.cat([factor.to(torch.float32) for factor in factors[::2]])
    inputs = torch.cat([factor.to(torch.float32) for factor in factors[1::2]])
    q_y, r_y = torch.linalg.qr(grad_outputs.t())
    q_x, r_x = torch.linalg.qr(inputs.t())
    left, values, right_h = torch.linalg.svd(r_y @ r_x.t(), full_matrices=False)
    return (q_y @ left, values) if side == "left" else (q_x @ right_h.t(), values)


def _range_finder(matrix: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of A (d, k) from a random sketch (k, rank + oversampling) of its range."""
    basis, _ = torch.linalg.qr(matrix @ sketch)
    for _ in range(POWER_ITERATIONS):
        other, _ = torch.linalg.qr(matrix.t() @ basis)
        basis, _ = torch.linalg.qr(matrix @ other)
    left, values, _ = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ left, values


def _complete(vectors: Tensor, values: Tensor, rank: int, seed: int, step: int, param: int) -> Tensor:
    """(d, rank) orthonormal: the vectors with a value above rounding, and random directions orthogonal to them."""
    d = vectors.shape[0]
    largest = float(values[0]) if len(values) else 0.0
    # LAPACK's and NumPy's threshold for the numerical rank
    known = int((values > largest * d * torch.finfo(torch.float32).eps).sum()) if largest > 0 else 0
    if known == rank:
        return vectors
    kept = vectors[:, :known]
    fill = rng.normal((d, rank - known), seed=seed, step=step, param=param).to(vectors.device)
    for _ in range(2):  # once is not enough where the remainder is small: "twice is enough" (Kahan, Parlett)
        fill = fill - kept @ (kept.t() @ fill)
        fill, _ = torch.linalg.qr(fill)
    return torch.cat([kept, fill], dim=1)


def _canonical_signs(vectors: Tensor) -> Tensor:
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


# -- how much of a gradient a projector catches -----------------------------------------------------------------------


def captured_energy(low: Tensor, factors: Sequence[Tensor]) -> float:
    """‖R‖² / ‖G‖², without forming G where that is cheaper; NaN where G is zero.

    ‖dYᵀX‖² is the sum of (dY dYᵀ) ∘ (X Xᵀ): 2T²(m + n) operations instead of 2Tmn.

    Args:
        low: R, of any dtype.
        factors: ``[G]`` or ``[dY1, X1, …]``.
    """
    tokens = sum(factor.shape[0] for factor in factors[::2])
    m, n = factors[0].shape[-1], factors[-1].shape[-1]
    if len(factors) > 1 and tokens * (m + n) < m * n:
        grad_outputs = torch.cat([factor.to(torch.float32) for factor in factors[::2]])
        inputs = torch.cat([factor.to(torch.float32) for factor in factors[1::2]])
        products = (grad_outputs @ grad_outputs.t()).mul_(inputs @ inputs.t())
        whole = float(products.sum(dtype=torch.float64))
    else:
        whole = _energy(full_gradient(factors))
    return _energy(low) / whole if whole > 0 else math.nan


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


# -- how much two subspaces agree -------------------------------------------------------------------------------------


def subspace_similarity(old: Tensor, new: Tensor, side: Side) -> float:
    """1 for equal subspaces, about 0 for unrelated ones, at every rank; blind to signs and to order.

    ‖P_old^T P_new‖² / r is the mean squared cosine of the principal angles.  Two unrelated subspaces of dimension r in
    d score r / d, so that is what is called 0: (c - r/d) / (1 - r/d), clipped to [0, 1], and 1 where r = d.
    """
    product = old.t() @ new if side == "left" else old @ new.t()
    d, rank = (max(old.shape), min(old.shape))
    if rank == d:
        return 1.0
    cosine2 = float(product.square().sum()) / rank
    return min(1.0, max(0.0, (cosine2 - rank / d) / (1 - rank / d)))


def official_similarity(old: Tensor, new: Tensor, side: Side) -> float:
    """Q-GaLore's published measure: the signed cosine of the first singular vectors, new against old."""
    first_old, first_new = (old[:, 0], new[:, 0]) if side == "left" else (old[0], new[0])
    return float(torch.nn.functional.cosine_similarity(first_old, first_new, dim=0))
