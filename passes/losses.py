"""Losses over a vocabulary in a graph: which nodes stand between logits and their gradient, and those as matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from qgalore_compile.kernels.loss import below
from qgalore_compile.kernels.read.region import Refusal, RefusedError
from qgalore_compile.kernels.read.spelling import POINTWISE, REDUCTIONS, VIEWS
from qgalore_compile.passes.launch import erase
from qgalore_compile.passes.nodes import TRANSPOSES, arguments, aten, behind, dtype, is_gemm, make, prims, shape, value

_CONSTANTS = {aten.full.default, aten.scalar_tensor.default}
_ANY = {aten.any.dim, aten.any.dims}
_REDUCTIONS = {*REDUCTIONS, *_ANY, aten.gather.default}
_PUTS = {aten.scatter_add.default, aten.scatter.value}
_LOCAL = {*POINTWISE, *VIEWS, aten.expand.default, aten.scatter_add.default}


class Loss(NamedTuple):
    """A loss that was found.

    Attributes:
        logits: the product (T, V).
        gradient: of the loss with respect to them, of as many elements.
        inside: what follows from the logits and leads to the gradient or to a number for each row, and what of their
            size that reads; in the order of the graph.
        results: of those, what else is read outside: one number a row.
    """

    logits: fx.Node
    gradient: fx.Node
    inside: list[fx.Node]
    results: list[fx.Node]


def loss_of(logits: fx.Node) -> Loss | None:
    """The loss over some logits; None where no softmax is taken of them, or no product reads its gradient.

    Raises:
        RefusedError: something reads more than a number a row of it; names that.
    """
    local = _row_by_row(logits)
    ends = [node for node in local if is_whole(node, logits) and any(_leaves(user) for user in node.users)]
    if not ends or not any(node.target is aten.amax.default for node in local):
        return None
    if len(ends) > 1:
        raise RefusedError(Refusal.READ, ends[1])
    inside = set(behind([*ends, *(node for node in local if _reduces(node, logits))], local.__contains__))
    inside.update(_made_for(inside, logits))
    results = []
    for node in (logits, *sorted(inside)):
        outside = [user for user in node.users if user not in inside]
        if not outside or node in ends or node.target in _CONSTANTS:
            continue
        if node is logits or math.prod(shape(node)) != shape(logits)[0]:
            raise RefusedError(Refusal.READ, outside[0])
        results.append(node)
    return Loss(logits, ends[0], sorted(inside), results)


def is_whole(node: fx.Node, logits: fx.Node) -> bool:
    """Whether a node's tensor has an element for each of the logits."""
    sizes = shape(node)
    return bool(sizes) and sizes[-1] == shape(logits)[1] and math.prod(sizes) == math.prod(shape(logits))


def _row_by_row(logits: fx.Node) -> dict[fx.Node, None]:
    """What follows from the logits as long as each row follows from its own, in the order of the graph."""
    found: dict[fx.Node, None] = {}
    pending, rows = set(logits.users), shape(logits)[0]
    while pending:
        node = min(pending)
        pending.remove(node)
        if not (node.target in _LOCAL or _reduces(node, logits)) or not all(
            isinstance(size, int) for size in shape(node)
        ):
            continue
        if is_whole(node, logits) or math.prod(shape(node)) == rows:
            found[node] = None
            pending.update(node.users)
    return found


def _reduces(node: fx.Node, logits: fx.Node) -> bool:
    """Whether it has one number for each row of what is of the logits' size: reduces over the columns, or picks one."""
    if node.target not in _REDUCTIONS:
        return False
    source, axes = arguments(node)[:2]
    rank = len(shape(source))
    last = [axis % rank for axis in ([axes] if isinstance(axes, int) else axes or []) if rank] == [rank - 1]
    return last and is_whole(source, logits)


def _leaves(node: fx.Node) -> bool:
    """Whether it is a product, or a transpose for one."""
    return is_gemm(node) or (node.target in TRANSPOSES and any(map(_leaves, node.users)))


def _made_for(inside: set[fx.Node], logits: fx.Node) -> Iterator[fx.Node]:
    """What nodes read that does not follow from the logits but is of their size, a mask of the labels; the sums of its
    rows; constants."""
    pending, seen = sorted(inside), set(inside)
    while pending:
        node = pending.pop()
        sums = [user for user in node.users if _reduces(user, logits)] if is_whole(node, logits) else []
        for each in [*node.all_input_nodes, *sums]:
            whole = is_whole(each, logits) or _reduces(each, logits)
            if each.op != "call_function" or each in seen or each is logits:
                continue
            if whole or (each.target in _CONSTANTS and not shape(each)):
                seen.add(each)
                pending.append(each)
                yield each


