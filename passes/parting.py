"""Which part of what stands between the projections a program computes, where it cannot be all of it.

A norm of each column, an iteration of Newton and Schulz: sums over other than a program's groups, and products, stay in
the graph, between a program that computes the new states and one that writes the weight.  The first takes what the
states follow from, and what follows from that element by element, so that N is one tensor and moments are decoded once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx

from qgalore_compile.kernels.read.spelling import POINTWISE
from qgalore_compile.passes.nodes import REDUCTIONS, VIEWS, aten, behind, hint, is_gemm, is_scalar, shape


def with_states(between: Sequence[fx.Node], states: Collection[fx.Node], low: fx.Node) -> list[fx.Node]:
    """Nodes of ``between``, in order, that a program computes beside the states, which are among them; ``low`` is R.

    What follows element by element from tensors that the program must write anyway is left outside: read there, it
    would have to be written too.
    """
    inside = set(between)
    part = set(behind(list(states), inside.__contains__)) & inside
    needed = set(part)
    for node in between:
        known = all(source in part or source not in inside for source in node.all_input_nodes)
        if known and node not in part and _elementwise(node, shape(low)):
            part.add(node)
    while True:
        written = {node for node in part if shape(node) and not part.issuperset(node.users)}
        given = {node for node in part - needed if _follows(node, part, written)}
        if not given:
            return [node for node in between if node in part]
        part -= given


def kept_as_sums(states: Sequence[fx.Node], between: Collection[fx.Node], shape_: Sequence[Any]) -> set[fx.Node]:
    """New states between the projections that stay in the graph, with the sums that they follow from: one number for
    each row or column of the weight, as Adafactor's second moment is, is no program's over r × n."""
    # not through numbers: whether a norm is finite decides of every state whether it is written
    inside, most = {node for node in between if not is_scalar(node)}, max(map(hint, shape_))
    return {
        state for state in inside.intersection(states)
        if math.prod(map(hint, shape(state))) <= most
        and any(node.target in _SUMS for node in behind([state], inside.__contains__))
    }  # fmt: skip


def left_between(between: Sequence[fx.Node], part: Collection[fx.Node], lows: Collection[fx.Node]) -> list[fx.Node]:
    """Nodes with more than a number that follow from the part, or from R (``lows``), and are not in it; no views."""
    reached, found = {*part, *lows}, list[fx.Node]()
    for node in between:
        if node not in part and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            if shape(node) and node.target not in VIEWS:
                found.append(node)
    return found


def may_stay(node: fx.Node) -> bool:
    """Whether a node may stand between two programs: a product, a sum, or an operation that programs know.  What they
    do not know, element by element, is told as an update without a kernel instead."""
    return is_gemm(node) or node.target in _MAY_STAY


_SUMS = REDUCTIONS - {aten.amax.default, aten.amin.default}  # formats have those, within a group
_MAY_STAY = frozenset(POINTWISE) | REDUCTIONS | {aten.sum.default, aten.mean.default, aten.full.default}


def _elementwise(node: fx.Node, sizes: Sequence[object]) -> bool:
    """Whether a node is a number, or as many as R has, and each follows from numbers in its own place."""
    pointwise = node.target in POINTWISE or node.target is aten.expm1.default
    return pointwise and (is_scalar(node) or list(shape(node)) == list(sizes))


def _follows(node: fx.Node, part: set[fx.Node], written: set[fx.Node]) -> bool:
    """Whether nobody in the part reads a node, and all that it follows from there is written for others' sake too."""
    if not part.isdisjoint(node.users):
        return False
    sources = [source for source in node.all_input_nodes if source in part and not is_scalar(source)]
    return all(source in written and not set(source.users) <= {node, *part} for source in sources)
