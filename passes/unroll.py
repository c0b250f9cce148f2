"""Put back the layers that AOTAutograd was not shown (:mod:`qgalore_compile.backend.reroll`).

    Before    … layer 2  layer 3 …  loss …  backward 3  backward 2 …  update 2  update 3 …
    After     … layer 2  layer 3 … layer 26 … layer 29 …  loss …  backward 29 … backward 3  backward 2 …

Requires  the graph as it was traced; the inputs of all layers, those of the missing ones unread.
Tier      exact: the graph is the one that all layers would have been traced to.

One layer is put back first, and the graph compared with the one that was traced with one layer more: a number of layers
that became a constant, an average that all of them write, terms that were merged or folded would show.  From seven to
eight is as from eight to nine: an induction, whose step is checked once.

The layers that are there are compared (:mod:`qgalore_compile.passes.columns`), from their inputs: forward,
backward, updates.  The missing ones become copies of the layer that stands before the gap, which read their own inputs
and each other as that one and the next do.  What stands on the far side of the gap reads across it where it read its
neighbour before.  A list of something of every layer, as of all norms, grows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from operator import attrgetter
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate

from qgalore_compile import rng
from qgalore_compile._torch import FakeTensor, tree_leaves
from qgalore_compile.passes.columns import EDGE, Columns, Missing, Place, Uneven, Window, windows
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.fresh import Fresh
from qgalore_compile.passes.nodes import INVOKE, aten, is_scalar, looks, value
from qgalore_compile.passes.sections import Number, does, given_to

GATHERS = frozenset({aten.cat.default, aten.stack.default})
"""What may take something of every layer."""


def unroll(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Put the missing layers into the graph, if there are any.

    Raises:
        Uneven: the layers that are there are not alike as they were traced; the graph may be changed by then.
    """
    if context.rerolled is None:
        return
    plan = context.rerolled
    try:
        _Unrolling(graph, context, plan.one).run(record)
        _check_expected(graph, plan.expected)
        _Unrolling(graph, context, plan.others).run(record)
    except Uneven as error:
        context.uneven = str(error)
        raise
    context.program["rerolled"] = {"traced": plan.one.kept, "copied": plan.one.layers + plan.others.layers}


def _check_expected(graph: fx.Graph, expected: list[str] | None) -> None:
    """With one layer put back, a graph must be the one that was traced with one layer more."""
    if expected is None:
        return
    found = spelled_out(graph)
    for one, other in zip_longest(found, expected, fillvalue="nothing"):
        if one != other:
            raise Uneven(f"with one layer more tracing makes {other} of what is {one}")


