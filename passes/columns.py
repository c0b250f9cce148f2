"""Columns of a graph: nodes that stand at the same place of equal layers, side by side.

    coordinate    0    1    2    3    4
    column W      w0   w1   w2   w3   w4      weights
    column P      p0   p1   p2   p3   p4      products
    column H      h0   h1   h2   h3   h4      the residual stream

What an element takes is an element of another column at an *offset* (h2 takes h1: −1), or a *common* node that all take
(the cosines of rotary positions).  Beginning with columns that are known, readers and arguments are followed until
nothing is added.  What is found holds in the *core*, all coordinates but two at each end, or nothing does
(:class:`Uneven`): there the elements of a column call the same with the same constants and look the same, take what
they take from the same columns at the same offsets, and are read by the same columns.  At the ends layers may differ,
as the first one does, which reads the embedding.  A node that reads a whole column, the gradient of all weights or a
stack of all norms, *gathers*.

A column's elements stand a whole period apart in the list of nodes: :func:`windows` finds the parts of a list that
repeat so, in which layers can be taken out or put in.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

EDGE = 2
"""Coordinates at each end of which nothing is asked: the first layer and the last have other neighbours, and a column
may be named by what its readers are, one layer on."""


class Uneven(Exception):
    """Layers differ; in what, in words."""


Place = tuple[int, int]
"""A column, and a coordinate in it."""


@dataclass(frozen=True)
class Missing:
    """Layers that a graph is without.

    Attributes:
        layers: how many.
        kept: of all.
        inputs: by column, numbers of Dynamo's inputs by coordinate, those of layers taken out included.
        cut: by column, the last coordinate in front of them.
        numbers: by input of a layer, the number of the parameter that it is, or is a state of.
    """

    layers: int
    kept: int
    inputs: list[dict[int, int]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rerolled:
    """Layers that were taken out of a graph, and what the graph is compared with when they are put back.

    Attributes:
        one: the first that is put back.
        others: those that are missing then.
        expected: the graph that was traced with one layer more, as text; None where it has been compared before.
    """

    one: Missing
    others: Missing
    expected: list[str] | None = None


class Columns:
    """The columns of a graph.

    Args:
        graph: whose nodes they are of.
        known: columns to begin with, their elements by coordinate.
        count: layers; coordinates are 0 … count − 1.
        taken: the nodes that a node is given, in order.
        spelled: all else of it: what it calls, its constants, what its result looks like.

    Attributes:
        of: by column, elements by coordinate.
        place: where a node is.
        takes: by column, of each argument the column and offset, or None for a common node.
        gathering: nodes that read whole columns.

    Raises:
        Uneven: layers of the core differ.
    """

    def __init__(
        self,
        graph: fx.Graph,
        known: Iterable[Mapping[int, fx.Node]],
        count: int,
        taken: Callable[[fx.Node], Sequence[fx.Node]],
        spelled: Callable[[fx.Node], Hashable],
    ) -> None:
        self.core = range(EDGE, count - EDGE)
        self.of: list[dict[int, fx.Node]] = []
        self.place: dict[fx.Node, Place] = {}
        self.takes: list[list[Place | None]] = []
        self.gathering: dict[fx.Node, None] = {}
        self.taken = taken
        self._spelled = spelled
        self._spellings: dict[fx.Node, Hashable] = {}
        self._readers: dict[fx.Node, list[tuple[fx.Node, int]]] = defaultdict(list)
        for node in graph.nodes:
            for index, source in enumerate(taken(node)):
                self._readers[source].append((node, index))
        # first come, first served: a column is named by its nearest neighbour; in a chain, names would drift
        self._pending: deque[int] = deque()
        common = [each for each in (self._relate(column, "what it begins with") for column in known) if each is None]
        assert not common
        while self._pending:
            self._close(self._pending.popleft())
        self._check_common()

    def _spelling(self, node: fx.Node) -> Hashable:
        if node not in self._spellings:
            self._spellings[node] = self._spelled(node)
        return self._spellings[node]

    def _relate(self, found: Mapping[int, fx.Node], what: str) -> Place | None:
        """Make nodes elements of one column, which may be known; (column, offset), or None where all are one node."""
        core = {at: found[at] for at in self.core if at in found}
        if len(core) < len(self.core):
            raise Uneven(f"{what}: not in every layer")
        if len(set(core.values())) == 1:
            return None
        placed = [(at, self.place[node]) for at, node in core.items() if node in self.place]
        if placed:
            at, (column, coordinate) = placed[0]
            offset = coordinate - at
            if abs(offset) > EDGE:  # an edge's own reading of a layer far away could look like it in fewer layers
                raise Uneven(f"{what}: stands {abs(offset)} layers away")
        else:
            column, offset = len(self.of), 0
            self.of.append({})
            self.takes.append([])
            self._pending.append(column)
        for at, node in sorted(found.items(), key=lambda each: each[0] not in core):
            if not self._put(column, at + offset, node) and at in core:
                raise Uneven(f"{what}: {node.name} is unlike {self.some(column)}")
        return column, offset

    def _put(self, column: int, coordinate: int, node: fx.Node) -> bool:
        elements = self.of[column]
        if elements.get(coordinate) is node:
            return True
        if coordinate in elements or node in self.place:
            return False
        if elements and self._spelling(node) != self._spelling(next(iter(elements.values()))):
            return False
        elements[coordinate] = node
        self.place[node] = column, coordinate
        return True

    def some(self, column: int) -> str:
        """The name of one of a column's elements."""
        return next(iter(self.of[column].values())).name

    def _close(self, column: int) -> None:
        """Follow a column's arguments and readers."""
        elements = self.of[column]
        arguments = {at: self.taken(node) for at, node in elements.items()}
        for index in range(len(arguments[self.core[0]])):
            found = {at: given[index] for at, given in arguments.items() if index < len(given)}
            self.takes[column].append(self._relate(found, f"argument {index} of {self.some(column)}"))
        readers = {at: self._readers[node] for at, node in elements.items()}
        everywhere = set.intersection(*({user for user, _ in readers[at]} for at in self.core))
        self.gathering.update((user, None) for user in everywhere)
        readers = {at: [each for each in found if each[0] not in everywhere] for at, found in readers.items()}
        count = len(readers[self.core[0]])
        if any(len(readers[at]) != count for at in self.core):
            raise Uneven(f"{self.some(column)} is read in another way in some layer")
        for index in range(count):
            alike = {at: found[index][0] for at, found in readers.items() if len(found) == count}
            if self._relate(alike, f"a reader of {self.some(column)}") is None:
                raise Uneven(f"{self.some(column)} is read by one node in some layers")

    def _check_common(self) -> None:
        """A node that all layers read is no layer's own; it may be of the first one, where equal ones were merged."""
        for column, takes in enumerate(self.takes):
            for index, place in enumerate(takes):
                if place is None:
                    node = self.taken(self.of[column][self.core[0]])[index]
                    if node in self.place and self.place[node][1] in self.core:
                        raise Uneven(f"{node.name} is one layer's, and others read it")

    def element(self, place: Place) -> fx.Node:
        """Of a column, at a coordinate.

        Raises:
            Uneven: there is none.
        """
        column, coordinate = place
        if coordinate not in self.of[column]:
            raise Uneven(f"{self.some(column)} has no like in some layer")
        return self.of[column][coordinate]


