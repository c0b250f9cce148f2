"""What every layer writes, seen before layers are taken out of a graph: it is written as often as there are layers.

Names and schemas do not tell who writes: ``F.batch_norm`` writes what it averages, ``operator.setitem`` its first
argument, a function with ``inplace=True`` what it reads, ``_foreach_add_`` all of a list.  What touches something that
layers share is run by itself on fake tensors, which count their writes.
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from qgalore_compile._torch import FakeTensor, tree_leaves, tree_map_only
from qgalore_compile.backend.unseen import storages, storages_of
from qgalore_compile.composites import COMPOSITES
from qgalore_compile.passes.columns import Columns, Uneven

UNDECLARED: frozenset[Any] = frozenset(
    {torch.nn.functional.batch_norm, torch.nn.functional.instance_norm, torch.batch_norm, torch.instance_norm}
)
"""What writes without counting it: averages."""


def check(gm: fx.GraphModule, columns: Columns) -> None:
    """Refuse layers that write into memory which all of them are given, or a view of it.

    Args:
        gm: of Dynamo's, with ``example_value`` on its nodes.
        columns: of its graph.

    Raises:
        Uneven: one does, or what touches such memory cannot be run by itself.
    """
    shared: set[int] = set()
    calls = []
    for elements, takes in zip(columns.of, columns.takes, strict=True):
        node = elements[columns.core[0]]
        if node.op != "placeholder":
            given = columns.taken(node)
            shared.update(*(storages(each) for each, place in zip(given, takes, strict=True) if place is None))
            calls.append((node, given))
    for node, given in calls:
        if any(not shared.isdisjoint(storages(each)) for each in given) and _writes(gm, node, shared):
            raise Uneven(f"{node.name} writes what every layer is given")


def _writes(gm: fx.GraphModule, node: fx.Node, shared: set[int]) -> bool:
    """Whether a node writes into some of those storages."""
    if node.target in COMPOSITES:
        written = [node.args[place] for place in COMPOSITES[node.target].writes]
        return any(not shared.isdisjoint(storages(each)) for each in tree_leaves(written) if isinstance(each, fx.Node))
    if node.target in UNDECLARED:
        return True
    held: list[tuple[Tensor, int]] = []

    def given(source: fx.Node) -> Any:
        if source.op == "get_attr":
            return operator.attrgetter(str(source.target))(gm)
        return tree_map_only(Tensor, stand_in, source.meta.get("example_value"))

    def stand_in(value: Tensor) -> Tensor:
        if shared.isdisjoint(storages_of(value)):
            return value
        if not hasattr(value, "__tensor_flatten__"):
            value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        held.append((value, value._version))
        return value

    try:
        with _mode(node), torch.no_grad():
            args, kwargs = fx.map_arg((node.args, node.kwargs), given)
            called: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
            called(*(args[1:] if node.op == "call_method" else args), **kwargs)
    except Exception as error:
        raise Uneven(f"{node.name}, which takes what every layer is given, cannot be run by itself: {error}") from error
    return any(value._version != before for value, before in held)


def _mode(node: fx.Node) -> AbstractContextManager[Any]:
    """In which Dynamo made the fake tensors that a node is given."""
    values = tree_leaves([source.meta.get("example_value") for source in node.all_input_nodes])
    return next((each.fake_mode for each in values if isinstance(each, FakeTensor)), nullcontext())