class Matrices:
    """Copies of a loss's nodes on matrices: (T, V), or (T, 1) of what is one number a row, whatever their shapes were.

    To pick from a row by an index, and to add to it there, becomes a comparison with the columns' numbers: what
    programs have.  An index out of bounds stays an error.

    Attributes:
        of: the copy of each of the loss's nodes.
        inside: copies that are the program.

    Raises:
        RefusedError: what is no function of a row of the logits, and of numbers for rows and for columns.  The graph is
            as it was.
    """

    def __init__(self, graph: fx.Graph, loss: Loss) -> None:
        self.graph, self.loss = graph, loss
        self.rows, self.columns = shape(loss.logits)
        self.of: dict[fx.Node, fx.Node] = {loss.logits: loss.logits}
        self.inside: list[fx.Node] = []
        self._outside: list[fx.Node] = []
        self._after = _following(loss.logits)
        self._next = loss.inside[-1].next
        try:
            for node in loss.inside:
                self.of[node] = self._copy(node)
        except RefusedError:
            self.erase()
            raise

    def erase(self) -> None:
        """Erase the copies."""
        erase(self.graph, sorted([*self.inside, *self._outside]))

    def _add(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._make(self.inside, target, *args, **kwargs)

    def _make(self, to: list[fx.Node], target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self._next):
            node = make(self.graph, target, *args, **kwargs)
        to.append(node)
        return node

    def _copy(self, node: fx.Node) -> fx.Node:
        target, args = node.target, arguments(node)
        if target in VIEWS:
            return self._taken(args[0], node)
        if target in _CONSTANTS:
            fill = args[1] if target is aten.full.default else args[0]
            return self._constant(fill, node)
        if target is aten.expand.default:
            taken = self._taken(args[0], node)
            whole = [self.rows, self.columns if is_whole(node, self.loss.logits) else 1]
            return taken if list(shape(taken)) == whole else self._add(target, taken, whole)
        if target is aten.gather.default:
            chosen = self._at(node, args[2], self._taken(args[0], node), shape(args[0]))
            return self._add(aten.sum.dim_IntList, chosen, [1], True)
        if target in _PUTS:
            return self._put(node)
        if target in _ANY:  # Inductor asks so whether a row of scaled logits is finite
            if dtype(args[0]) != torch.bool:
                raise RefusedError(Refusal.DTYPE, node)
            ones = self._add(prims.convert_element_type.default, self._taken(args[0], node), torch.float32)
            return self._add(aten.ne.Scalar, self._add(aten.amax.default, ones, [1], True), 0)
        if target is aten.mul.Tensor and dtype(node) == torch.bool:
            target = aten.logical_and.default
        if target in REDUCTIONS:
            return self._add(target, self._taken(args[0], node), [1], True, **node.kwargs)
        if target not in POINTWISE:
            raise RefusedError(Refusal.OPERATION, node)
        return self._add(target, *(self._taken(arg, node) if isinstance(arg, fx.Node) else arg for arg in args),
                         **node.kwargs)  # fmt: skip

    def _constant(self, fill: Any, like: fx.Node) -> fx.Node:
        return self._add(aten.full.default, [], fill, dtype=dtype(like), device=value(like).device)

    def _put(self, node: fx.Node) -> fx.Node:
        """A number a row, put into zeros."""
        zeros, axis, index, given = arguments(node)
        empty = zeros.target is aten.full.default and arguments(zeros)[1] == 0
        last = axis % max(len(shape(node)), 1) == len(shape(node)) - 1
        if not empty or not last or not is_whole(node, self.loss.logits):
            raise RefusedError(Refusal.OPERATION, node)
        if isinstance(given, fx.Node) and shape(given) != shape(index):
            raise RefusedError(Refusal.SHAPE, node)
        put = self._taken(given, node) if isinstance(given, fx.Node) else self._constant(given, node)
        return self._at(node, index, put, shape(node))

    def _at(self, node: fx.Node, index: fx.Node, chosen: fx.Node, sizes: Sequence[int]) -> fx.Node:
        """(T, V): what is chosen in the column that an index names, 0 elsewhere; ``sizes`` are those of what it is an
        index of, and it has one for each row."""
        if tuple(shape(index)) != (*sizes[:-1], 1):
            raise RefusedError(Refusal.SHAPE, node)
        places = self._make(
            self._outside, prims.iota.default, self.columns, start=0, step=1, dtype=torch.int64,
            device=value(node).device, requires_grad=False,
        )  # fmt: skip
        places = self._make(self._outside, aten.reshape.default, places, [1, self.columns])
        row = self._make(self._outside, aten.reshape.default, self._given(index, node), [self.rows, 1])
        checked = self._make(self._outside, below, row, self.columns)
        named = self._add(aten.eq.Tensor, places, checked)
        return self._add(aten.where.self, named, chosen, self._constant(0.0, node))

    def _given(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        if node in self._after:
            raise RefusedError(Refusal.LATE, reader)
        return node

    def _taken(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        """What a copy reads in the place of a node's operand: its copy, or an input as (T, 1), (1, V) or ()."""
        sizes, wanted = shape(source), shape(reader)
        whole = is_whole(reader, self.loss.logits)
        if source in self.of:
            found = self.of[source]
            # numbers of rows stand in the place of rows, unless there are as many columns
            if whole and shape(found) == (self.rows, 1) and sizes[-1:] != (1,) and reader.target not in VIEWS:
                raise RefusedError(Refusal.BROADCAST, reader)
            return found
        self._given(source, reader)
        if math.prod(sizes) == 1:
            return source if not sizes else self._make(self._outside, aten.reshape.default, source, [])
        if whole and sizes[-1] == self.columns and math.prod(sizes) == self.columns:
            return self._make(self._outside, aten.reshape.default, source, [1, self.columns])
        rows = [*wanted[:-1], 1] if whole else list(wanted)
        if math.prod(rows) != self.rows or not _broadcasts(sizes, rows):
            raise RefusedError(Refusal.BROADCAST, reader)
        if list(sizes) != rows:
            source = self._make(self._outside, aten.expand.default, source, rows)
            source = self._make(self._outside, aten.clone.default, source, memory_format=torch.contiguous_format)
        return self._make(self._outside, aten.reshape.default, source, [self.rows, 1])


def _broadcasts(sizes: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a shape can be expanded to another."""
    aligned = zip(reversed(sizes), reversed(to), strict=False)
    return len(sizes) <= len(to) and all(size in (1, wanted) for size, wanted in aligned)


def _following(node: fx.Node) -> set[fx.Node]:
    """What follows from a node."""
    found, pending = set[fx.Node](), [node]
    while pending:
        new = [user for user in pending.pop().users if user not in found]
        found.update(new)
        pending.extend(new)
    return found
