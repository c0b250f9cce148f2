"""Make equal layers calls of one function, so that Inductor compiles a layer once, however many there are.

    Before    %1 = …  %2 = …  %3 = …    %4 = …  %5 = …  %6 = …    %7 = …  %8 = …  %9 = …
    After     %x = invoke_subgraph(@layer, %x0, %w1, …)
              %y = invoke_subgraph(@layer, %x, %w2, …)
              %z = invoke_subgraph(@layer, %y, %w3, …)

Requires  nodes in the order in which they will run; all else that this package does to a graph.
Tier      exact: the same operations on the same values.  Where Inductor fuses operations of a low-precision type it
          leaves roundings out, and it fuses none across a call.

The list of nodes is searched for equal sections (:mod:`qgalore_compile.passes.repeats`): what each node calls, with
what constants, and what its result looks like.  No name of a layer and no module counts, so that a forward, a backward
with the updates that ``order`` has put there, and a tail of updates are all found the same way.  Sections whose nodes
take each other's results in the same way become one function.  Its arguments are what they take from elsewhere.  What
differs between layers otherwise, the number of a parameter from which random bits follow, becomes a tensor.

A function changes tensors as the graph does, by ``copy_`` into its arguments: what is updated inside is neither
returned nor copied, and who reads it behind a call reads the argument.  What crosses is chosen by
:mod:`qgalore_compile.passes.crossing`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qgalore_compile import rng
from qgalore_compile._ops import NUMBERED
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.crossing import crossing, is_view
from qgalore_compile.passes.functions import add_function, call_function
from qgalore_compile.passes.liveness import readers
from qgalore_compile.passes.nodes import (
    ANCHOR,
    FUNCTIONALIZED,
    anchors,
    aten,
    first_version,
    is_anchor,
    is_tensor,
    looks,
    make,
    previous_version,
    prims,
    value,
    written,
)
from qgalore_compile.passes.placement import base
from qgalore_compile.passes.sections import Number, Section, does, equal_sections, given_to, taken_by

MUCH = 1_000
"""Nodes that calls must save for layers to be outlined unasked: below, there is little to win.  Eight layers of a LLaMA
save 2,800, and their first step takes 44 s in place of 53."""


def outline(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace equal sections of the graph by calls, where the option asks for it or it saves much."""
    if context.outline is False or (context.outline is None and not _is_on_cpu(graph)):
        return
    equal = equal_sections(graph)
    if context.outline is None and _saved(equal) < MUCH:
        return
    _hand_over(graph, [section for sections in equal for section in sections])
    calls_of = _Calls(graph, {node for sections in equal for section in sections for node in section.nodes})
    calls: Counter[str] = Counter()
    for sections in equal:
        for alike in _alike(sections, record):
            function = _Function.of(alike, record)
            if function is None:
                continue
            name = function.define(graph)
            for place, section in enumerate(function.sections):
                record.match(section.nodes[0])
                calls_of.put(name, function, place)
                calls[name] += 1
    context.program["functions"] = {**context.program.get("functions", {}), **calls}


def _is_on_cpu(graph: fx.Graph) -> bool:
    """Whether all inputs are; on a GPU functions have not run yet."""
    inputs = graph.find_nodes(op="placeholder")
    return all(value(node).device.type == "cpu" for node in inputs if is_tensor(node))


def _saved(equal: list[list[Section]]) -> int:
    """Nodes of sections that are like an earlier one."""
    return sum(len(section.nodes) for sections in equal for section in sections[1:])


# -- what crosses ------------------------------------------------------------------------------------------------------


