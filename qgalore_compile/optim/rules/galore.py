"""GaLore's rule: Adam in the subspace, and nothing of what lies outside of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qgalore_compile.optim.rules.base import Rule, Written
from qgalore_compile.optim.rules.state import RuleState


@dataclass(frozen=True)
class GaLore(Rule):
    """U = α P Adam(R).  Source: GaLore (arXiv 2403.03507), algorithm 2."""

    name: ClassVar[str] = "galore"

    def step(self, r: Tensor, state: RuleState) -> Written:
        """See :meth:`Rule.step`."""
        return Written(state.adam(r))
