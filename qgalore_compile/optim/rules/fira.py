"""Fira's rule: what lies outside of the subspace is written too, scaled as Adam scales what lies inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgalore_compile.optim.rules.base import Rule, Written
from qgalore_compile.optim.rules.state import RuleState

GROWTH = 1.01
"""The published limiter's."""


@dataclass(frozen=True)
class Fira(Rule):
    """U = α P N + f (G - α P R) ∘ φ, with N = Adam(R) and φ = ‖N_j‖ / ‖R_j‖ of each column (on the right, row).

    f lets what is added to GaLore's update grow by 1 % a step at most.  The paper takes the norm of that itself; here
    it is ‖R ∘ φ‖, which needs no G.  Source: Fira (arXiv 2410.01623), algorithm 1, and its published code, where α
    scales what is taken from G and not the rest.
    """

    name: ClassVar[str] = "fira"
    reads_gradient: ClassVar[bool] = True
    limits: ClassVar[bool] = True

    def step(self, r: Tensor, state: RuleState) -> Written:
        """See :meth:`Rule.step`."""
        n = state.adam(r)
        phi = column_ratio(n, r, state.dim)
        inside = phi * r
        factor = state.limited(torch.linalg.vector_norm(inside), GROWTH)
        return Written(n - factor * inside, factor * phi)


def column_ratio(n: Tensor, r: Tensor, dim: int) -> Tensor:
    """φ = ‖N_j‖ / ‖R_j‖ along the dimension of the rank, 0 where R_j is zero; keeps the dimension."""
    above = torch.linalg.vector_norm(n, dim=dim, keepdim=True)
    below = torch.linalg.vector_norm(r, dim=dim, keepdim=True)
    return torch.where(below > 0, above / below, 0.0)