@dataclass(frozen=True)
class Window:
    """A part of a list that repeats: its element at ``start + i`` is like the one at ``start + step + i``, one layer
    on, and so on for some layers.

    Attributes:
        start: of one layer's part.
        step: to the next layer's; negative where layers run downwards, as in a backward.
    """

    start: int
    step: int

    @property
    def part(self) -> range:
        """Of one layer."""
        return range(self.start, self.start + abs(self.step))


def windows(
    places: Sequence[Place | None], base: int, layers: int, known: Callable[[int], bool] = lambda column: True
) -> list[Window]:
    """The windows of a list, one for each stretch of it in which layers repeat.

    Args:
        places: of the list's elements; None for what is in no column.
        base: a coordinate about which to look.
        layers: that must follow a window's own, each a period apart.
        known: the columns that must be in a window.

    Raises:
        Uneven: elements of a layer do not stand a period from the next one's, or others stand between.
    """
    where = {place: index for index, place in enumerate(places) if place is not None}
    begins = sorted((index, column) for (column, coordinate), index in where.items() if coordinate == base)
    covered: set[int] = set()
    found = []
    for start, column in begins:
        if column in covered or (column, base + 1) not in where or not known(column):
            continue
        window = Window(start, where[column, base + 1] - start)
        columns = list(_covered(window, places, where, layers))
        if len(set(columns)) < len(columns) or not covered.isdisjoint(columns):
            raise Uneven("a layer's parts lie within each other")
        covered.update(columns)
        found.append(window)
    return found


def _covered(window: Window, places: Sequence[Place | None], where: Mapping[Place, int], layers: int) -> Iterator[int]:
    """The columns of a window."""
    for index in window.part:
        place = places[index] if index < len(places) else None
        if place is None:
            raise Uneven(f"place {index} of the list belongs to no layer, and stands among layers")
        column, coordinate = place
        for on in range(1, layers + 1):
            if where.get((column, coordinate + on)) != index + on * window.step:
                raise Uneven(f"place {index} of the list does not repeat with its layer")
        yield column
