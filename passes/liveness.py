"""A model of what a graph keeps in memory, node by node, in bytes.

Inputs of the graph are resident and not counted.  A view is its base; the result of an op that changes its argument in
place is the argument.  A pointwise operation with one reader, itself pointwise or a reduction, is fused into it and
never stored.  A call of an outlined function holds, for its time, what is largest inside.  What Inductor then really
allocates is for `benchmarks/live_bytes.py` to tell, from the generated program.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from qgalore_compile._torch import OpOverload
from qgalore_compile.passes.nodes import (
    ANCHOR,
    INVOKE,
    PARTS,
    VIEWS,
    arguments,
    aten,
    hint,
    previous_version,
    prims,
    value,
)

_POINTWISE = frozenset({prims.convert_element_type.default, aten.expand.default, aten.cat.default, prims.iota.default})
REDUCTIONS = frozenset(
    {
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten.amin.default,
        aten.mean.dim,
        aten.var_mean.correction,
    }
)


@dataclass(frozen=True)
class Live:
    """One tensor that is live at the largest point."""

    node: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Liveness:
    """What is live over a graph.

    Attributes:
        curve: (node, bytes that are live while it runs), in the order of the graph.
        peak: the largest of them.
        at: the node that runs then.
        holds: what is live then, largest first.
    """

    curve: tuple[tuple[str, int], ...]
    peak: int
    at: str
    holds: tuple[Live, ...]


def liveness(graph: fx.Graph) -> Liveness:
    """The model's answer for a graph in its present order."""
    buffers = _buffers(graph)
    position = {node: index for index, node in enumerate(graph.nodes)}
    last = {
        buffer: max([position[reader] for reader in buffers[buffer]], default=position[buffer]) for buffer in buffers
    }
    sizes = {node: size_in_bytes(value(node)) for node in buffers if _is_stored(node)}
    dies: dict[int, list[fx.Node]] = {}
    for buffer in sizes:
        dies.setdefault(last[buffer], []).append(buffer)
    curve = []
    live: dict[fx.Node, int] = {}
    total, peak, at = 0, 0, ""
    holds: dict[fx.Node, int] = {}
    for index, node in enumerate(graph.nodes):
        if node in sizes:
            live[node] = sizes[node]
            total += sizes[node]
        now = total + _inside(graph, node)
        if node.op == "call_function":
            curve.append((node.name, now))
        if now > peak:
            peak, at, holds = now, node.name, dict(live)
        for dead in dies.get(index, ()):
            total -= live.pop(dead)
    listed = [Live(node.name, _shape(value(node)), str(value(node).dtype), size) for node, size in holds.items()]
    return Liveness(tuple(curve), peak, at, tuple(sorted(listed, key=lambda item: -item.bytes)))


def readers(node: fx.Node) -> set[fx.Node]:
    """Nodes that read a node's memory: its users, and those of its views.  An anchor must come behind all of them."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                source: Any = user.args[0] if user.target is operator.getitem else user
                if source.target in PARTS or user.target in VIEWS:
                    pending.append(user)
    return found


def _buffers(graph: fx.Graph) -> nx.DiGraph:
    """Edges from what is stored to the nodes that read it, through views and fused operations."""
    reads: nx.DiGraph = nx.DiGraph()
    behind: dict[fx.Node, tuple[fx.Node, ...]] = {}  # stored nodes that a node's value is in, or is computed from
    for node in graph.nodes:
        base = previous_version(node)
        sources = [base] if base is not None else node.all_input_nodes
        stored = tuple(dict.fromkeys(buffer for source in sources for buffer in behind.get(source, ())))
        for buffer in stored:
            reads.add_edge(buffer, node)
        if _is_alias(node) or _is_fused(node):
            behind[node] = stored
        else:
            reads.add_node(node)
            behind[node] = (node,)
    return reads


def _is_stored(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is ANCHOR or not isinstance(value(node), Tensor):
        return False
    return not _is_alias(node) and not _is_fused(node)


def _is_alias(node: fx.Node) -> bool:
    return node.target in VIEWS or previous_version(node) is not None


def _is_fused(node: fx.Node) -> bool:
    """Whether a node is computed inside the kernel of its only reader."""
    if not _is_pointwise(node) or len(node.users) != 1:
        return False
    (reader,) = node.users
    while _is_alias(reader) and len(reader.users) == 1:
        (reader,) = reader.users
    return _is_pointwise(reader) or reader.target in REDUCTIONS or reader.target is ANCHOR


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and (torch.Tag.pointwise in target.tags or target in _POINTWISE)


def _inside(graph: fx.Graph, node: fx.Node) -> int:
    """Bytes that a call holds while it runs and that no node stands for then: several results of one op, or what is
    largest inside a function, its results included."""
    if node.target is not INVOKE:
        parts = [user for user in node.users if user.target is operator.getitem and _is_stored(user)]
        return sum(size_in_bytes(value(part)) for part in parts)
    body = getattr(graph.owning_module, arguments(node)[0].target)
    if "qgalore_peak" not in body.meta:
        body.meta["qgalore_peak"] = liveness(body.graph).peak
    return int(body.meta["qgalore_peak"])


def size_in_bytes(fake: Tensor) -> int:
    """Of a tensor; of a symbolic size the one that tracing saw."""
    count = fake.dtype.itemsize
    for size in _shape(fake):
        count *= size
    return count


def _shape(fake: Tensor) -> tuple[int, ...]:
    return tuple(map(hint, fake.shape))
