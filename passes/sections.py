"""Sections of a graph that do the same, whatever tensors they are given.

A node is what it calls, its constants, and what its result looks like.  The list of nodes is searched for repeats
(:mod:`qgalore_compile.passes.repeats`).  What stands in one section for another's sake would make it unlike the others:
what follows from inputs alone sinks to where it is read, and what several sections read rises out of the first one.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import fx

from qgalore_compile._ops import NUMBERED
from qgalore_compile._torch import kernel_side_table
from qgalore_compile.passes.crossing import is_pointwise, is_view
from qgalore_compile.passes.liveness import readers, size_in_bytes
from qgalore_compile.passes.nodes import (
    FUNCTIONALIZED,
    TRITON,
    anchors,
    aten,
    behind,
    first_version,
    is_tensor,
    looks,
    previous_version,
    value,
    written,
)
from qgalore_compile.passes.repeats import repeats

SHORTEST = 16
"""Nodes of a section; a call of a shorter one would save less than it costs."""


@dataclass(eq=False)
class Section:
    """A part of the graph that stands together: nodes in the graph's order."""

    nodes: list[fx.Node]

    def read(self) -> list[fx.Node]:
        """Those that others read."""
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]


def equal_sections(graph: fx.Graph) -> list[list[Section]]:
    """Equal sections of the graph."""
    _sink(graph)
    _close_up(graph)
    spelled: dict[fx.Node, Any] = {}
    found = _repeated(graph, spelled)
    if _hoist(graph, found):
        found = _repeated(graph, spelled)
    return found


def _sink(graph: fx.Graph) -> None:
    """Move what follows from inputs alone, and costs little, to where it is read, so that no section holds what another
    one, or none, reads."""
    changed = {written(anchor)[0] for anchor in anchors(graph)}
    settled = {node for node in graph.find_nodes(op="placeholder") if node not in changed}
    for node in graph.nodes:
        cheap = node.op == "call_function" and (
            is_view(node) or is_pointwise(node) or node.target is aten.empty.memory_format
        )
        if cheap and settled.issuperset(node.all_input_nodes):
            settled.add(node)
    for node in reversed(list(graph.nodes)):
        if node in settled and node.op == "call_function" and node.users:
            min(node.users).prepend(node)


def _close_up(graph: fx.Graph) -> None:
    """Move the results of a call directly behind it, and what writes them into inputs: no section ends in between."""
    for call in list(graph.nodes):
        if call.op == "call_function" and isinstance(value(call), (tuple, list)):
            for result in sorted((user for user in call.users if user.target is operator.getitem), reverse=True):
                call.append(result)
    for anchor in anchors(graph):
        target, source = written(anchor)
        if previous_version(source) is target and max(readers(target) - {anchor}, default=source) <= source:
            source.append(anchor)


def _repeated(graph: fx.Graph, spelled: dict[fx.Node, Any]) -> list[list[Section]]:
    nodes = [node for node in graph.nodes if node.op in ("call_function", "get_attr")]
    known: dict[Any, int] = {}
    for node in nodes:
        if node not in spelled:
            spelled[node] = does(node)
    numbers = [known.setdefault(spelled[node], len(known)) for node in nodes]
    found = repeats(numbers, SHORTEST, _Costs(nodes))
    return [[Section(nodes[start : start + each.length]) for start in each.starts] for each in found]


class _Costs:
    """What it costs to cut the list of nodes: bytes that live across the cut and are read within one period behind it.

    What is read later than that, a forward's activations in the backward, crosses wherever the cut is.
    """

    def __init__(self, nodes: list[fx.Node]) -> None:
        place = {node: index for index, node in enumerate(nodes)}
        self.uses = [(place[node], sorted(place[user] for user in node.users if user in place), _cost(node))
                     for node in nodes]  # fmt: skip

    def __call__(self, period: int) -> list[float]:
        """By place: the cost of a cut before it."""
        change = [0.0] * (len(self.uses) + 2)
        for at, places, cost in self.uses:
            near = [each for each in places if each - at < period]
            if near:
                change[at + 1] += cost
                change[near[-1] + 1] -= cost
        return list(accumulate(change))


def _cost(node: fx.Node) -> float:
    """Bytes of a tensor, little for a view or an input that is changed, and much for what cannot be handed over."""
    if not is_tensor(node):
        return 2.0**60
    return 1.0 if is_view(node) or first_version(node).op == "placeholder" else float(size_in_bytes(value(node)))


def _hoist(graph: fx.Graph, found: list[list[Section]]) -> bool:
    """Move what several equal sections read and none of them computes ahead, out of the section before the first one,
    which would be equal to them but for that; whether there is any."""
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    place = {node: index for index, node in enumerate(nodes)}
    home = {node for sections in found for section in sections for node in section.nodes}
    moved = False
    for sections in found:
        readers: Counter[fx.Node] = Counter()
        for section in sections:
            readers.update({each for node in section.nodes for each in node.all_input_nodes if each not in home})
        first, length = place[sections[0].nodes[0]], len(sections[0].nodes)
        target = nodes[max(first - 2 * length, 0)]
        for node in sorted(each for each, count in readers.items() if count > 1 and each in place):
            moved |= _move(node, target, home)
    return moved


def _move(node: fx.Node, target: fx.Node, home: set[fx.Node]) -> bool:
    """Move a node, and what it follows from, before another one; only where none of that is in a section."""
    moving = behind([node], lambda source: source.op != "placeholder" and target <= source)
    if node < target or target in moving or any(each in home for each in moving):
        return False
    for each in sorted(moving):
        target.prepend(each)
    return True


@dataclass(frozen=True)
class Number:
    """A parameter's number among the arguments of a call, in which layers differ."""

    value: int


Given = tuple[Any, Any]
"""Arguments and keyword arguments of a call."""


def given_to(node: fx.Node) -> Given:
    """What a node is given; numbers of parameters as :class:`Number`."""
    args, kwargs = node.args, dict(node.kwargs)
    op = args[0] if node.target is FUNCTIONALIZED else node.target
    if op in NUMBERED:
        name, index = NUMBERED[op].argument, NUMBERED[op].index
        if name in kwargs:
            kwargs[name] = _numbered(kwargs[name])
        else:
            args = (*args[:index], _numbered(args[index]), *args[index + 1 :])
    return args, kwargs


def _numbered(given: Any) -> Any:
    return [Number(each) for each in given] if isinstance(given, (list, tuple)) else Number(given)


def taken_by(node: fx.Node) -> list[Any]:
    """The nodes and numbers that a node is given, in order."""
    found: list[Any] = []
    fx.node.map_aggregate(
        given_to(node), lambda leaf: found.append(leaf) if isinstance(leaf, (fx.Node, Number)) else None
    )
    return found


def does(node: fx.Node) -> Any:
    """What a node does and what its result looks like; not which tensors it is given."""
    given = given_to(node)
    if node.target is TRITON:  # the constants stand in a table, once for each call
        index: Any = node.kwargs["constant_args_idx"]
        constants = kernel_side_table.get_constant_args(index)
        given = (given[0], {**given[1], "constant_args_idx": str(constants)})
    return node.target, str(_spelled(given)), looks(value(node))


def _spelled(given: Any) -> Any:
    if isinstance(given, (fx.Node, Number)):
        return type(given).__name__
    if isinstance(given, dict):
        return {name: _spelled(each) for name, each in given.items()}
    if isinstance(given, (list, tuple)):
        return [_spelled(each) for each in given]
    return given
