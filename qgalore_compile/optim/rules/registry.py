"""The rules that there are, by name."""

from __future__ import annotations

from typing import Any

from qgalore_compile.optim.rules.apollo import Apollo
from qgalore_compile.optim.rules.base import Rule
from qgalore_compile.optim.rules.factored import Factored
from qgalore_compile.optim.rules.fira import Fira
from qgalore_compile.optim.rules.galore import GaLore
from qgalore_compile.optim.rules.muon import Muon

_OWN = (GaLore(), Fira(), Apollo(), Muon(), Factored())

RULES: dict[str, Rule] = {rule.name: rule for rule in _OWN}
"""By name; one of a user's own joins when it is first given."""


def is_own(rule: Rule) -> bool:
    """Whether it is one of this package's, not of a user's."""
    return any(rule is each for each in _OWN)


def rule_of(given: Rule | str) -> Rule:
    """A rule, or the one of a name; ValueError with what follows "rule" in a message."""
    problem = bad_rule(given)
    if problem is not None:
        raise ValueError(f"rule {problem}")
    return RULES.setdefault(given.name, given) if isinstance(given, Rule) else RULES[given]


def bad_rule(given: Any) -> str | None:
    """What is wrong with a value of the group key ``rule``; None for a rule or its name."""
    if isinstance(given, str) and given in RULES:
        return None
    if not isinstance(given, Rule):
        known = ", ".join(map(repr, RULES))
        return f"must be one of {known}, or an object of a subclass of qgalore_compile.Rule, got {given!r}"
    name = getattr(given, "name", None)
    if not isinstance(name, str) or not name:
        return f"must have a name, a text by which a saved state finds it again; {type(given).__name__} has {name!r}"
    if name in RULES and RULES[name] != given:
        return f"has the name {name!r}, which another rule has already; give it one of its own"
    return None


bad_rule._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while Dynamo traces, not traced
