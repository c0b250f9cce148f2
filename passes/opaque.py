"""Make each layer's update, and each product with a quantised matrix, one op that Inductor cannot see into.

    Before    %w = dequantise(%codes, %scale, %offset)          (m, n) in floating point
              %y = mm(%x, %wᵀ)
    After     %y = invoke_subgraph(@linear, %x, %codes, %scale, %offset)

    Before    %new = …                                          Adam, the up-projection, the write-back
              copy_(%codes, %new)
    After     %new, … = invoke_subgraph(@update, %low, %codes, …)
              copy_(%codes, %new)

Requires  updates found by :mod:`qgalore_compile.passes.update`; a product with an operand decoded from integers that
          are inputs of the graph.
Tier      exact: the same operations on the same values.

Left to itself, Inductor computes the dequantised weight of the backward in the forward's kernel, and updates of equal
shape side by side, so that floating-point weights of many layers live at once.  Here a region is compiled as a function
of its own, and what is inside lives for the time of one call.  Layers whose regions are equal share one function, so
that Inductor schedules and compiles it once, however many layers there are.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter

import torch
from torch import fx

from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.decoding import decoding_of, quantised_operands
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.functions import add_output, call_function
from qgalore_compile.passes.nodes import (
    behind,
    erase_dead,
    is_gemm,
    is_tensor,
    looks,
    value,
)
from qgalore_compile.passes.placement import move_behind

_RANDOM = torch.ops.qgalore.random_bits.default


def opaque(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Outline every update and every product with a quantised matrix."""
    outliner = _Outliner(graph, context)
    for layer in context.layers:
        if not layer.region:  # generated code has taken its place
            continue
        update = _without_picks(_without_random_bits(layer.region))
        problem = _problem(update)
        if problem is not None:
            record.skip(layer.up, problem)
            continue
        record.match(layer.up)
        context.note(layer).update_function = outliner.outline("update", update)
        layer.region = []
    facts = context.facts(graph)
    regions = {node: _quantised_product(facts, node) for node in graph.nodes if is_gemm(node)}
    for gemm, region in regions.items():
        if region is None:
            continue
        problem = _problem(region)
        if problem is not None:
            record.skip(gemm, problem)
            continue
        record.match(gemm)
        outliner.outline("product", _without_random_bits(region))
    context.program["functions"] = dict(outliner.calls)


def _without_random_bits(region: list[fx.Node]) -> list[fx.Node]:
    """A region without random bits and what they follow from: the parameter's number in them is a constant, with which
    no two layers would share a function."""
    inside = set(region)
    outside = set(behind((node for node in region if node.target is _RANDOM), inside.__contains__))
    return [node for node in region if node not in outside]


def _without_picks(region: list[fx.Node]) -> list[fx.Node]:
    """A region without what it picks from several results of an op outside (its part of an ``unbind``): the tensor is
    then an input."""
    inside = set(region)
    return [node for node in region if node.target is not operator.getitem or node.args[0] in inside]


def _problem(region: list[fx.Node]) -> str | None:
    """Why a region cannot be a function: a size that is computed in the graph would have to be handed in."""
    for node in region:
        for source in node.all_input_nodes:
            if not is_tensor(source) and source not in region:
                return f"{node.name} takes {source.name}, which is no tensor: a size or a tuple of the graph"
    return None


def _quantised_product(facts: Facts, gemm: fx.Node) -> list[fx.Node] | None:
    """A product and the decoding of its quantised operands; None where none is quantised."""
    decoding = {node: None for each in quantised_operands(facts, gemm) for node in decoding_of(each)}
    return [*sorted(decoding), gemm] if decoding else None


class _Outliner:
    """Moves regions into functions of the graph's module; equal ones into one.

    Attributes:
        calls: how often each function is called.
    """

    def __init__(self, graph: fx.Graph, context: Context) -> None:
        assert graph.owning_module is not None
        self.graph, self.context = graph, context
        self.module = graph.owning_module
        self.names: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    def outline(self, kind: str, region: list[fx.Node]) -> str:
        """Replace a region, in the graph's order, by a call; the name of the function that holds it.

        Nodes of the region that others read too stay for them; only the last one's readers take the call's results,
        unless the region is an update, which nobody reads but anchors.
        """
        inside = set(region)
        inputs = list(dict.fromkeys(source for node in region for source in node.all_input_nodes))
        inputs = [source for source in inputs if source not in inside]
        outputs = [region[-1]] if kind == "product" else [
            node for node in region if any(user not in inside for user in node.users)
        ]  # fmt: skip
        name = self._function(kind, region, inputs, outputs)
        with self.graph.inserting_before(region[-1]):
            call, results = call_function(self.graph, name, inputs, outputs)
        for node, result in zip(outputs, results, strict=True):
            self.context.replace(self.graph, node, result, where=lambda user: user not in inside)
        for node in reversed(region):
            erase_dead(self.graph, node)
        move_behind(call, results)
        self.calls[name] += 1
        return name

    def _function(self, kind: str, region: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> str:
        """The name of the function that does what a region does; made where there is none yet."""
        body = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for index, node in enumerate(inputs):
            made[node] = body.placeholder(f"input_{index}")
            made[node].meta["val"] = value(node)
        for node in region:
            made[node] = body.node_copy(node, made.__getitem__)
        add_output(body, [made[node] for node in outputs])
        # names tell nothing: layers differ in them
        place = {node: f"%{index}" for index, node in enumerate(body.nodes)}
        lines = []
        for node in body.nodes:
            called = node.target if node.op == "call_function" else node.op
            lines.append(f"{called} {fx.map_arg((node.args, node.kwargs), place.get)}")
        layouts = [looks(value(node)) for node in inputs]
        key = hashlib.sha256("\n".join(lines + layouts).encode()).hexdigest()
        if key not in self.names:
            number = len(self.names)
            while hasattr(self.module, f"qgalore_{kind}_{number}"):  # of an earlier run
                number += 1
            self.names[key] = f"qgalore_{kind}_{number}"
            self.module.add_submodule(self.names[key], fx.GraphModule(torch.nn.Module(), body))
        return self.names[key]
