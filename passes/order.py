"""Place each update, and what leads to it, so that it dies as early as it can.

    Before    forward · backward of every layer · R of every layer · update of every layer
    After     forward · (backward of layer l · R of layer l) for l = L … 1 · updates

Inductor sinks weight gradients and updates behind the whole backward, in the optimizer's order: both factors of every
layer's gradient then live to the end.  Here a layer's R is computed as soon as both factors exist, and they die there.
The update follows at once, unless it waits for the norm or the finiteness of all gradients
(``nonfinite="skip_step"``, ``max_grad_norm``): then the small R waits, and the factors do not.

Requires  updates found by :mod:`qgalore_compile.passes.update`; an acyclic graph in which an anchor may come behind
          every other reader of what it overwrites.
Tier      exact: the same operations on the same values.  Where the liveness model finds a larger peak than before, the
          graph stays as it was.

The *spine* is what the loss and the gradients of two or more layers follow from: the forward and the chain of input
gradients.  It keeps its order and gives the time.  Everything else has a time from which on it can run.  What shrinks
(a product of two factors, a sum) runs then; all other nodes (XPᵀ before dY exists; a decoded projector) run when their
first reader does.
"""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
import torch
from torch import fx

from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.liveness import REDUCTIONS, Liveness, liveness, readers
from qgalore_compile.passes.nodes import (
    FUNCTIONALIZED,
    INVOKE,
    Mutation,
    first_version,
    is_anchor,
    is_gemm,
    is_product,
    operands,
    written,
)
from qgalore_compile.passes.regions import LayerUpdate

Time = tuple[int, int]
"""When a node can run: how far the spine has got, and how many products stand between there and the node."""

_GATHER = torch.ops.qgalore.gather_gradient.default


def order(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Put the graph's nodes in the order of their times."""
    if not context.layers:
        return
    before = liveness(graph)
    old = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    new = _schedule(old, context.layers)
    _apply(graph, new)
    after = liveness(graph)
    if after.peak > before.peak:
        _apply(graph, old)
        record.skip(context.layers[0].down, f"the peak would grow from {before.peak:,} to {after.peak:,} bytes")
        after = before
    else:
        for layer in context.layers:
            record.match(layer.down)
    context.program["live_bytes"] = {"before": _told(before), "after": _told(after)}


def _told(live: Liveness) -> dict[str, object]:
    holds = [{"node": item.node, "shape": list(item.shape), "dtype": item.dtype, "bytes": item.bytes}
             for item in live.holds[:10]]  # fmt: skip
    return {"peak": live.peak, "at": live.at, "holds": holds}


def _schedule(nodes: list[fx.Node], layers: list[LayerUpdate]) -> list[fx.Node]:
    """The nodes in their new order."""
    depends = _dependencies(nodes)
    spine = _spine(nodes, layers)
    ready: dict[fx.Node, Time] = {}
    time = 0
    for node in nodes:  # anchors' other readers may come later in the list, but only where a walk in order is no use
        if node in spine:
            time += 1
            ready[node] = (time, 0)
        else:
            point, products = max([ready.get(source, (0, 0)) for source in depends.predecessors(node)], default=(0, 0))
            ready[node] = (point, products + (is_product(node) or node.target is INVOKE))
    downs = {down for layer in layers for down in layer.downs}
    runs: dict[fx.Node, tuple[Time, int, int]] = {}
    place = {node: index for index, node in enumerate(nodes)}
    for node in reversed(nodes):
        if node in spine:
            runs[node] = (ready[node], -1, place[node])
            continue
        reading = [runs[reader] for reader in depends.successors(node) if reader in runs]
        waits = reading and node not in downs and not _shrinks(node, ready)
        at = max(ready[node], min(reader[0] for reader in reading)) if waits else ready[node]
        # what runs at one time runs for its first reader of that time, so that what a reader needs is made just before
        leader = min([reader[1] for reader in reading if reader[0] == at and reader[1] >= 0], default=place[node])
        runs[node] = (at, leader, place[node])
    return list(nx.lexicographical_topological_sort(depends, key=runs.__getitem__))


def _shrinks(node: fx.Node, ready: dict[fx.Node, Time]) -> bool:
    """Whether running a node at once lets larger things die: a product of two computed matrices (a term of R, or the
    gradient of a layer that is not projected), a reduction, an op that takes the factors.  A product with something
    stored (XPᵀ, or a decoded projector) frees nothing, since X is read again."""
    if is_gemm(node):
        return all(ready.get(operand, (0, 0)) > (0, 0) for operand in operands(node))
    return node.target in REDUCTIONS or node.target is FUNCTIONALIZED or node.target is _GATHER


def _dependencies(nodes: list[fx.Node]) -> nx.DiGraph:
    """Edges from what must run first: inputs, the other readers of what an anchor overwrites, and those readers of what
    a kernel changes in place that stood before it."""
    depends: nx.DiGraph = nx.DiGraph()
    inside = set(nodes)
    depends.add_nodes_from(nodes)
    for node in nodes:
        for source in _before(node):
            if source in inside and source is not node:
                depends.add_edge(source, node)
    return depends


def _before(node: fx.Node) -> Iterator[fx.Node]:
    yield from node.all_input_nodes
    if is_anchor(node):
        target, _ = written(node)
        for user in readers(target):
            if not (is_anchor(user) and user.args[0] is target and node < user):  # written twice: as they stand
                yield user
    elif node.target is FUNCTIONALIZED:
        # the backward reads the weight, too: behind its update it would read a copy of what it was
        for base in map(first_version, Mutation(node).written):
            yield from (user for user in readers(base) if base.op == "placeholder" and user < node)


def _spine(nodes: list[fx.Node], layers: list[LayerUpdate]) -> set[fx.Node]:
    """Nodes that the graph's results, or the R of two layers or more, follow from; none that follow from an R, as a
    returned norm of all gradients does."""
    many = object()
    reaches: dict[fx.Node, object] = {down: layer for layer in layers for down in layer.downs}
    behind: set[fx.Node] = set()
    for node in nodes:
        if node in reaches or any(source in behind for source in node.all_input_nodes):
            behind.add(node)
    spine = set()
    for node in reversed(nodes):
        if node in behind:
            continue
        found = {reaches[user] for user in node.users if user in reaches}
        found |= {many for user in node.users if user.op == "output"}
        if many in found or len(found) > 1:
            reaches[node] = many
            spine.add(node)
        elif found:
            reaches[node] = found.pop()
    return spine


def _apply(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    end = next(iter(graph.find_nodes(op="output")))
    for node in nodes:
        end.prepend(node)
