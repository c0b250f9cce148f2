"""The two phases of a parameter's step, ``one_parameter.py``, as one operator each while our backend traces them.

Each has three overloads of the same arguments:

================  =====================================================================================================
``project_``      what Dynamo puts into a graph; it says what it writes, and run by itself does what the phase does
``….traced``      the phase's operations, wherever it is traced
``….unseen``      what AOTAutograd sees in place of the first where it need not know what is written
                  (``backend/unseen.py``): the pass ``decompose`` puts the operations there, and the writes.  A graph
                  in which it stays does the same if it is run in its order
================  =====================================================================================================

An operator is told of its group by a text of the keys that a step reads: numbers are tensors beside it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from qgalore_compile._ops import count_writes, define, define_traced, written_places
from qgalore_compile._torch import OpOverload, is_fake
from qgalore_compile.composites import COMPOSITES, Composite, stay
from qgalore_compile.formats import Format
from qgalore_compile.optim import layout, one_parameter
from qgalore_compile.optim.hyper_parameters import Group, Numbers
from qgalore_compile.optim.layout import GroupFormats
from qgalore_compile.optim.one_parameter import Parameter, Projected
from qgalore_compile.optim.rules.base import Rule
from qgalore_compile.optim.rules.registry import rule_of
from qgalore_compile.subspace.projection import other_side, side_of
from qgalore_compile.weights import QuantizedWeight
from qgalore_compile.weights.tensor import HANDLERS

SHARED = ("grad_norm", "skipped_steps")
"""What stands in a parameter's state and belongs to all of them."""

READ = (
    "rank", "rule", "rounding", "seed", "moments", "refresh", "power_iterations", "moments_on_refresh",
    "projector_format", "quant", "quant_n_bit", "quant_group_size", "momentum_format",
)  # fmt: skip
"""Keys of a group that a phase reads and that are not numbers; and ``update_proj_gap`` where a rule draws."""


def text_of(group: Group) -> str:
    """What an operator is told of a group; "" where the phases are to be traced through: in graphs of other backends,
    by a rule of a user's own, whose code would not be part of what a cache finds a graph by, and under autocast, which
    changes the products in them and knows no operator."""
    if not stay() or not group.is_known or any(map(torch.is_autocast_enabled, _devices(group))):
        return ""
    keys = (*READ, "update_proj_gap") if group.rule is not None and group.rule.drawn else READ
    return "\n".join([f"{key}={group[key]!r}" for key in keys if key in group])


def _devices(group: Group) -> list[str]:
    return [p.device.type for p in group["params"][:1]]


def project_(parameter: Parameter) -> Projected:
    """:func:`~qgalore_compile.optim.one_parameter.project_`, as one node where it is traced."""
    _, gradient, group, _, position, told = parameter
    if not told or not layout.projects(group):
        return one_parameter.project_(parameter)
    names, state = _flat(parameter)
    low, norm, *across = PROJECT.seen(gradient, state, [*group.numbers], told, position, names)
    return Projected(low, norm, *across)


def update_(parameter: Parameter, projected: Projected, clip: Tensor | None, ok: Tensor) -> None:
    """:func:`~qgalore_compile.optim.one_parameter.update_`, likewise."""
    weight, gradient, group, _, position, told = parameter
    if not told:
        one_parameter.update_(parameter, projected, clip, ok)
        return
    names, state = _flat(parameter)
    numbers = [*group.numbers, group["lr"]]
    # a gradient that the rule does not read need not live until the update
    read = gradient if group.rule is not None and group.rule.reads_gradient else None
    low, _, across = projected
    UPDATE.seen(weight, state, numbers, read, low, across, clip, ok, told, position, names)


def _flat(parameter: Parameter) -> tuple[str, list[Tensor]]:
    """Names and tensors of a parameter's state."""
    names = [name for name in parameter.state if name not in SHARED]
    return ",".join(names), [parameter.state[name] for name in names]


# -- what an operator does --------------------------------------------------------------------------------------------


class _Told(dict[str, Any]):
    """A group as an operator knows it.  ``eps`` and ``weight_decay`` are such that a graph is of every number."""

    numbers: Numbers
    formats: GroupFormats
    rule: Rule | None

    def __init__(self, text: str, numbers: Sequence[Tensor], weight: Tensor) -> None:
        super().__init__(_parsed(text), eps=0.0, weight_decay=1.0)
        count = len(Numbers._fields)
        self.numbers = Numbers._make(numbers[:count])
        self.formats = _formats(text, layout.width_of(weight))
        self.rule = rule_of(self["rule"]) if "rank" in self else None
        if len(numbers) > count:
            self["lr"] = numbers[count]


