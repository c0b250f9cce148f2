"""Equal layers, traced once: most of them are taken out of Dynamo's graph before AOTAutograd walks over it.

    Dynamo's graph     embed  layer 0  layer 1  layer 2  …  layer 29  loss  grad  update 0 … update 29
    AOTAutograd's      embed  layer 0  layer 1  layer 2     layer 29  loss  grad  update 0 … update 29, without 3 … 28

AOTAutograd takes more than a second a layer, most of it for what it has found out of an equal layer before.  What it is
given here has the inputs of all layers and the operations of a few; the pass ``unroll`` puts the others back, forward,
backward and updates, as copies of those in the middle with their own inputs.

Layers are found by structure, in Dynamo's graph and once more in what comes out (:mod:`..passes.columns`), which says
what must be alike: operations, constants, how results look, which results are read where.  What is not is traced whole.
Loops that were unrolled are rolled up again by the compilers' *rerolling*.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.nn import functional

from qgalore_compile._torch import compile_fx
from qgalore_compile.backend import one_more
from qgalore_compile.composites import COMPOSITES, without_number
from qgalore_compile.passes import PassManager
from qgalore_compile.passes.columns import EDGE, Columns, Missing, Rerolled, Uneven, windows
from qgalore_compile.passes.nodes import arguments, looks
from qgalore_compile.passes.repeats import repeats

log = logging.getLogger(__name__)

KEPT = 2 * EDGE + 3
"""Layers that are traced: the edges, and three between them that are compared."""

LEAST = KEPT + 2
"""Layers that there must be."""

WORTH = 20
"""Layers from which on it is done unasked: seven are traced, and eight to compare with them."""

SHORTEST = 3
"""Nodes of a layer in Dynamo's graph."""

GRADIENTS = torch.autograd.grad
ATTENTION = functional.scaled_dot_product_attention
STACKS: frozenset[Any] = frozenset({torch.stack, torch.cat})
"""What may gather something of all layers beside the gradient: norms."""


DROPOUT: frozenset[Any] = frozenset({
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout, torch.dropout,
})  # fmt: skip
"""What draws by probability and in training alone."""


class Reduced(NamedTuple):
    """A graph with fewer layers.

    Attributes:
        fewer: a module with KEPT layers, and the inputs of all.
        more: one with one layer more.
        missing: what brings the one's graph to the other's, and that to the graph of all layers.
    """

    fewer: fx.GraphModule
    more: fx.GraphModule
    missing: tuple[Missing, Missing]


def compiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    manager: PassManager,
    unseen_writes: Sequence[int],
    *,
    known: bool | None = None,
    **settings: Any,
) -> Callable[..., Any]:
    """What Inductor makes of a graph; AOTAutograd is shown a few layers where layers are alike.

    Args:
        gm, example_inputs: from Dynamo.
        manager: of the passes; where they put no layers back, all are traced.
        unseen_writes: numbers of the inputs that operators write unseen (``unseen.hide``).
        known: whether layers of this very graph could be put back before; None where nobody has tried.
        **settings: of ``compile_fx``.
    """
    fewer = gm
    if manager.unrolls and known is not False:
        try:
            reduced = reroll(gm, unseen_writes, manager.rerolls)
            expected = None if known else one_more.traced(reduced.more, example_inputs, manager, settings)
            fewer, manager.rerolled = reduced.fewer, Rerolled(*reduced.missing, expected)
        except Uneven as error:
            log.debug("all layers are traced: %s", error)
    try:
        return cast("Callable[..., Any]", compile_fx(fewer, example_inputs, **settings))
    except Exception as error:
        if manager.rerolled is None:
            raise
        # without layers a graph need not even be one: what is told how many there are may not fit what there is
        log.info("all layers are traced after all, which takes longer: %s", manager.context.uneven or error)
    manager.rerolled = None
    return cast("Callable[..., Any]", compile_fx(gm, example_inputs, **settings))


