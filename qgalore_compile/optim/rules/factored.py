"""The factored rule: a momentum of all of the gradient in four bits, over a second moment of a row and a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgalore_compile.optim.rules.base import Rule, Written
from qgalore_compile.optim.rules.state import RuleState


@dataclass(frozen=True)
class Factored(Rule):
    """U = α M̂ / (√V̂ + ε), with M = β₁ M + (1 - β₁) G and V of rank one: V_ij = a_i b_j / mean(a).

    a_i is a moving average of the mean square of row i of G, b_j of column j, both from *sketches*: from G Pᵀ and Qᵀ G
    with signs ±1/√r in P and Q, drawn anew in every step, ‖(G Pᵀ)_i‖² has the mean ‖G_i‖².  So G itself is needed where
    M is, element by element, and is formed nowhere in a compiled step.  M is kept in the format of the key
    ``momentum_format``, four bits an element by default: at the ranks of GaLore's authors, a quarter of the smaller
    side, that is less than two moments in eight bits and P.

    Source: Adafactor (arXiv 1804.04235), eq. 4 to 6, with a momentum; in four bits "4-bit Factor" of arXiv 2309.01507.
    The sketches are as in APOLLO (arXiv 2412.05270), where their ratio to Adam's scales G itself.
    """

    name: ClassVar[str] = "factored"
    drawn: ClassVar[bool] = True
    sketches: ClassVar[bool] = True
    moments: ClassVar[int] = 0
    reads_gradient: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def step(self, r: Tensor, state: RuleState) -> Written:
        """See :meth:`Rule.step`."""
        rows, columns = state.factors(r)
        below = torch.sqrt(rows / rows.mean().clamp(min=1e-38)) * torch.sqrt(columns) + state.group.numbers.eps
        return Written(None, torch.where(below == 0, 0.0, state.scale / below))