@lru_cache
def _parsed(text: str) -> Mapping[str, Any]:
    pairs = (line.split("=", 1) for line in text.split("\n"))
    return {key: ast.literal_eval(value) for key, value in pairs}


@lru_cache
def _formats(text: str, width: int) -> GroupFormats:
    return GroupFormats.of(_parsed(text), {width})


def _project(
    gradient: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor], told: str, param: int, names: str
) -> list[Tensor]:
    group = _Told(told, numbers, gradient)
    of_name = dict(zip(names.split(","), state, strict=True))
    # of a weight the phase reads the shape
    found = one_parameter.project_(Parameter(gradient, gradient, group, of_name, param))
    return [found.low, found.norm, *(() if found.across is None else (found.across,))]


def _project_fake(
    gradient: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor], told: str, param: int, names: str
) -> list[Tensor]:
    group = _Told(told, numbers, gradient)
    side, rank, (m, n) = side_of(gradient.shape), layout.rank_of(group, gradient), gradient.shape
    shapes = {"right": (m, rank), "left": (rank, n)}
    assert group.rule is not None
    sketches = [gradient.new_empty(shapes[other_side(side)])] if group.rule.sketches else []
    return [gradient.new_empty(shapes[side]), gradient.new_empty((), dtype=torch.float32), *sketches]


def _update(
    weight: Tensor,
    state: Sequence[Tensor],
    numbers: Sequence[Tensor],
    gradient: Tensor | None,
    low: Tensor,
    across: Tensor | None,
    clip: Tensor | None,
    ok: Tensor,
    told: str,
    param: int,
    names: str,
) -> None:
    group = _Told(told, numbers, weight)
    of_name = dict(zip(names.split(","), state, strict=True))
    # of a gradient that is not handed over the phase reads the dtype, which R has too
    parameter = Parameter(weight, low if gradient is None else gradient, group, of_name, param)
    one_parameter.update_(parameter, Projected(low, low, across), clip, ok)


def _update_quantised(
    parts: Sequence[Tensor], format: str, size: Sequence[int], dtype: torch.dtype, *rest: Any
) -> None:
    m, n = size
    _update(QuantizedWeight.wrapped(parts, Format.parse(format), (m, n), dtype), *rest)


# -- the overloads ----------------------------------------------------------------------------------------------------


class Overloads(NamedTuple):
    """Of one operator: see the module."""

    seen: OpOverload[..., Any]
    traced: OpOverload[..., Any]
    unseen: OpOverload[..., Any]


def _unseen(schema: str, function: Callable[..., Any], fake: Callable[..., Any], *written: str) -> OpOverload[..., Any]:
    op = define(schema, function, fake)
    has_side_effect(op)  # nobody reads what it writes, and it may return nothing
    place = [each.name for each in op._schema.arguments].index
    COMPOSITES[op] = Composite(function, writes=tuple(map(place, written)), number=place("param"))
    return op


def _overloads(
    name: str, arguments: str, returns: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Overloads:
    plain = re.sub(r"\(\w!\)", "", arguments)
    seen = define(f"{name}({arguments}) -> {returns}", function, fake)
    count_writes(seen)
    written = [seen._schema.arguments[place].name for place in written_places(seen)]
    return Overloads(
        seen,
        define_traced(f"{name}.traced({arguments}) -> {returns}", function),
        _unseen(f"{name}.unseen({plain}) -> {returns}", function, fake, *written),
    )


_REST = "str told, int param, str names"
_OF_UPDATE = f"Tensor[] numbers, Tensor? gradient, Tensor low, Tensor? across, Tensor? clip, Tensor ok, {_REST}"

PROJECT = _overloads(
    "project_", f"Tensor gradient, Tensor(a!)[] state, Tensor[] numbers, {_REST}", "Tensor[]", _project, _project_fake
)
UPDATE = _overloads(
    "update_", f"Tensor(a!) weight, Tensor(b!)[] state, {_OF_UPDATE}", "()", _update, lambda *args: None
)
_UNSEEN_QUANTISED = _unseen(
    f"update_quantised_(Tensor[] parts, str format, int[] size, ScalarType dtype, Tensor[] state, {_OF_UPDATE}) -> ()",
    _update_quantised,
    lambda *args: None,
    "parts",
    "state",
)


def _update_seen(weight: QuantizedWeight, *rest: Any) -> None:
    if not is_fake(weight.parts[0]):
        _update(weight, *rest)


def _update_unseen(weight: QuantizedWeight, *rest: Any) -> None:
    assert not weight.transposed, "a parameter is a weight itself"
    _UNSEEN_QUANTISED(list(weight.parts), weight.format.text, list(weight.size_stored), weight.dtype, *rest)


HANDLERS[UPDATE.seen] = _update_seen
HANDLERS[UPDATE.unseen] = _update_unseen
