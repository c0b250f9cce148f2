"""APOLLO's rule: the whole gradient, each column scaled as Adam scales it in a random subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgalore_compile.optim.rules.base import Rule, Written
from qgalore_compile.optim.rules.fira import GROWTH, column_ratio
from qgalore_compile.optim.rules.state import RuleState


@dataclass(frozen=True)
class Apollo(Rule):
    """U = α f G ∘ φ, with N = Adam(PᵀG) and φ = √(d / r) ‖N_j‖ / ‖R_j‖ of each column (on the right, row).

    d is the smaller side: with √(d / r) an update has the size of full-rank Adam's whatever the rank.  P has entries
    ±1/√r, drawn anew every ``update_proj_gap`` steps from Philox and stored nowhere; the paper's are normal, which
    preserves norms no better.  With ``rank=1`` there is one φ a matrix, as in APOLLO-Mini.  f as in Fira, of ‖R ∘ φ‖.
    Source: APOLLO (arXiv 2412.05270), algorithm 1.
    """

    name: ClassVar[str] = "apollo"
    drawn: ClassVar[bool] = True
    reads_gradient: ClassVar[bool] = True
    limits: ClassVar[bool] = True

    def step(self, r: Tensor, state: RuleState) -> Written:
        """See :meth:`Rule.step`."""
        n, rank = state.adam(r), r.shape[state.dim]
        phi = column_ratio(n, r, state.dim) if rank > 1 else column_ratio(n.reshape(1, -1), r.reshape(1, -1), 1)
        factor = state.limited(torch.linalg.vector_norm(phi * r), GROWTH)
        return Written(None, state.scale * (state.smaller_side / rank) ** 0.5 * factor * phi)
