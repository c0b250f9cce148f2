"""Every key of a parameter group: its type, its default, what it may be and what it means, in one table.

What else tells of keys follows from it: the defaults and the checks of groups, which keys a built optimizer or a saved
state may change, ``TrainConfig``'s fields of the same meaning, the options of ``qgalore train``, and the table in
``docs/guide.md``.

A key more is one ``Key`` in ``KEYS``; one line ``name: type = of_group("name")`` in ``TrainConfig`` makes it an option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from qgalore_compile.optim.layout import bad_moments, bad_momentum, bad_projector_format
from qgalore_compile.optim.rules.registry import RULES, bad_rule, rule_of
from qgalore_compile.rng import SEEDS
from qgalore_compile.subspace.finder import METHODS
from qgalore_compile.subspace.moments import ON_REFRESH
from qgalore_compile.subspace.refresh import SIMILARITIES, TRIGGERS

REQUIRED = ...
"""The default of a key that has none."""

_NOUNS = {bool: "True or False", int: "an integer", float: "a finite number", str: "a text"}


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        name: as in a group, and as a field of ``TrainConfig``.
        type: bool, int, float (any finite real number), str, or tuple.
        default: REQUIRED for none.
        least: the least that a number may be.
        above: what a number must be above.
        choices: all that the value may be.
        help: what it means, in a sentence or two.
        unset: what None means.  Empty where None cannot be.
        check: in place of type, bounds and choices: what follows the key's name in an error, such as "must be a text of
            a format, got 3"; None for a value that can be.
        values: what ``check`` lets pass, in words.
        projected: whether it has a meaning in projected groups alone.
        fixed: what was laid out by it when the optimizer was built, so that it cannot be set afterwards: shapes, slots
            in schedules, or what a saved state must have in common with an optimizer that loads it: its tensors
            ("state") or schedules ("schedule").
    """

    name: str
    type: type
    default: Any
    least: float | None = None
    choices: tuple[Any, ...] = ()
    help: str = ""
    above: float | None = None
    unset: str = ""
    check: Callable[[Any], str | None] | None = None
    values: str = ""
    projected: bool = False
    fixed: Literal["", "shapes", "slots", "state", "schedule"] = ""

    @property
    def allowed(self) -> str:
        """What the value may be, in words, as in "must be …"."""
        if self.values:
            words = self.values
        elif self.choices:
            words = f"one of {', '.join(map(repr, self.choices))}"
        else:
            words = _NOUNS[self.type] + self.bound
        return f"None or {words}" if self.unset else words

    @property
    def bound(self) -> str:
        """What follows "a number": " of at least 0", " above 0", or nothing."""
        if self.above is not None:
            return f" above {self.above}"
        return "" if self.least is None else f" of at least {self.least}"

    def problem(self, value: Any) -> str | None:
        """What follows the key's name in an error about ``value``; None for a value that can be."""
        if value is None and self.unset:
            return None
        if self.check is not None:
            return self.check(value)
        return None if self._fits(value) else f"must be {self.allowed}, got {value!r}"

    def _fits(self, value: Any) -> bool:
        if self.type is float:
            if not is_number(value) or not -math.inf < value < math.inf:
                return False
        elif not (is_int(value) if self.type is int else isinstance(value, self.type)):
            return False
        if self.choices:
            return value in self.choices
        return (self.least is None or value >= self.least) and (self.above is None or value > self.above)


