"""What of a section of the graph others must be handed, and what they had better compute again.

Left to itself, Inductor computes a pointwise operation anew in every kernel that reads it, unless something that it
cannot look into (a product, a kernel of ours) needs it in memory.  A function has to hand over what others read, so
that cutting a graph into functions would keep casts to float32 and gates of activations from the forward to the
backward.  Here what is in memory anyway crosses as it is.  For the rest the tensors that cross are a minimum cut, in
bytes, and what lies behind it is computed again where it is read, as Inductor would.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping

import networkx as nx
import torch
from torch import Tensor, fx

from qgalore_compile._torch import OpOverload
from qgalore_compile.passes.liveness import size_in_bytes
from qgalore_compile.passes.nodes import PARTS, REDUCTIONS, VIEWS, aten, hint, is_tensor, prims, value
from qgalore_compile.passes.placement import base

_POINTWISE = frozenset({prims.convert_element_type.default, prims.iota.default, aten.full.default})


def is_view(node: fx.Node) -> bool:
    """Whether a node's tensors lie in its input's memory."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and source.target in PARTS
    if node.target is aten.reshape.default:
        return _is_viewable(node)
    return node.target in VIEWS or node.target in PARTS


def _is_viewable(node: fx.Node) -> bool:
    """Whether a ``reshape`` copies nothing."""
    source = node.args[0]
    if not is_tensor(source) or not isinstance(value(node), Tensor):
        return False
    given = value(source)
    if all(isinstance(size, int) for size in given.shape) and given.is_contiguous():
        return True
    meta = torch.empty_strided(
        [hint(size) for size in given.shape], [hint(step) for step in given.stride()], device="meta"
    )
    try:
        meta.view([hint(size) for size in value(node).shape])
    except (RuntimeError, ValueError):  # which of them, depends on what the view is asked of
        return False
    return True


def is_pointwise(node: fx.Node) -> bool:
    """Whether Inductor computes a node in the kernels that read it."""
    target = node.target
    if not is_tensor(node):
        return False
    return target in _POINTWISE or (isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags)


def _is_in_memory(node: fx.Node) -> bool:
    """Whether Inductor stores a node whatever becomes of it: what it computes by a call or a reduction, or hands to a
    call."""
    if is_view(node):
        return False
    if not is_pointwise(node):
        return True
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if is_view(user):
            pending.extend(user.users)
        elif not is_pointwise(user) and user.target not in REDUCTIONS:
            return True
    return False


def crossing(section: Collection[fx.Node], read: Iterable[fx.Node], given: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes of a section that others are handed.

    Args:
        section: nodes.
        read: those that others read.
        given: inputs of the graph that others may still read as they are.
    """
    read = list(read)
    stays = {node for node in read if _is_in_memory(node)}
    cut: nx.DiGraph = nx.DiGraph()
    source, sink = "computed", "read"
    pending = [node for node in read if node not in stays]
    seen = set(pending)
    cut.add_edges_from(((node, "out"), sink) for node in pending)
    while pending:
        node = pending.pop()
        inside = node in section
        cut.add_edge((node, "in"), (node, "out"), **_capacity(node, inside, node in stays, given))
        if not inside or node in stays or not (is_view(node) or is_pointwise(node)):
            cut.add_edge(source, (node, "in"))
            continue
        for each in node.all_input_nodes:
            cut.add_edge((each, "out"), (node, "in"))
            if each not in seen:
                seen.add(each)
                pending.append(each)
    if source not in cut or sink not in cut:
        return stays
    try:
        _, (reached, _) = nx.minimum_cut(cut, source, sink)
    except nx.NetworkXUnbounded:  # a view, or a part, of what can neither be handed over nor be computed again
        return set(read)
    return stays | {
        node for node in seen & set(section) if (node, "in") in reached and (node, "out") not in reached
    }  # fmt: skip


def _capacity(node: fx.Node, inside: bool, stays: bool, given: Collection[fx.Node]) -> Mapping[str, float]:
    """Bytes; none where nothing more would be kept, and no bound where it cannot be."""
    if stays:
        return {"capacity": 0.0}
    held = base(node)
    if (inside and is_view(node)) or not is_tensor(node):
        return {}
    if held.op == "placeholder":
        return {"capacity": 0.0} if held in given else {}
    return {"capacity": float(size_in_bytes(value(node)))}
