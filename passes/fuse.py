"""Turn each update into generated kernels.

    Before    %n = adam(decode(%codes, …), %r, …)                    on r × n
              %u = mm(decode(%projector), %n)                        m × n
              copy_(%weight, write_back(decode(%weight), %u, random_bits(…)))
    After     %n = empty(…);  run_program("…", [%codes!, …, %n!], [%r, …])
              run_gemm("…", [%weight!, …], [%projector, %n, …])

    Before    copy_(%embedding, %embedding - lr * adam(decode(%codes, …), %g))
    After     run_program("…", [%embedding!, %codes!, …], [%g, …])

Requires  updates found by :mod:`qgalore_compile.passes.update`, on a device that a lowering exists for; regions of
          operations that :mod:`qgalore_compile.kernels.from_graph` reads.  What is left is left as it was.
Tier      rounding: the same operations in float32, in another order within a group's sums; bf16 GEMMs in blocks.

Both programs of a layer change states and weight in their own storage.  The product and the decoded projector exist in
blocks that stay in cache.  Updates at full rank (embeddings, head) become one program each; small ones stay with
Inductor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from qgalore_compile.kernels import ops
from qgalore_compile.kernels.from_graph import (
    Output,
    Refusal,
    RefusedError,
    Region,
    candidates,
    from_graph,
)
from qgalore_compile.kernels.gemm import VALUE, GemmProgram, Operand
from qgalore_compile.kernels.program import BlockProgram
from qgalore_compile.kernels.spelling import POINTWISE, VIEWS
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.nodes import (
    FUNCTIONALIZED,
    TRANSPOSES,
    anchors,
    aten,
    erase_dead,
    is_gemm,
    make,
    operands,
    shape,
    value,
    written,
)
from qgalore_compile.passes.placement import move_behind
from qgalore_compile.passes.update import LayerUpdate

SMALL = 1 << 16
"""Elements below which an update at full rank stays with Inductor: a call costs about 30 µs, its loop less."""

_RANDOM = torch.ops.qgalore.random_bits.default
_DEVICES = ("cpu",)


def fuse(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Fuse every layer's update, and every large one at full rank."""
    facts = Facts(graph)
    for layer in context.layers:
        node = layer.up
        problem = _no_lowering(layer.parameter[0])
        if problem is None:
            try:
                calls = _Sandwich(graph, facts, layer).fuse()
            except RefusedError as refused:
                problem = str(refused)
        if problem is not None:
            record.skip(node, problem)
            context.note(layer, not_fused=problem)
            continue
        record.matches.append(node.name)
        context.note(layer, update_function=f"generated, {len(calls)} kernels")
        layer.region = []
    owned = {anchor for layer in context.layers for anchor in layer.anchors}
    by_name = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for other in context.updates.unmatched if context.updates else ():
        parameter = by_name.get(other.input)
        if parameter is None or math.prod(shape(parameter)) < SMALL or _no_lowering(parameter) is not None:
            continue
        try:
            _full_rank(graph, parameter, owned)
        except RefusedError as refused:
            record.skip(parameter, f"{other.name}: {refused}")
            continue
        record.match(parameter)


def _no_lowering(parameter: fx.Node) -> str | None:
    kind = value(parameter).device.type
    if kind in _DEVICES:
        return None
    return f"no generated kernels for {kind!r} yet, only for {', '.join(map(repr, _DEVICES))}"


