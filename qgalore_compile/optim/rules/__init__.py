"""Rules: what becomes of a projected gradient R, and what of the gradient itself reaches the weight.

===========  ==========================================================================================================
file         what it is
===========  ==========================================================================================================
base.py      ``Rule``, what all of them are, and ``Written``, what one says is to be written
state.py     ``RuleState``: moments and numbers of one parameter in one step; Adam stands here
registry.py  the rules that there are by name, and how one of a user's own joins them
galore.py    Adam in the subspace
fira.py      and what lies outside of it, scaled by column
apollo.py    the whole gradient, scaled by column, with a projector that is drawn and stored nowhere
muon.py      the momentum in the subspace, made orthogonal
factored.py  a momentum of the whole gradient in four bits, over a second moment of rows and columns
===========  ==========================================================================================================
"""

from __future__ import annotations

from qgalore_compile.optim.rules.base import Rule, Written
from qgalore_compile.optim.rules.registry import RULES, rule_of
from qgalore_compile.optim.rules.state import RuleState

__all__ = ["RULES", "Rule", "RuleState", "Written", "rule_of"]
