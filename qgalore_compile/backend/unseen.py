"""Writes of an optimizer's operators that AOTAutograd need not see.

AOTAutograd makes a graph functional: each tensor that is changed costs it three nodes in three walks, and an update
changes ten.  Where nothing in Dynamo's graph reads what an operator of ``optim/operators.py`` has written but another
one, the order of both being that of their data, what is written may as well be written at the graph's end: AOTAutograd
is given operators that say nothing of it, and the pass ``decompose`` puts the writes there, as AOTAutograd would have.
Everywhere else it is given the operations themselves.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qgalore_compile._ops import written_places
from qgalore_compile._torch import has_storage, is_traceable_wrapper_subclass, tree_leaves
from qgalore_compile.composites import COMPOSITES
from qgalore_compile.formats.operators import TRACED
from qgalore_compile.optim.operators import PROJECT, UPDATE, Overloads

_OF_SEEN = {each.seen: each for each in (PROJECT, UPDATE)}


def hide(gm: fx.GraphModule, *, keep: bool) -> list[int]:
    """Choose, in place, the overload that AOTAutograd is given of each operator.

    Args:
        gm: from Dynamo.
        keep: False to have the operations in any case.

    Returns:
        Numbers of the inputs that operators write unseen.
    """
    if not keep:
        _trace_decoding(gm)
    calls = [node for node in gm.graph.nodes if node.target in _OF_SEEN]
    if not calls:
        return []
    hidden = keep and not returns_gradients(gm.graph) and _may_be_unseen(gm.graph, calls)
    written = {source for call in calls for source in _written(call)} if hidden else set()
    for call in calls:
        overloads: Overloads = _OF_SEEN[call.target]
        call.target = overloads.unseen if hidden else overloads.traced
    gm.recompile()
    return [index for index, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in written]


def _trace_decoding(gm: fx.GraphModule) -> None:
    """Have decoding traced through that phases hold which are traced through themselves."""
    for op, traced in TRACED.items():
        for node in gm.graph.find_nodes(op="call_function", target=op):
            if COMPOSITES[op].applies(*node.args):
                node.target = traced
    gm.recompile()


def bumping(compiled: Callable[..., Any], written: list[int]) -> Callable[..., Any]:
    """Count the writes into those inputs, as AOTAutograd does those that it sees: autograd refuses to use for a
    gradient what it saved before them."""
    if not written:
        return compiled

    def call(*inputs: Any) -> Any:
        results = compiled(*inputs)
        changed = [inputs[index] for index in written]
        torch.autograd.graph.increment_version([each for each in changed if not each.is_inference()])
        return results

    return call


def returns_gradients(graph: fx.Graph) -> bool:
    """Whether something that is returned has a backward of its own, which is another graph then."""
    return any(isinstance(value, Tensor) and value.requires_grad
               for node in graph.output_node().all_input_nodes if node.op != "placeholder"
               for value in tree_leaves(node.meta.get("example_value")))  # fmt: skip


def _may_be_unseen(graph: fx.Graph, calls: list[fx.Node]) -> bool:
    """Whether what calls write is an input of its own, written by one call of each operator, the update's reading what
    the projection returned, and by nothing else, and is read behind them by nothing else."""
    written: dict[int, list[fx.Node]] = defaultdict(list)
    for call in calls:
        for source in _written(call):
            if source.op != "placeholder":
                return False
            for storage in _storages(source):
                written[storage].append(call)
    if any(not _in_order(each) for each in written.values()) or _written_by_others(calls):
        return False
    inputs: dict[int, int] = defaultdict(int)
    for node in graph.find_nodes(op="placeholder"):
        for storage in set(_storages(node)):
            inputs[storage] += 1
    if any(inputs[storage] != 1 for storage in written):
        return False
    behind: set[int] = set()
    for node in graph.nodes:
        own = set(_written(node)) if node.target in _OF_SEEN else set()
        if behind and any(not behind.isdisjoint(_storages(each)) for each in node.all_input_nodes if each not in own):
            return False
        behind.update(storage for source in own for storage in _storages(source))
    return True


def _written_by_others(calls: list[fx.Node]) -> bool:
    """Whether something else writes what calls do, which Dynamo's fake tensors have counted: two inputs that were made
    equal would be one value to AOTAutograd, and one could be taken for the other."""
    count = Counter(source for call in calls for source in _written(call))
    return not all(_is_written(source.meta["example_value"], times) for source, times in count.items())


def _is_written(value: Tensor, times: int) -> bool:
    """Whether a tensor has been written so often, and the parts of a quantised one not by themselves."""
    if value.is_inference():  # which counts nothing
        return False
    return value._version == times and not any(part._version for part in _parts(value))


def _in_order(calls: list[fx.Node]) -> bool:
    """Whether calls that write one tensor are an update, or a projection and the update that reads its R."""
    *before, last = calls
    if last.target != UPDATE.seen:
        return not before
    return not before or (len(before) == 1 and before[0].target == PROJECT.seen and _reads(last, before[0]))


def _reads(update: fx.Node, projection: fx.Node) -> bool:
    low = update.args[4]
    return isinstance(low, fx.Node) and projection in low.all_input_nodes


def _written(call: fx.Node) -> Iterator[fx.Node]:
    for place in written_places(call.target):  # type: ignore[arg-type]
        found: list[fx.Node] = []
        fx.map_arg(call.args[place], found.append)
        yield from found


def _storages(node: fx.Node) -> Iterator[int]:
    """Of the tensors that a node stands for, or that it is part of."""
    for value in tree_leaves(node.meta.get("example_value")):
        if isinstance(value, Tensor):
            yield from _of_tensor(value)


def _of_tensor(value: Tensor) -> Iterator[int]:
    parts = _parts(value)
    for part in parts:
        yield from _of_tensor(part)
    if not parts and has_storage(value):
        yield value.untyped_storage()._cdata


def _parts(value: Tensor) -> list[Tensor]:
    """What a wrapper around tensors holds; nothing of any other tensor."""
    if not is_traceable_wrapper_subclass(value):
        return []
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
