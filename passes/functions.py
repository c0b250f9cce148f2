"""Functions of a graph: made, called, and lowered by Inductor with what they change.

``invoke_subgraph`` calls a function of the graph's module, which Inductor lowers and prints once, however often it is
called.  Inductor takes it for an operation that changes none of its arguments; ours may, by ``copy_`` into a
placeholder, as the whole graph does.  The module of such a function says which ones it changes, and its calls are
lowered with that.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qgalore_compile._torch import (
    FakeTensor,
    FakeTensorUpdater,
    V,
    inductor_ir,
    inductor_lowering,
    inductor_post_grad,
    reinplace_inplaceable_ops,
)
from qgalore_compile.passes.nodes import INVOKE, value

_CHANGES = "qgalore_changes"


def add_function(graph: fx.Graph, body: fx.Graph, returned: Sequence[fx.Node], changes: Sequence[int]) -> str:
    """Give a graph's module a function; its name.

    Args:
        body: without an output.
        returned: nodes of the body; none shares memory with another or with an argument.
        changes: places of the arguments that the body writes into.
    """
    assert graph.owning_module is not None
    add_output(body, returned)
    number = 0
    while hasattr(graph.owning_module, f"qgalore_layer_{number}"):
        number += 1
    name = f"qgalore_layer_{number}"
    inner = torch.nn.Module()
    for node in body.find_nodes(op="get_attr"):
        setattr(inner, node.target, getattr(graph.owning_module, node.target))
    module = fx.GraphModule(inner, body)
    module.meta[_CHANGES] = tuple(changes)
    module.forward = _Forward(module, returned)
    graph.owning_module.add_submodule(name, module)
    _install()
    return name


class _Forward:
    """A function's ``forward``, which does not run on fake tensors to say what its results look like.

    Behind all passes Inductor asks that of every call; of 28 layers it takes 11 seconds.
    """

    def __init__(self, module: fx.GraphModule, returned: Sequence[fx.Node]) -> None:
        self._module = weakref.ref(module)
        self._looks = [(value(node).shape, value(node).stride(), value(node).dtype, value(node).device)
                       for node in returned]  # fmt: skip

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        if any(isinstance(each, FakeTensor) for each in given):
            return tuple(torch.empty_strided(shape, stride, dtype=dtype, device=device)
                         for shape, stride, dtype, device in self._looks)  # fmt: skip
        module = self._module()
        assert module is not None
        found: tuple[Tensor, ...] = type(module).forward(module, *given)
        return found


def add_output(body: fx.Graph, returned: Sequence[fx.Node]) -> None:
    """End a function's body with what it returns."""
    result = body.output(tuple(returned))
    # readers rely on the strides that the results had; Inductor asks for both
    result.meta["user_visible_output_idxs"] = list(range(len(returned)))
    result.meta["original_output_strides"] = [value(node).stride() for node in returned]


def call_function(
    graph: fx.Graph, name: str, given: Sequence[fx.Node], like: Sequence[fx.Node]
) -> tuple[fx.Node, list[fx.Node]]:
    """A call at the graph's insertion point, and its results, which look like those nodes."""
    call = graph.call_function(INVOKE, (graph.get_attr(name), name, *given))
    call.meta["val"] = tuple(value(node) for node in like)
    results = []
    for index, node in enumerate(like):
        result = graph.call_function(operator.getitem, (call, index))
        result.meta = {"val": value(node)}
        results.append(result)
    return call, results


def _install() -> None:
    """Let Inductor lower calls with what they change; a second call does nothing."""
    original = inductor_lowering.lowerings[INVOKE]
    if not hasattr(original, _CHANGES):
        setattr(lowered := _lowered(original), _CHANGES, True)
        inductor_lowering.lowerings[INVOKE] = lowered


def _lowered(original: Callable[..., Any]) -> Callable[..., Any]:
    def lower(subgraph: Any, *arguments: Any) -> Any:
        module = subgraph.graph_module
        if _CHANGES not in module.meta:
            return original(subgraph, *arguments)
        if subgraph.graph is None:
            _settle(module)
        results = original(subgraph, *arguments)
        call = next(each for each in reversed(V.graph.operations) if isinstance(each, inductor_ir.InvokeSubgraph))
        changed = [call.inputs[index] for index in module.meta[_CHANGES]]
        call.mutation_outputs = [inductor_ir.MutationOutput(each.layout, each, call) for each in changed]
        return results

    return lower


def _settle(module: fx.GraphModule) -> None:
    """What Inductor does last to a whole graph: operations that change tensors do so in place, without copies."""
    reinplace_inplaceable_ops(FakeTensorUpdater(module), module.graph)
    inductor_post_grad.decompose_triton_kernel_wrapper_functional(module.graph)
    inductor_post_grad.decompose_auto_functionalized(module.graph)
    module.recompile()
