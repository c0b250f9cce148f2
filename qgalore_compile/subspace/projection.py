"""The projector: which side, to and fro, and how much two of them agree.

Shapes: G (m, n) gradient, P projector, r rank.  GaLore projects the smaller side:

=====  ======  ==============================  =======================  =====================
side   where   P                               down: R                  up: U
=====  ======  ==============================  =======================  =====================
right  m >= n  (r, n), rows of Vh              G P^T  (m, r)            N P   (m, n)
left   m < n   (m, r), columns of U            P^T G  (r, n)            P N   (m, n)
=====  ======  ==============================  =======================  =====================

How a projector is found: :mod:`qgalore_compile.subspace.finder`.  Source: GaLore (arXiv 2403.03507), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


def side_of(shape: Sequence[int]) -> Side:
    """The side on which a weight of this shape (m, n) is projected: "right" where m >= n."""
    return "right" if shape[0] >= shape[1] else "left"


def other_side(side: Side) -> Side:
    """The side that a weight projected on ``side`` is not projected on."""
    return "left" if side == "right" else "right"


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