def is_number(value: object) -> bool:
    """Whether it is a real number of Python or NumPy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_int(value: object) -> bool:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


# -- checks of single keys ------------------------------------------------------------------------------------------


def _not_negative(value: Any) -> str | None:
    if not is_number(value):
        return f"must be a number, got {value!r}"
    return None if 0 <= float(value) < math.inf else f"must not be negative, NaN or infinite, got {float(value)}"


def _learning_rate(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return _not_negative(value)
    if value.numel() != 1:
        return f"must be one number, got a tensor of shape {tuple(value.shape)}"
    return _not_negative(float(value))


def _betas(value: Any) -> str | None:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_number, value)):
        return f"must be two numbers in [0, 1), got {value!r}"
    return None if all(0 <= beta < 1 for beta in value) else f"out of range: both betas must be in [0, 1), got {value}"


def _seed(value: Any) -> str | None:
    if is_int(value) and value in SEEDS:
        return None
    return f"must be an integer that fits into 64 bits, got {value!r}"


def _projection_type(value: Any) -> str | None:
    return None if value == "std" else f"{value!r} is not supported; use 'std', which projects the smaller side"


# -- the table ------------------------------------------------------------------------------------------------------

_projected = partial(Key, projected=True)

_TABLE = (
    # of every group
    Key(
        "lr",
        float,
        1e-3,
        check=_learning_rate,
        values="a number of at least 0, or a tensor of one",
        help="Learning rate, kept as a tensor: a schedule of it compiles nothing anew.",
    ),
    Key("betas", tuple, (0.9, 0.999), check=_betas, values="two numbers in [0, 1)", help="Adam's β₁ and β₂."),
    Key(
        "eps",
        float,
        1e-8,
        check=_not_negative,
        values="a number of at least 0",
        help="ε, beside the bias-corrected √v̂.",
    ),
    Key(
        "weight_decay",
        float,
        0.0,
        check=_not_negative,
        values="a number of at least 0",
        help="Decoupled weight decay; `param_groups` spares norms and biases.",
    ),
    Key(
        "moments",
        str,
        "8bit",
        check=bad_moments,
        values="'8bit', '4bit', '32bit', or a format's text",
        fixed="state",
        help="How m and √v are stored; small parameters that are not projected keep 32 bits.",
    ),
    Key(
        "rounding",
        str,
        "stochastic",
        choices=("stochastic", "nearest"),
        help="Of quantised weights, those in bfloat16 and float16, and of √v in other formats than 8 and 32 bits.",
    ),
    Key("seed", int, 0, check=_seed, values="an integer that fits into 64 bits", help="Of all random bits."),
    # of projected ones: GaLore's and Q-GaLore's own names
    _projected(
        "rank",
        int,
        REQUIRED,
        least=1,
        unset="no projection",
        fixed="shapes",
        help="Rank of the projection, clipped to a weight's smaller side; None hands the rule all of the gradient.",
    ),
    _projected(
        "rule",
        str,
        "galore",
        check=bad_rule,
        values=f"one of {', '.join(map(repr, RULES))}, or an object of a subclass of `Rule`",
        fixed="state",
        help="What becomes of the projected gradient, and what of the gradient itself reaches the weight.",
    ),
    _projected(
        "momentum_format",
        str,
        "4bit",
        check=bad_momentum,
        values="'4bit', '8bit', '32bit', or a format's text",
        fixed="state",
        help='How a momentum as large as the weight is stored, which rule "factored" keeps.',
    ),
    _projected("update_proj_gap", int, 200, least=1, help="Steps between two refreshes of a subspace, at first."),
    _projected("scale", float, 0.25, help="α, on the projected update."),
    _projected(
        "proj_type",
        str,
        "std",
        check=_projection_type,
        values='"std"',
        fixed="shapes",
        help="Which side is projected: the smaller one.",
    ),
    _projected(
        "projector_format",
        str,
        None,
        unset="what the three keys below say",
        check=bad_projector_format,
        values="a format's text",
        fixed="state",
        help="How projectors are stored, such as 'nf4/64'.",
    ),
    _projected("quant", bool, True, fixed="state", help="Whether projectors are quantised."),
    _projected("quant_n_bit", int, 4, choices=(4, 8), fixed="state", help="Bits of a quantised projector's elements."),
    _projected(
        "quant_group_size", int, 256, least=1, fixed="state", help="Elements of a quantised projector in a group."
    ),
    _projected(
        "cos_threshold", float, 0.4, help='For similarity "official": mean similarity from which on the gap grows.'
    ),
    _projected("gamma_proj", float, 2, least=1, help="Factor by which a gap grows and shrinks; 1 keeps it."),
    _projected("queue_size", int, 5, least=1, fixed="schedule", help="Similarities in the mean that lets a gap grow."),
    # of projected ones: this project's
    _projected("refresh", str, "randomized", choices=METHODS, help="How a subspace is computed."),
    _projected(
        "power_iterations",
        int,
        1,
        least=1,
        help='Passes over the gradient that sharpen a range finder: of refresh "randomized", and of the first "power".',
    ),
    _projected(
        "moments_on_refresh", str, "keep", choices=ON_REFRESH, help="What becomes of the moments in a new subspace."
    ),
    _projected(
        "similarity",
        str,
        "subspace",
        choices=SIMILARITIES,
        fixed="slots",
        help="How two subspaces are compared, and by which rule their gaps change.",
    ),
    _projected(
        "similarity_threshold",
        float,
        0.4,
        help='For similarity "subspace": mean similarity from which on the gap grows.',
    ),
    _projected(
        "max_gap",
        int,
        None,
        least=1,
        unset='16 gaps; similarity "official": no limit',
        help="Most steps between two refreshes.",
    ),
    _projected(
        "shrink_threshold",
        float,
        None,
        unset="half of similarity_threshold",
        help='For similarity "subspace": newest similarity below which the gap shrinks.',
    ),
    _projected(
        "stagger",
        bool,
        True,
        fixed="slots",
        help="Spread refreshes over steps, a cheap projector standing in at first.",
    ),
    _projected(
        "trigger",
        str,
        "similarity",
        choices=TRIGGERS,
        help="What refreshes a subspace: a gap that similarities stretch, or a projector that catches too little of "
        "the gradient.",
    ),
    _projected(
        "energy_threshold",
        float,
        0.8,
        least=0,
        help='For trigger "energy": too little is below this part of what it caught at first.',
    ),
)

KEYS: dict[str, Key] = {key.name: key for key in _TABLE}
"""All keys but ``params`` and ``param_names``, by name.

