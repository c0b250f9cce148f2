"""Outputs that can be differentiated no more, because what they were computed from has been written since.

``loss.backward(retain_graph=True)`` and an update leave a loss that still requires a gradient and whose ``backward()``
is an error in eager mode.  AOTAutograd would compile that backward, and meet the error at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

_WRITTEN = "modified by an inplace operation"
"""In autograd's error where a version counter says so."""


def detach(gm: fx.GraphModule) -> None:
    """Detach such outputs of Dynamo's graph, in place.

    Autograd is asked itself, on the fake tensors that Dynamo has traced with, whose version counters begin at zero.  It
    is asked only where the graph writes one of its leaves, for it runs the whole backward on them.
    """
    leaves = [example for node in gm.graph.find_nodes(op="placeholder") if _requires_grad(example := _example(node))]
    if not any(leaf._version for leaf in leaves):
        return
    output = gm.graph.output_node()
    for node in dict.fromkeys(output.all_input_nodes):
        example = _example(node)
        if node.op != "placeholder" and _requires_grad(example) and _is_spent(example, leaves):
            with gm.graph.inserting_before(output):
                detached = gm.graph.call_method("detach", (node,))
            detached.meta["example_value"] = example.detach()
            output.replace_input_with(node, detached)
    gm.recompile()


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _requires_grad(example: Any) -> bool:
    return isinstance(example, Tensor) and example.requires_grad


def _is_spent(example: Tensor, leaves: Sequence[Tensor]) -> bool:
    try:
        torch.autograd.grad(example, leaves, torch.ones_like(example), retain_graph=True, allow_unused=True)
    except RuntimeError as error:  # any other is AOTAutograd's to raise
        return _WRITTEN in str(error)
    return False
