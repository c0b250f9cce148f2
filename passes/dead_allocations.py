"""Erase allocations that nobody reads.

    Before   %empty = aten.empty([m, n])          no user
    After    (nothing)

Requires  post-grad graph, before code generation.
Tier      exact: no value changes.

Tracing leaves one ``empty`` of full size for every parameter whose gradient buffer was replaced, and a few constants.
Inductor does not remove dead nodes by default, and a memory plan would count them.
"""

from __future__ import annotations

import torch
from torch import fx

from qgalore_compile.passes.context import Context, PassRecord

aten = torch.ops.aten

ALLOCATIONS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.full.default,
        aten.full_like.default,
        aten.zeros.default,
        aten.zeros_like.default,
    }
)


def dead_allocations(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Erase every allocation without a user; an allocation read by one that dies first goes with it."""
    for node in reversed(graph.nodes):
        if node.target in ALLOCATIONS and not node.users:
            record.match(node)
            graph.erase_node(node)