def reroll(gm: fx.GraphModule, unseen_writes: Sequence[int], least: int = LEAST) -> Reduced:
    """A graph with fewer layers and the same inputs.

    Args:
        gm: from Dynamo, which stays as it is.
        unseen_writes: numbers of the inputs that operators write unseen (``unseen.hide``).
        least: layers that there must be.

    Raises:
        Uneven: it has no layers enough that are alike.
    """
    spell = _Spelling(gm)
    reasons = []
    for known, count in _layers(gm, spell, least):
        try:
            columns = Columns(gm.graph, known, count, taken, spell)
            _check_draws(columns)
            made = [_Reduction(gm, columns, count - kept, set(unseen_writes)).made(count) for kept in (KEPT, KEPT + 1)]
        except Uneven as error:
            reasons.append(str(error))
            continue
        (fewer, missing), (more, others) = made
        return Reduced(fewer, more, (_between(missing, others), others))
    raise Uneven("; ".join(reasons) or f"no {least} layers stand in a row")


def _between(missing: Missing, others: Missing) -> Missing:
    """Of two graphs, one with a layer less than the other, what the one is without."""
    if missing.cut != others.cut:
        raise Uneven("a layer more goes elsewhere")
    inputs = []
    for column, cut in zip(missing.inputs, missing.cut, strict=True):
        there = {at: number for at, number in column.items() if not cut < at <= cut + others.layers}
        inputs.append({at if at <= cut else at - others.layers: number for at, number in there.items()})
    return replace(missing, layers=1, inputs=inputs)


def taken(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node is given, in order; a gradient is given what it is the gradient of."""
    if _is_gradient(node):
        gradients, index = arguments(node)
        return [gradients.args[1][index]]
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _is_gradient(node: fx.Node) -> bool:
    """Whether a node is one of the results of ``autograd.grad(loss, [weights])``."""
    if node.target is not operator.getitem or getattr(node.args[0], "target", None) is not GRADIENTS:
        return False
    given = arguments(arguments(node)[0])
    return len(given) > 1 and isinstance(given[1], (list, tuple))


class _Spelling:
    """What Dynamo's nodes are but for the nodes that they are given, and parameters' numbers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm

    def __call__(self, node: fx.Node) -> Hashable:
        seen = _seen(node.meta.get("example_value"))
        if node.op == "placeholder":
            return node.op, seen
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(self.gm)
            return node.op, _body(held) if isinstance(held, fx.GraphModule) else f"{node.target} {looks(held)}"
        if _is_gradient(node):
            return "gradient", seen
        args = without_number(node)
        return node.op, node.target, str(fx.map_arg((args, node.kwargs), lambda _: _NODE)), seen


class _Node:
    def __repr__(self) -> str:
        return "%"


_NODE: Any = _Node()


def _body(held: fx.GraphModule) -> str:
    """A function that an operator is given, as text without names."""
    place = {node: f"%{index}" for index, node in enumerate(held.graph.nodes)}
    lines = []
    for node in held.graph.nodes:
        target = "" if node.op in ("placeholder", "output") else node.target
        if node.op == "get_attr":
            inner = operator.attrgetter(str(node.target))(held)
            target = _body(inner) if isinstance(inner, fx.GraphModule) else f"{id(inner)}"  # one tensor, or another
        lines.append(f"{node.op} {target} {fx.map_arg((node.args, node.kwargs), place.__getitem__)}")
    return "\n".join(lines)


def _seen(value: Any) -> str:
    """How a fake value looks to AOTAutograd."""
    if isinstance(value, (tuple, list)):
        return str([_seen(each) for each in value])
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value}" if isinstance(value, (int, float, bool)) else looks(value)
    inner, context = value.__tensor_flatten__() if hasattr(value, "__tensor_flatten__") else ((), None)
    parts = [_seen(getattr(value, name)) for name in inner]
    return f"{type(value).__name__} {value.requires_grad} {value.storage_offset()} {looks(value)} {context} {parts}"


