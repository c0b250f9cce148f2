"""Muon's rule in the subspace: the momentum of R, all of whose singular values are made alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgalore_compile.optim.rules.base import Rule, Written
from qgalore_compile.optim.rules.state import RuleState

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


@dataclass(frozen=True)
class Muon(Rule):
    """U = α √n P ortho(M), with M the Nesterov momentum of R and n the larger side of R; with ``rank=None`` R is G and
    there is no P.

    ortho(M) is near the orthogonal factor of M, by five steps of Newton and Schulz whose products have the gradient's
    dtype; √n gives its elements a root mean square of about 1, as Adam's have.  β₁ is M's: Muon's authors take 0.95.
    Source: Muon (K. Jordan and others, 2024).
    """

    name: ClassVar[str] = "muon"
    moments: ClassVar[int] = 1
    unprojected: ClassVar[bool] = True

    def step(self, r: Tensor, state: RuleState) -> Written:
        """See :meth:`Rule.step`."""
        momentum = state.momentum(r)
        wide = momentum if r.shape[0] <= r.shape[1] else momentum.t()
        found = orthogonal(wide.to(state.gemm)).to(torch.float32) * wide.shape[1] ** 0.5
        return Written(found if r.shape[0] <= r.shape[1] else found.t())


def orthogonal(x: Tensor) -> Tensor:
    """Near U Vᵀ of x (r, n), r <= n, with singular values of 0.7 to 1.2; zero for zero."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x).clamp(min=1e-30)
    for _ in range(STEPS):
        square = x @ x.t()
        x = a * x + (b * square + c * square @ square) @ x
    return x