class _Sandwich:
    """One layer's update, about to be fused."""

    def __init__(self, graph: fx.Graph, facts: Facts, layer: LayerUpdate) -> None:
        self.graph, self.layer = graph, layer
        if layer.up.target is not aten.mm.default:
            raise _refused(layer.up)
        self.targets = {stored: target for target, stored in map(written, layer.anchors) if shape(target)}
        # random bits are the layer's alone, though the analysis leaves them out
        bits = {
            source: None for node in layer.region for source in node.all_input_nodes
            if source.target is _RANDOM and all(user in layer.region for user in source.users)
        }  # fmt: skip
        self.region = [*bits, *layer.region]
        self.inside = set(self.region)
        first, second = operands(layer.up)
        self.low_is_left = facts.storage(first) is None
        self.inner, self.projector = (first, second) if self.low_is_left else (second, first)

    def fuse(self) -> list[fx.Node]:
        """Replace the update by calls; nothing has changed where it raises."""
        layer = self.layer
        between = set(layer.between)
        inner, transposed = _through_transposes(self.inner)
        states = [Output(node, target) for node, target in self.targets.items() if node in between]
        weights = [Output(node, target) for node, target in self.targets.items() if node not in between]
        made = [Output(inner)] if inner in self.inside else []
        low = None
        if made or states:
            nodes = [node for node in self.region if node in between]
            low = from_graph(nodes, [*made, *states], candidates(nodes, shape(inner)))
        projector, straight = _through_transposes(self.projector)
        prologue = None
        if projector in self.inside:
            nodes = [node for node in self.region if node in between]
            prologue = from_graph(nodes, [Output(projector)], _matrices(candidates(nodes, shape(projector)), projector))
        nodes = [node for node in self.region if node not in between and node is not layer.up]
        epilogue = from_graph(nodes, weights, _matrices(candidates(nodes, layer.shape), layer.up))
        product = next((name for name, node in epilogue.buffers.items() if node is layer.up), None)
        if product is None or shape(layer.up) != layer.shape:
            raise _refused(layer.up)
        calls = []
        replaced = inner
        if low is not None:
            call, results = _launch(self.graph, low, [*made, *states], self.region)
            replaced = results.get(inner, inner)
            calls.append(call)
        operand = Operand(_valued(prologue), straight)
        plain = Operand(None, transposed)
        parts: list[fx.Node] = list(prologue.buffers.values()) if prologue else [projector]
        left, right = (plain, operand) if self.low_is_left else (operand, plain)
        reads = [replaced, *parts] if self.low_is_left else [*parts, replaced]
        text = str(GemmProgram(left, right, epilogue.program, product))
        call, _ = _launch(self.graph, epilogue, weights, self.region, ops.run_gemm, text, reads, product)
        layer.up = call
        self._clean()
        return [*calls, call]

    def _clean(self) -> None:
        for node in reversed(self.region):
            if not node._erased:
                erase_dead(self.graph, node)


def _refused(node: fx.Node) -> RefusedError:
    return RefusedError(Refusal.OPERATION, node)


def _through_transposes(node: fx.Node) -> tuple[fx.Node, bool]:
    """(what a matrix is a transpose of, whether it is one)."""
    transposed = False
    while node.target in TRANSPOSES:
        node, transposed = node.all_input_nodes[0], not transposed
    return node, transposed


def _matrices(spaces: Sequence[Any], node: fx.Node) -> list[Any]:
    """The spaces that keep a matrix's rows apart, as blocks of it need."""
    rows, columns = shape(node)
    return [space for space in spaces if space[:2] == (rows, columns)]


def _valued(region: Region | None) -> BlockProgram | None:
    """A prologue's program, with its result named as products expect it."""
    if region is None:
        return None
    (name,) = region.outputs.values()
    program = region.program
    renamed = BlockProgram(program.space, tables=program.tables, instructions=program.instructions)
    renamed.buffers = [buffer._replace(name=VALUE) if buffer.name == name else buffer for buffer in program.buffers]
    renamed.stores = [(VALUE if buffer == name else buffer, number) for buffer, number in program.stores]
    return renamed


def _launch(
    graph: fx.Graph, region: Region, outputs: Sequence[Output], replaces: Iterable[fx.Node],
    op: Any = ops.run_program, text: str | None = None, first: Sequence[fx.Node] = (), leave: str = "",
) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:  # fmt: skip
    """Call a region's kernel in place of its nodes: the call, and the new node for each output's.

    Args:
        replaces: nodes that stand in the graph still; the call comes behind the last.
        op, text: what to call with which text; the region's program by default.
        first: tensors to hand over before those that the region reads.
        leave: a buffer that the caller does not hand over.
    """
    program = region.program
    by_buffer = {buffer: node for node, buffer in region.outputs.items()}
    bases: list[fx.Node] = []
    last = max(node for node in replaces if not node._erased)
    with graph.inserting_before(last):
        for buffer in program.written():
            target = region.buffers.get(buffer.name)
            if target is None:
                fake = value(by_buffer[buffer.name])
                target = make(
                    graph, aten.empty.memory_format, list(fake.shape), dtype=fake.dtype, device=fake.device,
                    pin_memory=False,
                )  # fmt: skip
            bases.append(target)
        reads = [region.buffers[b.name] for b in program.buffers if b.access == "in" and b.name != leave]
        reads = [_contiguous(graph, node) for node in [*first, *reads]]
        kwargs: dict[str, Any] = {f"_written_{index}_base_index": index for index in range(len(bases))}
        call = graph.call_function(
            FUNCTIONALIZED, (op,),
            {"program": text or str(program), "read": reads, "numbers": list(region.numbers.values()),
             "_written_length": len(bases), **kwargs, "_all_bases": bases},
        )  # fmt: skip
        call.meta["val"] = (None, *map(value, bases))
        results = {}
        for index, buffer in enumerate(program.written()):
            result = graph.call_function(operator.getitem, (call, index + 1))
            old = by_buffer[buffer.name]
            result.meta = {"val": value(bases[index])}
            if "stack_trace" in old.meta:
                result.meta["stack_trace"] = old.meta["stack_trace"]
            results[old] = result
    for old, result in results.items():
        old.replace_all_uses_with(result, delete_user_cb=lambda user: user is not call)
    move_behind(call, list(results.values()))
    return call, results


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if value(node).is_contiguous():
        return node
    return make(graph, aten.clone.default, node, memory_format=torch.contiguous_format)