def _layers(gm: fx.GraphModule, spell: _Spelling, least: int) -> Iterator[tuple[list[dict[int, fx.Node]], int]]:
    """Columns of each stretch of nodes that repeats in tandem, the longest first, and how often it does."""
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    numbers: dict[Hashable, int] = {}
    for each in repeats([numbers.setdefault(spell(node), len(numbers)) for node in nodes], SHORTEST):
        in_a_row = all(later - earlier == each.length for earlier, later in pairwise(each.starts))
        if in_a_row and len(each.starts) >= least:
            yield [{layer: nodes[start + place] for layer, start in enumerate(each.starts)}
                   for place in range(each.length)], len(each.starts)  # fmt: skip


def _check_draws(columns: Columns) -> None:
    """What layers draw is numbered, which shows when all has been traced: sooner where it is dropout."""
    for elements in columns.of:
        node = elements[columns.core[0]]
        drops = node.target in DROPOUT and _given(node, 1, "p", 0.5) and _given(node, 2, "training", True)
        if drops or (node.target is ATTENTION and _given(node, 4, "dropout_p", 0.0)):
            raise Uneven(f"{node.name} draws")


def _given(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


class _Reduction:
    """Takes layers out of a graph.

    Attributes:
        cut: by column, the last coordinate in front of what goes.
    """

    def __init__(self, gm: fx.GraphModule, columns: Columns, layers: int, unseen: set[int]) -> None:
        self.gm, self.columns, self.layers = gm, columns, layers
        self.inputs = {node: index for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self.cut: dict[int, int] = {}
        self._cut_calls()
        self._cut_inputs()
        self._check_gathering()
        self._check_writes(unseen)
        self.numbers = self._find_numbers()

    def _check_gathering(self) -> None:
        """Lists must hold what goes once, in the layers' order: it is put back so."""
        for node in self.columns.gathering:
            if node.target not in (GRADIENTS, *STACKS):
                raise Uneven(f"{node.name} reads something of every layer")
            given: Any = arguments(node)
            for each in given[:2] if node.target is GRADIENTS else given[:1]:
                self._check_list(node, each if isinstance(each, (list, tuple)) else [each])
            others = [each for each in given if not isinstance(each, (list, tuple))]
            if any(self._goes(each) for each in others if isinstance(each, fx.Node)):
                raise Uneven(f"{node.name} reads something of every layer, and not as a list")

    def _check_list(self, node: fx.Node, given: Sequence[Any]) -> None:
        if not all(isinstance(each, fx.Node) for each in given):
            raise Uneven(f"{node.name} reads something of every layer, and not as a list")
        places = [self.columns.place.get(each) for each in given]
        found = windows(places, EDGE, self.layers + 1)
        if sum(map(self._goes, given)) != self.layers * sum(len(window.part) for window in found):
            raise Uneven(f"{node.name} reads something of a layer more than once")

    def _cut_calls(self) -> None:
        nodes = [node for node in self.gm.graph.nodes if node.op != "placeholder"]
        places = [self.columns.place.get(node) for node in nodes]
        for window in windows(places, EDGE, self.layers + 1):
            self.cut.update(place for place in (places[index] for index in window.part) if place is not None)

    def _cut_inputs(self) -> None:
        for column, takes in enumerate(self.columns.takes):
            if column not in self.cut:
                continue
            for place in takes:
                if place is not None and self._is_input(place[0]):
                    self.cut.setdefault(place[0], self.cut[column] + place[1])
        for column, elements in enumerate(self.columns.of):
            if column not in self.cut:
                raise Uneven(f"{next(iter(elements.values())).name} stands apart from its layer")
            for on in range(1, self.layers + 2):
                self.columns.element((column, self.cut[column] + on))
            first = self.cut[column] + 1
            if first not in self.columns.core or first + self.layers - 1 not in self.columns.core:
                raise Uneven(f"{self.columns.some(column)} is named by what stands layers away")

    def _is_input(self, column: int) -> bool:
        return next(iter(self.columns.of[column].values())).op == "placeholder"

    def _check_writes(self, unseen: set[int]) -> None:
        """AOTAutograd must not be shown a write into an input of a layer that goes: it would know nothing of it."""
        for node, index in self.inputs.items():
            value = node.meta.get("example_value")
            place = self.columns.place.get(node)
            if place is not None and isinstance(value, Tensor) and index not in unseen and value._version:
                raise Uneven(f"{node.name} is written in AOTAutograd's sight")

    def made(self, count: int) -> tuple[fx.GraphModule, Missing]:
        """The module without what goes, and the plan."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder" or not self._goes(node):
                made[node] = self._copied(graph, node, made)
        module = fx.GraphModule(self.gm, graph)
        module.meta = dict(self.gm.meta)
        if hasattr(self.gm, "_param_name_to_source"):
            module._param_name_to_source = self.gm._param_name_to_source
        plan = Missing(self.layers, count - self.layers, numbers=self.numbers)
        for column, elements in enumerate(self.columns.of):
            if self._is_input(column):
                plan.inputs.append({at: self.inputs[node] for at, node in elements.items()})
                plan.cut.append(self.cut[column])
        return module, plan

    def _copied(self, graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = node.args, node.kwargs
        if node in self.columns.gathering:
            args, kwargs = fx.map_arg(self._gathered(node), made.__getitem__)
        elif _is_gradient(node):
            gradients, (weight,) = made[arguments(node)[0]], self._given(node)
            args = (gradients, arguments(gradients)[1].index(made[weight]))
        else:
            given = self._given(node)
            following = iter([made[each] for each in given])
            args, kwargs = fx.map_arg((args, kwargs), lambda _: next(following))
            args = self._numbered(node, args, given)
        copy = graph.create_node(node.op, node.target, args, kwargs, name=node.name, type_expr=node.type)
        copy.meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
        return copy

    def _numbered(self, node: fx.Node, args: tuple[Any, ...], given: list[fx.Node]) -> tuple[Any, ...]:
        """Arguments with the number of the parameter whose tensors they are."""
        composite = COMPOSITES.get(node.target)
        if composite is None or composite.number is None or node not in self.columns.place:
            return args
        found = {self.numbers[self.inputs[each]] for each in given if self.inputs.get(each) in self.numbers}
        if len(found) != 1:
            raise Uneven(f"{node.name} takes tensors of {len(found)} parameters")
        return (*args[: composite.number], found.pop(), *args[composite.number + 1 :])

    def _find_numbers(self) -> dict[int, int]:
        """Of each input of a layer, the number of the parameter that it is, or is a state of."""
        numbers: dict[int, int] = {}
        for node in self.gm.graph.nodes:
            composite = COMPOSITES.get(node.target)
            if composite is not None and composite.number is not None and node in self.columns.place:
                number: Any = node.args[composite.number]
                for source in taken(node):
                    of_layer = source in self.columns.place and source in self.inputs
                    if of_layer and numbers.setdefault(self.inputs[source], number) != number:
                        raise Uneven(f"{source.name} is of two parameters")
        return numbers

    def _goes(self, node: fx.Node) -> bool:
        place = self.columns.place.get(node)
        return place is not None and 0 < place[1] - self.cut[place[0]] <= self.layers

    def _given(self, node: fx.Node) -> list[fx.Node]:
        """What a node that stays is given, of the layers that stay."""
        given = taken(node)
        place = self.columns.place.get(node)
        if place is None:
            return given
        column, coordinate = place
        short = self._short(column, coordinate)
        for index, relation in enumerate(self.columns.takes[column]):
            if relation is None or index >= len(given):
                continue
            source, offset = relation
            if self.columns.place.get(given[index]) == (source, coordinate + offset):
                given[index] = self.columns.element((source, self._long(source, short + offset)))
        return given

    def _short(self, column: int, coordinate: int) -> int:
        return coordinate if coordinate <= self.cut[column] else coordinate - self.layers

    def _long(self, column: int, coordinate: int) -> int:
        return coordinate if coordinate <= self.cut[column] else coordinate + self.layers

    def _gathered(self, node: fx.Node) -> tuple[Any, Any]:
        """Arguments without the elements that go."""

        def without(each: Any) -> Any:
            if isinstance(each, (list, tuple)):
                return type(each)([without(inner) for inner in each
                                   if not (isinstance(inner, fx.Node) and self._goes(inner))])  # fmt: skip
            return each

        return without(node.args), {name: without(each) for name, each in node.kwargs.items()}