def _hand_over(graph: fx.Graph, sections: list[Section]) -> None:
    """Compute again, where it is read, what a section need not hand over."""
    home = {node: section for section in sections for node in section.nodes}
    place = {node: index for index, node in enumerate(graph.nodes)}
    first: dict[fx.Node, int] = {}
    for anchor in anchors(graph):
        first.setdefault(written(anchor)[0], place[anchor])
    for section in sorted(sections, key=lambda each: place[each.nodes[0]], reverse=True):
        inside, read = set(section.nodes), section.read()
        readers = [user for node in read for user in node.users if user not in inside]
        latest = max([place.get(user, 0) for user in readers], default=0)
        given = {each for each in graph.find_nodes(op="placeholder") if first.get(each, latest + 1) > latest}
        returned = {node for node in read for user in node.users if user.op == "output"}
        stays = crossing(inside, read, given) | returned
        copies = _Copies(graph, inside - stays, home, place)
        for reader in sorted({user for node in read if node not in stays for user in node.users} - inside):
            copies.hand_to(reader)


class _Copies:
    """Copies of what does not cross, one for each section that reads it."""

    def __init__(
        self, graph: fx.Graph, instead: set[fx.Node], home: dict[fx.Node, Section], place: dict[fx.Node, int]
    ) -> None:
        self.graph, self.instead, self.home, self.place = graph, instead, home, place
        self.made: dict[tuple[Section | None, fx.Node], fx.Node] = {}

    def hand_to(self, reader: fx.Node) -> None:
        """Let a node read copies."""
        for node in reader.all_input_nodes:
            if node in self.instead:
                reader.replace_input_with(node, self._copy(node, reader))

    def _copy(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        section = self.home.get(reader)
        found = self.made.get((section, node))
        if found is not None and found < reader:
            return found
        inputs = {each: self._copy(each, reader) for each in node.all_input_nodes if each in self.instead}
        with self.graph.inserting_before(reader):
            copy = self.graph.node_copy(node, lambda each: inputs.get(each, each))
        self.made[section, node] = copy
        self.place[copy] = self.place[reader]
        if section is not None:
            self.home[copy] = section
            section.nodes.insert(section.nodes.index(reader), copy)
        return copy


# -- functions ---------------------------------------------------------------------------------------------------------


def _alike(sections: list[Section], record: PassRecord) -> list[list[Section]]:
    """The sections that one function can stand for, twice or more often."""
    found: dict[str, list[Section]] = defaultdict(list)
    for section in sections:
        problem = _problem(section)
        if problem is None:
            found[_signature(section)].append(section)
        else:
            record.skip(section.nodes[0], problem)
    for alike in found.values():
        if len(alike) == 1:
            record.skip(alike[0].nodes[0], "takes its own results in another way than sections that do the same")
    return [alike for alike in found.values() if len(alike) > 1]


def _problem(section: Section) -> str | None:
    """Why a section cannot be a function of its own."""
    inside = set(section.nodes)
    changed = {base(each) for node in section.nodes if is_anchor(node) for each in written(node)}
    for node in section.nodes:
        for source in node.all_input_nodes:
            if source not in inside and not is_tensor(source):
                return f"{node.name} takes {source.name}, which is no tensor"
    for node in section.read():
        if not is_tensor(node):
            return f"{node.name}, which others read, is no tensor"
        if previous_version(node) is not None:
            if _is_read_old(node, inside):
                return f"{node.name}, which others read, is a changed tensor that is read as it was, too"
        elif is_view(node) or node in changed:
            return f"{node.name}, which others read, lies in the memory of another tensor"
    return None


def _is_read_old(version: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a tensor that a section changes cannot stand for what it then holds: it is neither an input nor of the
    section's own, the section changes it again, or behind the section somebody reads what was there before."""
    first = first_version(version)
    if not (first.op == "placeholder" or first in inside) or any(previous_version(each) is version for each in inside):
        return True
    last = max(inside)
    held = previous_version(version)
    while held is not None:
        newer = (user for user in readers(held) if user not in inside and last < user)
        if any(not (is_anchor(user) and written(user)[0] is held) for user in newer):
            return True
        held = previous_version(held)
    return False


def _signature(section: Section) -> str:
    """What the nodes do, how they take each other's results, and the looks of what they take from elsewhere."""
    place = {node: index for index, node in enumerate(section.nodes)}
    lines = []
    for node in section.nodes:
        named = [str(place[each]) if each in place else looks(value(each)) for each in node.all_input_nodes]
        lines.append(f"{does(node)} {named}")
    return "\n".join(lines)


Taken = tuple[Any, ...]
"""One argument of a function: what each section takes there, a tensor from elsewhere or a :class:`Number`."""


@dataclass
class _Function:
    """A function of sections that are alike.

    Attributes:
        sections: that it stands for.
        taken: its arguments.
        outputs: places, in a section, of what others read.
        changed: of those, what is an argument that the function has changed, and which.
    """

    sections: list[Section]
    taken: list[Taken]
    outputs: list[int]
    changed: dict[int, Taken]

    @property
    def returned(self) -> list[int]:
        """Places of what is returned."""
        return [index for index in self.outputs if index not in self.changed]

    @classmethod
    def of(cls, sections: list[Section], record: PassRecord) -> _Function | None:
        """None where fewer than two sections can be calls of it."""
        while len(sections) > 1:
            taken = _taken(sections)
            bad = _conflict(sections, taken)
            if bad is None:
                places = [{each.nodes.index(node) for node in each.read()} for each in sections]
                outputs = sorted(set().union(*places))
                first = [_before(sections[0], index) for index in outputs]
                changed = {index: each for index, node in zip(outputs, first, strict=True)
                           for each in taken if each[0] is node}  # fmt: skip
                return cls(sections, taken, outputs, changed)
            record.skip(bad.nodes[0], "takes a tensor that it changes under a second name")
            sections = [each for each in sections if each is not bad]
        return None

    def define(self, graph: fx.Graph) -> str:
        """Make it part of the graph's module; its name."""
        body = fx.Graph()
        first = self.sections[0]
        arguments: dict[Taken, fx.Node] = {}
        for index, each in enumerate(self.taken):
            arguments[each] = body.placeholder(f"input_{index}")
            example = each[0]
            arguments[each].meta["val"] = value(example) if isinstance(example, fx.Node) else _number(graph)
        made: dict[fx.Node, fx.Node] = {}
        for nodes in zip(*(each.nodes for each in self.sections), strict=True):
            taken = list(zip(*map(taken_by, nodes), strict=True))
            stands = [arguments[each] if each in arguments else made[each[0]] for each in taken]
            made[nodes[0]] = _as_inside(body, nodes[0], stands)
        for index, target in self.changed.items():
            holds = made[first.nodes[index]]
            if not any(is_anchor(user) for user in holds.users):
                make(body, ANCHOR, arguments[target], holds)
        anchors_inside = body.find_nodes(op="call_function", target=ANCHOR)
        targets = {anchor.args[0] for anchor in anchors_inside}
        written_to = [index for index, each in enumerate(self.taken) if arguments[each] in targets]
        returned = [made[first.nodes[index]] for index in self.returned]
        return add_function(graph, body, returned, written_to)


def _before(section: Section, index: int) -> fx.Node | None:
    """What of another section a node of this one is a changed version of; None where it is none."""
    node: fx.Node | None = section.nodes[index]
    inside = set(section.nodes)
    while node in inside:
        node = previous_version(node)
    return node


def _as_inside(body: fx.Graph, node: fx.Node, stands: list[fx.Node]) -> fx.Node:
    """A copy of a node in a function's body, with what stands there for each of its tensors and numbers, in order."""
    following = iter(stands)
    args, kwargs = fx.node.map_aggregate(
        given_to(node), lambda leaf: next(following) if isinstance(leaf, (fx.Node, Number)) else leaf
    )
    copy = body.node_copy(node, lambda each: each)
    if node.target is FUNCTIONALIZED and args[0] in NUMBERED:
        args = (NUMBERED[args[0]].overload, *args[1:])
    elif node.target in NUMBERED:
        copy.target = NUMBERED[node.target].overload
    copy.args, copy.kwargs = args, kwargs
    copy.meta.pop("eager_input_vals", None)  # Inductor checks a call's arguments against what tracing saw
    return copy


def _taken(sections: list[Section]) -> list[Taken]:
    """The arguments: what stands at one place of each section is one, and what stands at two places of all is, too."""
    inside = set(sections[0].nodes)
    taken: dict[Taken, None] = {}
    for nodes in zip(*(each.nodes for each in sections), strict=True):
        for given in zip(*map(taken_by, nodes), strict=True):
            if given[0] not in inside:
                taken[given] = None
    return list(taken)


def _conflict(sections: list[Section], taken: list[Taken]) -> Section | None:
    """A section that takes a tensor twice, and changes it: the function would not know that both are one."""
    for place, section in enumerate(sections):
        changed = {written(node)[0] for node in section.nodes if is_anchor(node)}
        held = Counter(base(each[place]) for each in taken if isinstance(each[place], fx.Node))
        if any(held[each] > 1 for each in changed):
            return section
    return None


def _number(graph: fx.Graph) -> Tensor:
    """What a number of a parameter looks like as an argument."""
    some = next(value(node) for node in graph.nodes if is_tensor(node))
    with some.fake_mode:
        return torch.empty((), dtype=torch.int64, device="cpu")


class _Calls:
    """Puts calls in the place of sections.

    Attributes:
        kept: nodes of sections.
        replaced: by a node of a section that is gone, the result of a call that stands for it.
    """

    def __init__(self, graph: fx.Graph, kept: set[fx.Node]) -> None:
        self.graph, self.kept = graph, kept
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.numbers: dict[int, fx.Node] = {}
        self.counts: dict[int, fx.Node] = {}

    def put(self, name: str, function: _Function, place: int) -> None:
        """Put a call of a function in the place of one of its sections."""
        nodes = function.sections[place].nodes
        given = [each[place] for each in function.taken]
        arguments = [self._number(each.value) if isinstance(each, Number) else self.replaced.get(each, each)
                     for each in given]  # fmt: skip
        with self.graph.inserting_before(nodes[0]):
            _, results = call_function(self.graph, name, arguments, [nodes[index] for index in function.returned])
        stands = dict(zip(function.returned, results, strict=True))
        stands |= {index: arguments[function.taken.index(each)] for index, each in function.changed.items()}
        for index, result in stands.items():
            nodes[index].replace_all_uses_with(result)
            self.replaced[nodes[index]] = result
        for node in reversed(nodes):
            self.graph.erase_node(node)
        changed = dict.fromkeys(given[function.taken.index(each)] for each in function.changed.values())
        for anchor in [user for each in changed for user in each.users if is_anchor(user)]:
            # what was to be written there has been; a section that is yet to be replaced takes its anchors along
            if anchor.args[0] is anchor.args[1] and anchor not in self.kept:
                self.graph.erase_node(anchor)

    def _number(self, number: int) -> fx.Node:
        """A parameter's number as a 0-d tensor on the CPU: a part of one that counts from 0, or from where the numbers
        of its stream of random bits begin."""
        if number not in self.numbers:
            place = number % rng.PROJECTOR_STREAM  # above it, a stream's bits
            count = self._count(number - place)
            length = max(value(count).shape[0], place + 1)
            count.args = (length,)
            count.meta["val"] = value(count).new_empty(length)
            with self.graph.inserting_after(count):
                self.numbers[number] = make(self.graph, aten.select.int, count, 0, place)
        return self.numbers[number]

    def _count(self, start: int) -> fx.Node:
        """The tensor that counts from there."""
        if start not in self.counts:
            with self.graph.inserting_before(next(each for each in self.graph.nodes if each.op != "placeholder")):
                self.counts[start] = make(
                    self.graph, prims.iota.default, 1, start=start, step=1, dtype=torch.int64,
                    device=torch.device("cpu"), requires_grad=False,
                )  # fmt: skip
        return self.counts[start]