def spelled_out(graph: fx.Graph) -> list[str]:
    """A graph but for names and inputs that nobody reads: a line a node, which names others by their places."""
    nodes = [node for node in graph.nodes if node.users or node.op != "placeholder"]
    place = {node: f"%{index}" for index, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        target = "" if node.op == "placeholder" else node.target
        if node.op == "get_attr" and graph.owning_module is not None:
            held = attrgetter(str(node.target))(graph.owning_module)
            target = spelled_out(held.graph) if isinstance(held, fx.GraphModule) else f"{target} {looks(held)}"
        seen = "" if node.op == "output" else looks(node.meta.get("val"))
        lines.append(f"{node.op} {target} {fx.map_arg((node.args, node.kwargs), place.__getitem__)} {seen}")
    return lines


def taken(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node is given, in order."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _spelled(node: fx.Node) -> Hashable:
    """What a node calls, its constants but for a parameter's number, and how its result looks."""
    return (node.op, looks(value(node))) if node.op == "placeholder" else (node.op, does(node))


class _Unrolling:
    """Puts layers into a graph.

    Attributes:
        layers: how many are missing.
        cut: by column, the last coordinate in front of them.
        copies: by column and coordinate among all layers, what is put in.
    """

    def __init__(self, graph: fx.Graph, context: Context, plan: Missing) -> None:
        self.graph, self.context, self.plan = graph, context, plan
        self.layers = self.plan.layers
        self.copies: dict[Place, fx.Node] = {}
        self.template: dict[fx.Node, Place] = {}
        self.varying: dict[int, list[bool]] = {}
        self.number_of: dict[fx.Node, int] = {}
        known = self._inputs()
        self.columns = Columns(graph, [short for short, _, _ in known], self.plan.kept, taken, _spelled)
        self.cut: dict[int, int] = {}
        for short, missing, cut in known:
            column = self.columns.place[next(iter(short.values()))][0]
            self.cut[column] = cut
            self.copies.update({(column, at): node for at, node in missing.items()})
        self.nodes = [node for node in graph.nodes if node.op != "placeholder"]
        self.fresh = [Fresh() for _ in range(self.layers + 1)]

    def _inputs(self) -> list[tuple[dict[int, fx.Node], dict[int, fx.Node], int]]:
        """By column of inputs: those that are there, those of missing layers by coordinate, and the cut."""
        parts: dict[int | str, list[fx.Node]] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            origin = self.context.origin_of.get(node.name)
            if origin is not None:
                parts.setdefault(origin, []).append(node)
        for origin, number in self.plan.numbers.items():
            self.number_of.update(dict.fromkeys(parts.get(origin, ()), number))
        found = []
        for inputs, cut in zip(self.plan.inputs, self.plan.cut, strict=True):
            if not parts.keys() >= set(inputs.values()):
                raise Uneven("AOTAutograd gives one tensor for several inputs")
            for part in range(len(parts[next(iter(inputs.values()))])):
                all_ = {at: parts[origin][part] for at, origin in inputs.items()}
                missing = {at: node for at, node in all_.items() if 0 < at - cut <= self.layers}
                short = {at if at <= cut else at - self.layers: node for at, node in all_.items() if at not in missing}
                if any(node.users for node in short.values()):
                    found.append((short, missing, cut))
        return found

    def run(self, record: PassRecord) -> None:
        places = [self.columns.place.get(node) for node in self.nodes]
        found = sorted(windows(places, EDGE, 1), key=lambda each: each.start)
        for window in found:
            self.cut.update(place for place in (places[index] for index in window.part) if place is not None)
        for column, elements in enumerate(self.columns.of):
            if column not in self.cut:
                raise Uneven(f"{next(iter(elements.values())).name} stands apart from its layer")
        for window in found:
            self._fill(window)
            record.match(self.nodes[window.start])
        for node in self.nodes:
            if node in self.columns.place:
                self._rewire(node)
        self._gather()
        self._check_read()
        self._tell()

    def _fill(self, window: Window) -> None:
        part = [self.nodes[index] for index in window.part]
        upwards = window.step > 0
        before = self.nodes[window.part.stop] if upwards else part[0]
        with self.graph.inserting_before(before):
            for on in range(1, self.layers + 1) if upwards else range(self.layers, 0, -1):
                for node in part:
                    self._copy(node, on)

    def _copy(self, node: fx.Node, on: int) -> None:
        """Of a node, what it is so many layers on."""
        column, coordinate = self.columns.place[node]
        at = coordinate + on
        self._check_template(node)
        given = [old if relation is None else self._all(relation[0], at + relation[1])
                 for old, relation in zip(taken(node), self.columns.takes[column], strict=True)]  # fmt: skip
        following = iter(given)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(following))
        copy = self.graph.create_node(node.op, node.target, args, kwargs)
        self.template[copy] = column, at
        self._numbered(copy)
        fresh = self.fresh[on]
        for old, new in zip(taken(node), given, strict=True):
            for original, own in zip(tree_leaves(value(old)), tree_leaves(value(new)), strict=True):
                if isinstance(original, Tensor):
                    fresh.know(original, own)
        copy.meta = dict(node.meta)
        if "val" in node.meta:  # a function has none, and must have none
            copy.meta["val"] = fresh.of(value(node))
        copy.meta.pop("eager_input_vals", None)  # what tracing saw the other layer given
        self.copies[column, at] = copy

    def _check_template(self, node: fx.Node) -> None:
        """What is copied must take what its column does: one that is named by another layer may begin at an edge."""
        column, coordinate = self.columns.place[node]
        common = taken(self.columns.of[column][self.columns.core[0]])
        for old, other, relation in zip(taken(node), common, self.columns.takes[column], strict=True):
            if relation is None:
                alike = old is other
            else:
                alike = self.columns.place.get(old) == (relation[0], coordinate + relation[1])
            if not alike:
                raise Uneven(f"{node.name} takes {old.name}, unlike its likes")

    def _numbered(self, node: fx.Node) -> fx.Node:
        """Give a node the number of the parameter whose tensors it takes, where layers differ in one."""
        column, _ = self.columns.place.get(node, self.template.get(node, (-1, 0)))
        varies = self._varying(column)
        if not any(varies):
            return node
        found = {number for number in map(self._number, taken(node)) if number is not None}
        if len(found) != 1:
            raise Uneven(f"{node.name} takes tensors of {len(found)} parameters")
        (number,), which = found, iter(varies)
        own = rng.PROJECTOR_STREAM  # above it, a stream's bits
        node.args, node.kwargs = map_aggregate(
            given_to(node),
            lambda leaf: (leaf.value - leaf.value % own + number if next(which) else leaf.value)
            if isinstance(leaf, Number) else leaf,
        )  # fmt: skip
        return node

    def _number(self, node: fx.Node) -> int | None:
        """The number of the parameter that an input is of, or a number that follows from such inputs: of a drawn
        projector, the step divided by the steps that it stands for."""
        if node not in self.number_of and node.op == "call_function" and is_scalar(node):
            found = {number for number in map(self._number, taken(node)) if number is not None}
            if len(found) == 1:
                (self.number_of[node],) = found
        return self.number_of.get(node)

    def _varying(self, column: int) -> list[bool]:
        """Of the numbers that a column's nodes are given, which are other ones in another layer."""
        if column not in self.varying:
            first, second = (_numbers_of(self.columns.of[column][at]) for at in self.columns.core[:2])
            self.varying[column] = [one != other for one, other in zip(first, second, strict=True)]
        return self.varying[column]

    def _all(self, column: int, at: int) -> fx.Node:
        """Of a column, at a coordinate among all layers."""
        cut = self.cut[column]
        if cut < at <= cut + self.layers:
            return self.copies[column, at]
        return self.columns.element((column, at if at <= cut else at - self.layers))

    def _at(self, place: Place) -> int:
        """A coordinate among all layers."""
        column, coordinate = place
        return coordinate if coordinate <= self.cut[column] else coordinate + self.layers

    def _rewire(self, node: fx.Node) -> None:
        """Let a node that was there read across the gap."""
        column, coordinate = self.columns.place[node]
        given = taken(node)
        for index, relation in enumerate(self.columns.takes[column]):
            if relation is None or index >= len(given):
                continue
            source, offset = relation
            if self.columns.place.get(given[index]) == (source, coordinate + offset):
                given[index] = self._all(source, self._at((column, coordinate)) + offset)
        if given != taken(node):
            following = iter(given)
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(following))
            self._numbered(node)

    def _check_read(self) -> None:
        """Every input of a missing layer must be read as its likes are, or a part of the layer is missing still."""
        for (column, _), node in self.copies.items():
            likes = [each for at, each in self.columns.of[column].items() if at in self.columns.core]
            if node.op == "placeholder" and len(node.users) != len(likes[0].users):
                raise Uneven(f"{node.name} is read {len(node.users)} times, {likes[0].name} {len(likes[0].users)}")

    def _gather(self) -> None:
        """Let what takes something of every layer take it of the missing ones, and results grow with it."""
        lengths = set()
        for node in self.columns.gathering:
            if node.target not in GATHERS:
                raise Uneven(f"{node.name} reads something of every layer")
            lengths.update(value(node).shape)
            node.args = (self._lengthened(node.args[0]), *node.args[1:])  # type: ignore[arg-type]
        seen_anew = set(self.columns.gathering)
        for node in self.graph.nodes:
            if node in self.columns.gathering or not seen_anew.isdisjoint(node.all_input_nodes):
                told = node.op == "output" or _see_again(node, () if node in self.columns.gathering else lengths)
                seen_anew.update([] if told else [node])

    def _tell(self) -> None:
        """Let the context know of the layers that were put in, as of those that were there."""
        context, inputs = self.context, self.graph.find_nodes(op="placeholder")
        if context.updates is None:
            return
        place, by_name = {node: index for index, node in enumerate(inputs)}, {node.name: node for node in inputs}
        layers, others = context.updates.layers, context.updates.unmatched
        missing = {node.name for node in self.copies.values() if node.op == "placeholder"}
        others[:] = [other for other in others if other.input not in missing]
        products = context.program.get("unfused_products", [])
        for layer in list(layers):
            for on, input_ in self._likes(layer.parameter[0]):
                name = self._noted(layer.name, input_, products)
                found = {each.name: self._on(getattr(layer, each.name), on) for each in fields(layer)}
                layers.append(replace(layer, **{**found, "name": name}))
        for other in list(others):
            for _, input_ in self._likes(by_name.get(other.input)):
                name = self._noted(other.name, input_, products)
                others.append(replace(other, name=name, input=input_.name))
        layers.sort(key=lambda each: place[each.parameter[0]])
        others.sort(key=lambda each: place[by_name[each.input]] if each.input else -1)
        if "functions" in context.program:
            calls = self.graph.find_nodes(op="call_function", target=INVOKE)
            context.program["functions"] = dict(Counter(str(call.args[1]) for call in calls))

    def _noted(self, name: str, input_: fx.Node, products: list[dict[str, str]]) -> str:
        """The name of what is like a parameter, of which the same is told."""
        like = self.context.name_of.get(input_.name, input_.name)
        if name in self.context.notes:
            self.context.notes[like] = replace(self.context.notes[name])
        products += [{**each, "name": like} for each in products if each["name"] == name]
        return like

    def _likes(self, node: fx.Node | None) -> Iterator[tuple[int, fx.Node]]:
        """Of an input in the layer before the gap: how many layers on, and which input, each one put in is."""
        place = self.columns.place.get(node) if node is not None else None
        if place is not None and place[1] == self.cut[place[0]]:
            for on in range(1, self.layers + 1):
                yield on, self.copies[place[0], place[1] + on]

    def _on(self, found: Any, on: int) -> Any:
        """What holds nodes, so many layers on; a node of no layer is the same one."""
        if isinstance(found, (list, tuple)):
            return type(found)(self._on(each, on) for each in found)
        place = self.columns.place.get(found) if isinstance(found, fx.Node) else None
        if place is None:
            return found
        column, coordinate = place
        return self._all(column, self._at((column, coordinate)) + on)

    def _lengthened(self, given: Sequence[fx.Node]) -> list[fx.Node]:
        places = [self.columns.place.get(each) for each in given]
        found = windows(places, EDGE, 1)
        cut = {place[0]: place[1] for window in found for place in (places[at] for at in window.part) if place}
        behind = {(window.part.stop if window.step > 0 else window.start): window for window in found}
        longer: list[fx.Node] = []
        for index, (node, place) in enumerate(zip(given, places, strict=True)):
            longer += self._inserted(behind.get(index), places)
            if place is None or place[0] not in cut:
                longer.append(node)
            else:
                column, coordinate = place
                longer.append(self._all(column, coordinate + (self.layers if coordinate > cut[column] else 0)))
        return longer + self._inserted(behind.get(len(given)), places)

    def _inserted(self, window: Window | None, places: Sequence[Place | None]) -> list[fx.Node]:
        if window is None:
            return []
        orders: Iterable[int] = range(1, self.layers + 1) if window.step > 0 else range(self.layers, 0, -1)
        part = [place for place in (places[index] for index in window.part) if place is not None]
        return [self._all(column, coordinate + on) for on in orders for column, coordinate in part]


def _numbers_of(node: fx.Node) -> list[int]:
    found: list[int] = []
    map_aggregate(given_to(node), lambda leaf: found.append(leaf.value) if isinstance(leaf, Number) else None)
    return found


def _see_again(node: fx.Node, lengths: Collection[int]) -> bool:
    """Compute how a node's result looks; whether it looks as before.

    Args:
        lengths: that lists of something of every layer had, which nothing may be told as a constant.
    """
    before = looks(value(node))
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    leaves = tree_leaves((args, kwargs))
    if any(leaf in lengths for leaf in leaves if type(leaf) is int):
        raise Uneven(f"{node.name} is told how long a list of something of every layer is")
    some = next(leaf for leaf in leaves if isinstance(leaf, FakeTensor))
    try:
        with some.fake_mode:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError as error:
        raise Uneven(f"{node.name} takes no longer list of something of every layer: {error}") from error
    return looks(value(node)) == before