# -- updates at full rank ---------------------------------------------------------------------------------------------


def _full_rank(graph: fx.Graph, parameter: fx.Node, owned: set[fx.Node]) -> None:
    """Fuse the update of a parameter that is not projected, with its states."""
    writing = {target: anchor for anchor in anchors(graph) for target, _ in [written(anchor)]
               if anchor not in owned and shape(target)}  # fmt: skip
    mine = {parameter: writing[parameter]}
    pending = [parameter]
    while pending:
        for state in _states(written(mine[pending.pop()])[1]):
            if state in writing and state not in mine:
                mine[state] = writing[state]
                pending.append(state)
    region = _exclusive(graph, set(mine.values()))
    refused: RefusedError | None = None
    while True:
        inside = set(region)
        outputs = [Output(stored, target) for target, stored in map(written, mine.values()) if stored in inside]
        if not any(output.target is parameter for output in outputs):
            raise refused or _refused(mine[parameter])
        try:
            found = from_graph(region, outputs, candidates(region, shape(parameter)))
        except RefusedError as error:
            # what the network computes, down to the gradient, is no part of the update: cut there and read on
            refused = refused or error
            smaller = _without(region, outputs, error.node)
            if len(smaller) == len(region):
                raise refused from error
            region = smaller
            continue
        _launch(graph, found, outputs, region)
        for node in reversed(region):
            if not node._erased:
                erase_dead(graph, node)
        return


_LOCAL = {torch.ops.qgalore.quantize_dynamic8.default, torch.ops.qgalore.dequantize_dynamic8.default, _RANDOM,
          aten.cat.default, aten.slice.Tensor, aten.expand.default, aten.amin.default, aten.amax.default,
          torch.ops.qgalore.drop_tail.default}  # fmt: skip


def _states(stored: fx.Node) -> list[fx.Node]:
    """Inputs that a new value follows from through pointwise operations, formats and views alone."""
    seen, pending = {stored: None}, [stored]
    while pending:
        for source in pending.pop().all_input_nodes:
            found = shape(source) and (source.op == "placeholder" or _is_local(source))
            if source not in seen and (found or source.target is operator.getitem or source.target in _LOCAL):
                seen[source] = None
                pending.append(source)
    return [node for node in seen if node.op == "placeholder"]


def _is_local(node: fx.Node) -> bool:
    return node.target in _LOCAL or node.target in POINTWISE or node.target in VIEWS


def _exclusive(graph: fx.Graph, ends: set[fx.Node]) -> list[fx.Node]:
    """Nodes that nobody reads but `ends` and such nodes, in the order of the graph."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not node.users or is_gemm(node) or node.is_impure():
            continue
        if all(user in found or user in ends for user in node.users) and node not in ends:
            found.add(node)
    return [node for node in graph.nodes if node in found]


def _without(region: list[fx.Node], outputs: list[Output], cut: fx.Node) -> list[fx.Node]:
    """A region without a node and what is needed for that alone."""
    needed: set[fx.Node] = set()
    pending = [output.node for output in outputs if output.node is not cut]
    inside = set(region)
    while pending:
        node = pending.pop()
        if node in inside and node is not cut and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return [node for node in region if node in needed]