``update_proj_gap`` set between steps acts on what follows: a higher one is the least gap from the next refresh on; a
lower one is what gaps shrink to, and where ``max_gap`` is None the cap falls with it.  A gap that stands is what the
parameter's own similarities have earned, so it stays; ``group.update(update_proj_gap=50, max_gap=50)`` makes it 50 from
the next refresh on.  The turn that stands comes when it was to come."""


# -- what follows from it -------------------------------------------------------------------------------------------


def defaults(*, projected: bool) -> dict[str, Any]:
    """Keys with their defaults: of a projected group's own keys but ``rank``, or of every group's."""
    ours = (key for key in KEYS.values() if key.projected is projected)
    return {key.name: key.default for key in ours if key.default is not REQUIRED}


def fixed(*by: str) -> tuple[str, ...]:
    """Keys that cannot be set once an optimizer is built: all, or those by which one of ``by`` was laid out."""
    return tuple(key.name for key in KEYS.values() if key.fixed and (not by or key.fixed in by))


def check_values(group: Mapping[str, Any], where: str, *, projected: bool) -> None:
    """Raise ValueError for a value that cannot be, of every group's keys or of a projected group's own."""
    for key in KEYS.values():
        if key.projected is projected:
            problem = key.problem(group[key.name])
            if problem is not None:
                raise ValueError(f"{where}: {key.name} {problem}")
    if projected:
        _check_together(group, where)


def _check_together(group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for values of a projected group that cannot be beside each other."""
    gap, max_gap = group["update_proj_gap"], group["max_gap"]
    if max_gap is not None and max_gap < gap:
        raise ValueError(
            f"{where}: max_gap must be None or an integer of at least update_proj_gap={gap}, got {max_gap!r}"
        )
    threshold, shrink = group["similarity_threshold"], group["shrink_threshold"]
    if shrink is not None and shrink > threshold:
        raise ValueError(
            f"{where}: shrink_threshold must not be above similarity_threshold={threshold!r}, or one similarity asked "
            f"for a longer gap and a shorter one, got {shrink!r}"
        )
    rule = rule_of(group["rule"])
    if group["moments_on_refresh"] != "keep" and (rule.drawn or rule.moments != 2):
        why = "draws its projectors" if rule.drawn else "keeps one moment"
        raise ValueError(
            f"{where}: moments_on_refresh must be 'keep' with rule {rule.name!r}, which {why}, got "
            f"{group['moments_on_refresh']!r}"
        )
    if group["rank"] is None and not rule.unprojected:
        known = ", ".join(repr(name) for name, each in RULES.items() if each.unprojected)
        raise ValueError(
            f"{where}: rank must be an integer of at least 1 with rule {rule.name!r}, got None, which hands all of the "
            f"gradient to rules that can take it: {known}"
        )
    if rule.drawn and group["projector_format"] is not None:
        raise ValueError(
            f"{where}: rule {rule.name!r} draws its projectors and stores none; leave projector_format out"
        )
    if group["trigger"] == "energy" and group["similarity"] == "official":
        raise ValueError(
            f"{where}: trigger 'energy' is no part of the published rule, similarity 'official'; use 'subspace'"
        )


def guide_table(*, projected: bool) -> str:
    """Every group's keys, or a projected group's own, as the table in Markdown that ``docs/guide.md`` holds."""
    lines = ["| key | default | may be | what it is |", "| --- | --- | --- | --- |"]
    for key in KEYS.values():
        if key.projected is projected:
            may_be = ", ".join(map(_written, key.choices)) or key.allowed
            lines.append(f"| `{key.name}` | {_default(key)} | {may_be} | {key.help} |")
    return "\n".join(lines) + "\n"


def _default(key: Key) -> str:
    if key.default is REQUIRED:
        return "–"
    return f"None: {key.unset}" if key.default is None else _written(key.default)


def _written(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
