"""What passes know of a graph's nodes beyond each by itself, found once.

=============  ======================================================================================================
gemms          matrix products that a node follows from through other operations; not through 0-d tensors
storage        inputs of the graph that a node is decoded from, where it follows from nothing but inputs
decoding       how: the operations in between, without casts between floats and without transpositions
transposed     whether it stands transposed to its decoding
=============  ======================================================================================================

A result of an op that changes its arguments in place counts as the argument, since it is the same storage later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

from qgalore_compile.passes.nodes import (
    TRANSPOSES,
    anchors,
    aten,
    dtype,
    is_gemm,
    is_product,
    is_scalar,
    is_tensor,
    permutation,
    previous_version,
    prims,
    shape,
    written,
)

T = TypeVar("T")

MOST_GEMMS = 8
"""A node that follows from more products than this is the network's, not an update's; counting on would make the walk
quadratic in the number of layers, since the residual stream follows from all of them."""

_TRANSPARENT = frozenset({aten.clone.default, aten.alias.default, aten.detach.default})


class Facts:
    """Facts about the nodes of one graph, each found when it is first asked for and kept.

    They stay true while passes rewrite the graph, as long as :meth:`replaced` is told of every node that another one
    takes the place of.

    Attributes:
        written: inputs that the graph writes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.written = frozenset(written(anchor)[0] for anchor in anchors(graph))
        self._gemms: dict[fx.Node, tuple[fx.Node, ...] | None] = {}
        self._storage: dict[fx.Node, frozenset[fx.Node] | None] = {}
        self._decoding: dict[fx.Node, tuple[int, bool]] = {}
        self._numbers: dict[Any, int] = {}

    def gemms(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The products that ``node`` is or follows from, in no particular order; () where there are too many."""
        if not is_gemm(node):
            _fill(self._gemms, node, _not_products, self._gemms_of)
        return self._reached(node) or ()

    def inputs(self, node: fx.Node) -> set[fx.Node]:
        """Inputs of the graph that ``node`` follows from without passing through a product or a 0-d tensor."""
        return _inputs_behind(node)

    def storage(self, node: fx.Node) -> frozenset[fx.Node] | None:
        """The inputs that ``node`` is decoded from; None where anything computed takes part."""
        if node not in self._storage:
            _fill(self._storage, node, _storage_sources, self._storage_of)
        return self._storage[node]

    def same_decoding(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether two nodes hold the same values in the same storages' encoding, up to casts and transposition."""
        return self._decoded(first)[0] == self._decoded(second)[0]

    def transposed(self, node: fx.Node) -> bool:
        """Whether ``node`` stands transposed to its decoding."""
        return self._decoded(node)[1]

    def replaced(self, old: fx.Node, new: fx.Node) -> None:
        """Forget what is no longer true where readers of ``old`` now read ``new``.

        What follows from products, and how, changes with every product that is replaced, and is asked of a graph that
        no pass has changed: all of it is found anew.  Where something is stored changes where the one was computed and
        the other is what an op left in an input.
        """
        self.forget()
        if old in self._storage and self._storage[old] != self.storage(new):
            pending = list(new.users)
            for reader in pending:
                if self._storage.pop(reader, _NEVER) is not _NEVER:
                    pending.extend(reader.users)

    def forget(self) -> None:
        """Likewise where products have been added."""
        self._gemms.clear()
        self._decoding.clear()

    # -- one node -----------------------------------------------------------------------------------------------------

    def _reached(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        return (node,) if is_gemm(node) else self._gemms[node]

    def _decoded(self, node: fx.Node) -> tuple[int, bool]:
        if node not in self._decoding:
            _fill(self._decoding, node, _sources, self._decoding_of)
        return self._decoding[node]

    def _gemms_of(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        """None stands for "too many"."""
        base = previous_version(node)
        if base is not None:
            return self._reached(base)
        reached: dict[fx.Node, None] = {}
        for source in node.all_input_nodes:
            if is_scalar(source):
                continue
            found = self._reached(source)
            if found is None:
                return None
            reached.update(dict.fromkeys(found))
            if len(reached) > MOST_GEMMS:
                return None
        return tuple(reached)

    def _storage_of(self, node: fx.Node) -> frozenset[fx.Node] | None:
        base = previous_version(node)
        if base is not None:
            return self._storage[base]
        if node.op == "placeholder":
            return frozenset({node})
        if is_product(node) or node.op == "output":
            return None
        storage: frozenset[fx.Node] = frozenset()
        for source in node.all_input_nodes:
            found = self._storage[source]
            if found is None:
                if is_scalar(source):
                    continue
                return None
            storage |= found
        return storage

    def _decoding_of(self, node: fx.Node) -> tuple[int, bool]:
        base = previous_version(node)
        if base is not None:
            return self._decoding[base]
        if node.op != "call_function":
            return self._number(node), False
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and is_tensor(source) and is_tensor(node):
            if node.target in TRANSPOSES and len(shape(node)) == 2:
                number, transposed = self._decoding[source]
                return number, transposed != (permutation(node) == [1, 0])
            if node.target in _TRANSPARENT or (
                node.target in (prims.convert_element_type.default, aten._to_copy.default)
                and dtype(source).is_floating_point
                and dtype(node).is_floating_point
            ):
                return self._decoding[source]
        arguments = (self._spelled(node.args), self._spelled(tuple(sorted(node.kwargs.items()))))
        return self._number((node.target, arguments)), False

    def _spelled(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self._decoding[argument]
        if isinstance(argument, (tuple, list)):
            return tuple(self._spelled(item) for item in argument)
        return str(argument)

    def _number(self, what: Any) -> int:
        """Equal numbers for equal things: a decoding then costs one number, not a tree."""
        return self._numbers.setdefault(what, len(self._numbers))


_NEVER: Any = object()


def _sources(node: fx.Node) -> list[fx.Node]:
    """What facts about a node follow from; of what an op left in a tensor, the tensor alone."""
    base = previous_version(node)
    return [base] if base is not None else node.all_input_nodes


def _not_products(node: fx.Node) -> list[fx.Node]:
    return [source for source in _sources(node) if not is_gemm(source)]


def _storage_sources(node: fx.Node) -> list[fx.Node]:
    return [] if is_product(node) or node.op == "output" else _sources(node)


def _fill(
    known: dict[fx.Node, T], node: fx.Node, sources: Callable[[fx.Node], list[fx.Node]], find: Callable[[fx.Node], T]
) -> None:
    """Find a fact about a node, and first about all that it follows from."""
    pending = [node]
    while pending:
        missing = [source for source in sources(pending[-1]) if source not in known]
        if missing:
            pending += missing
        else:
            node = pending.pop()
            known[node] = find(node)


def states_among(writing: list[fx.Node]) -> set[fx.Node]:
    """Targets that are the state of another target: that one's value reads them.  Where both read each other, as an
    embedding's gradient reads the embedding, the state is what fewer values read."""
    reads = {target: _inputs_behind(stored) for target, stored in map(written, writing)}
    readers = Counter(source for read in reads.values() for source in read)
    return {
        state for parameter, read in reads.items() for state in read & reads.keys()
        if state is not parameter
        and (parameter not in reads[state] or readers[state] < readers[parameter])
    }  # fmt: skip


def _inputs_behind(value: fx.Node) -> set[fx.Node]:
    """Inputs that a node follows from without passing through a product or a 0-d tensor."""
    seen, pending = {value}, [value]
    while pending:
        node = pending.pop()
        base = previous_version(node)
        sources = [] if is_gemm(node) else [base] if base else node.all_input_nodes
        for source in sources:
            if source not in seen and not is_scalar(source):
                seen.add(source)
                pending.append(source)
    return {node for node in seen if node.op == "placeholder"}
