"""One layer's part of a graph as text, for people.

What is decoded from inputs (a quantised weight, a projector, a moment) is one line however many nodes it takes, since
how a format is unpacked tells nothing about a pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qgalore_compile._torch import OpOverload
from qgalore_compile.kernels import ops
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.kernel_calls import KernelCall
from qgalore_compile.passes.nodes import (
    ANCHOR,
    FUNCTIONALIZED,
    INVOKE,
    TRITON,
    Mutation,
    arguments,
    previous_version,
    value,
)
from qgalore_compile.passes.regions import LayerUpdate

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64", "uint8": "u8", "int32": "i32",
          "int64": "i64", "bool": "b8"}  # fmt: skip


def layer_text(graph: fx.Graph, layer: LayerUpdate, facts: Facts) -> str:
    """The nodes that exist for one layer's update alone, in the order of the graph, and the functions they call."""
    inside = _own_nodes(graph, layer)
    lines = _lines(graph, inside, facts)
    for node in graph.nodes:
        if node in inside and node.target is INVOKE:
            body = getattr(graph.owning_module, node.args[0].target).graph
            inputs = ", ".join(f"%{each.name}: {_type(value(each))}" for each in body.find_nodes(op="placeholder"))
            lines += ["", f"function {node.args[0].target}({inputs}):"]
            lines += [f"    {line}" for line in _lines(body, set(body.nodes), Facts(body))]
    texts = {text: None for node in graph.nodes if node in inside and (text := program_text(node))}
    for index, text in enumerate(texts):
        lines = [line.replace(text, f"program {index}") for line in lines]
        lines += ["", f"program {index}:", *(f"    {line}" for line in ops.program_of(text).pretty().splitlines())]
    return "\n".join(lines)


def program_text(node: fx.Node) -> str | None:
    """The text of the generated kernel that a node calls; None where it calls none."""
    if node.target is TRITON:
        return str(node.meta["program"])
    call = KernelCall.of(node)
    return None if call is None else call.text


def _own_nodes(graph: fx.Graph, layer: LayerUpdate) -> set[fx.Node]:
    """The layer's anchors, its R, and whatever only those read, up to what the network reads too."""
    inside: set[fx.Node] = {*layer.anchors, *layer.downs, layer.low}
    if layer.refresh is not None:
        inside |= {layer.refresh, *layer.refresh.users}
        inside |= {reader for result in layer.refresh.users for reader in result.users if reader in layer.anchors}
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.users and all(user in inside for user in node.users):
            inside.add(node)
    return inside


def _lines(graph: fx.Graph, inside: set[fx.Node], facts: Facts) -> list[str]:
    decoded = {node: _decoded(facts, node) for node in inside}
    lines = []
    for node in graph.nodes:
        if node not in inside or node.op not in ("call_function", "output"):
            continue
        if node.op == "output":
            lines.append(f"return {_spelled(node.args[0])}")
            continue
        if decoded[node]:
            readers_decode = all(decoded.get(user) for user in node.users)
            if readers_decode:
                continue  # the last node of a decoding stands for it
            stored = sorted(facts.storage(node) or (), key=lambda source: source.name)
            call = f"decode({', '.join(f'%{source.name}' for source in stored)})"
        elif node.target is FUNCTIONALIZED:
            call = _functionalized(node)
        elif node.target is TRITON:
            call = _triton(node)
        else:
            call = f"{_name(node.target)}({_arguments(node)})"
        result = _type(value(node))
        lines.append(f"%{node.name}{': ' + result if result else ''} = {call}")
    return lines


def _decoded(facts: Facts, node: fx.Node) -> bool:
    """Whether a node is a stored tensor of integers, unpacked and scaled: nothing float of its own size takes part."""
    if previous_version(node) is not None or node.target is ANCHOR:  # what an op or an anchor left in the storage
        return False
    storage = facts.storage(node)
    if node.op != "call_function" or not storage or not isinstance(value(node), Tensor) or value(node).dim() == 0:
        return False
    if not all(isinstance(value(source), Tensor) for source in storage):  # a symbolic size takes part
        return False
    packed = [source for source in storage if value(source).dtype == torch.uint8]
    others = [source for source in storage if source not in packed]
    return bool(packed) and all(value(source).numel() < value(node).numel() for source in others)


def _functionalized(node: fx.Node) -> str:
    """A mutating op with its own arguments, and what it changes marked by an exclamation mark."""
    changed = ", ".join(f"{_spelled(base)}!" for base in Mutation(node).written)
    given = ", ".join(f"{name}={_spelled(argument)}" for name, argument in node.kwargs.items()
                      if not name.startswith("_") and (_has_node(argument) or name == "program"))  # fmt: skip
    return f"{_name(node.args[0])}({changed}, {given})"


def _triton(node: fx.Node) -> str:
    """A Triton kernel with its arguments by name, those that it changes marked likewise."""
    tensors: Any = node.kwargs["kwargs"]
    changed: Any = node.kwargs["tensors_to_clone"]
    given = [f"{name}={_spelled(tensor)}{'!' if name in changed else ''}" for name, tensor in tensors.items()]
    return f"triton_kernel({', '.join(['program=' + node.meta['program'], *given])})"


def _has_node(argument: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return bool(found)


def _arguments(node: fx.Node) -> str:
    if node.target is INVOKE:
        body, _, *inputs = arguments(node)
        return ", ".join([str(body.target), *map(_spelled, inputs)])
    spelled = [_spelled(argument) for argument in node.args]
    spelled += [f"{name}={_spelled(argument)}" for name, argument in node.kwargs.items() if _has_node(argument)]
    return ", ".join(spelled)


def _spelled(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_spelled(item) for item in argument)}]"
    return f"{argument:.6g}" if isinstance(argument, float) else str(argument)


def _name(target: Any) -> str:
    return str(target._schema.name.split("::")[1]) if isinstance(target, OpOverload) else str(target.__name__)


def _type(fake: Any) -> str:
    if not isinstance(fake, Tensor):
        return ""
    kind = str(fake.dtype).removeprefix("torch.")
    return f"{_SHORT.get(kind, kind)}[{', '.join(map(str, fake.shape))}]"
