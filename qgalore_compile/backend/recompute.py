"""What `torch.utils.checkpoint` marks is computed a second time in the backward that reads it.

PyTorch (2.13, 2.14) does this for a graph that holds forward and backward, and refuses two kinds of step that people
write: attention without dropout (`scaled_dot_product_attention` on a CPU counts as drawing random numbers, whatever its
``dropout_p``), and several micro-batches, each with its backward.  :func:`everywhere` puts :func:`recompute` in that
function's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx

from qgalore_compile._torch import (
    cleanup_recompute_tags,
    force_save_bw_mutation_src,
    is_impure_node_for_dce,
    must_recompute,
    raise_getitems,
    rematerialization,
)


@contextmanager
def everywhere() -> Iterator[None]:
    """Within it graphs are recomputed so."""
    with mock.patch.object(rematerialization, "remat_using_tags_for_fwd_loss_bwd_graph", recompute):
        yield


def recompute(module: fx.GraphModule) -> fx.GraphModule:
    """Give each backward its own copies of what it reads of a checkpointed forward, in front of their first reader.

    Nodes of a backward are those that Dynamo marks (``autograd_backward``).  What nobody reads any more is erased, so
    that of a checkpointed block its inputs alone live from forward to backward.

    Raises:
        RuntimeError: something to be recomputed draws random numbers, other ones the second time; names it.
    """
    graph = module.graph
    if not any(must_recompute(node) for node in graph.nodes):
        return module
    for node in graph.nodes:
        if must_recompute(node) and _draws(node):
            raise RuntimeError(_WORDS.format(node=node.target, where=_where(node)))
    cleanup_recompute_tags(module, is_default_partition=True)
    force_save_bw_mutation_src(module)
    place = {node: index for index, node in enumerate(graph.nodes)}
    copies: dict[fx.Node, fx.Node] = {}

    def copied(source: fx.Node) -> fx.Node:
        return copies.get(source, source)

    for node in list(graph.nodes):
        if not node.meta.get("autograd_backward", False):
            if must_recompute(node):
                copies.clear()  # the forward of the next micro-batch: its backward recomputes for itself
            continue
        with graph.inserting_before(node):
            for source in sorted(_recomputed(node, copies), key=place.__getitem__):
                copy = graph.node_copy(source, copied)
                copy.meta["autograd_backward"] = True
                copies[source] = copy
        for source in node.all_input_nodes:
            if source in copies:
                node.replace_input_with(source, copies[source])
    graph.eliminate_dead_code(is_impure_node=is_impure_node_for_dce)
    module = raise_getitems(module)
    module.recompile()
    return module


def _recomputed(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """What must be copied for a node of the backward, and has no copy yet."""
    found, pending = set[fx.Node](), [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if must_recompute(source) and source not in copies and source not in found:
                found.add(source)
                pending.append(source)
    return found


_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 3,
    "_scaled_dot_product_flash_attention": 3,
    "_scaled_dot_product_efficient_attention": 5,
    "_scaled_dot_product_cudnn_attention": 5,
    "_scaled_dot_product_fused_attention_overrideable": 4,
    "_scaled_dot_product_attention_math_for_mps": 4,
}
"""Where each attention takes ``dropout_p``; without dropout it draws nothing, although all are tagged as if it did."""


def _draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    name = getattr(getattr(target, "overloadpacket", None), "__name__", "")
    if name not in _ATTENTION:
        return True
    at = _ATTENTION[name]
    dropout = node.kwargs.get("dropout_p", node.args[at] if len(node.args) > at else 0.0)
    return bool(dropout != 0.0)


def _where(node: fx.Node) -> str:
    """The last line of the user's own code that led to a node, where Dynamo kept it."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).splitlines() if line.strip()]
    return f" ({lines[-1]})" if lines else ""


_WORDS = (
    "{node}{where} stands in a checkpointed part of the model and draws random numbers: computed again in the backward "
    "it would draw others. Set the dropout to 0, call model.eval(), or leave this part out of torch.utils.checkpoint"
)
