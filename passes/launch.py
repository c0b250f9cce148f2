"""Put a call of a generated kernel in the place of the nodes that it replaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from qgalore_compile.kernels import lowering, ops
from qgalore_compile.kernels.ir.gemm import VALUE, GemmProgram, Operand
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.read.from_graph import from_graph
from qgalore_compile.kernels.read.region import Output, Refusal, RefusedError, Region, candidates
from qgalore_compile.passes.context import Context
from qgalore_compile.passes.nodes import (
    TRANSPOSES,
    Mutation,
    aten,
    behind,
    erase_dead,
    first_version,
    is_anchor,
    make,
    shape,
    value,
)
from qgalore_compile.passes.placement import move_behind


def no_lowering(node: fx.Node) -> str | None:
    """Why there are no generated kernels for the device of a node's tensor; None where there are."""
    device = value(node).device
    if lowering.of_graph(device) is not None:
        return None
    return f"no generated kernels for {device.type!r}, only for {', '.join(map(repr, lowering.devices()))}"


def refuse_without_kernel(program: BlockProgram | GemmProgram, reads: Sequence[fx.Node], node: fx.Node) -> None:
    """Raise :class:`RefusedError` where the lowering of a node's device does not take a program: it must stay what it
    was, since a kernel that cannot be made would be missed at the first step only.

    Args:
        program: a region, or a product of which
        reads: are the operands' tensors.
    """
    device = value(node).device
    found = lowering.of_graph(device)
    refusal = found.accepts(program, [value(each) for each in reads], device) if found else None
    if refusal is not None:
        raise RefusedError(refusal, node)


def refuse_own_results(region: Region) -> None:
    """Raise :class:`RefusedError` where a region reads what follows from what it writes (m / ‖m‖, the norm left outside
    of it): its call would have to come both before that and behind."""
    results = {output.node for output in region.outputs}
    first = min(results)
    for read in region.buffers.values():
        if not results.isdisjoint(behind([read], lambda node: not node < first)):
            raise RefusedError(Refusal.OPERATION, read)


def through_transposes(node: fx.Node) -> tuple[fx.Node, bool]:
    """(what a matrix is a transpose of, whether it is one)."""
    transposed = False
    while node.target in TRANSPOSES:
        node, transposed = node.all_input_nodes[0], not transposed
    return node, transposed


def matrix_spaces(nodes: Sequence[fx.Node], matrix: fx.Node) -> list[Space]:
    """Spaces that keep a matrix's rows apart, as blocks of it need."""
    return [space for space in candidates(nodes, shape(matrix)) if space[:2] == shape(matrix)]


def operand(nodes: Sequence[fx.Node], matrix: fx.Node) -> tuple[Operand, list[fx.Node]]:
    """A product's operand, decoded by `nodes` as far as they make it, and the tensors that it takes.

    Raises:
        RefusedError: nodes that are no program, or one that draws random bits.
    """
    source, transposed = through_transposes(matrix)
    if source not in nodes:
        return Operand(None, transposed), [source]
    region = from_graph(nodes, [Output(source)], matrix_spaces(nodes, source))
    if region.numbers:
        raise RefusedError(Refusal.DRAWS, source)
    return Operand(_prologue(region), transposed), list(region.buffers.values())


def _prologue(region: Region) -> BlockProgram:
    """A region's program with its only result named as products expect it."""
    (name,) = region.outputs.values()
    program = region.program
    renamed = BlockProgram(program.space, tables=program.tables, instructions=program.instructions)
    renamed.buffers = [buffer._replace(name=VALUE) if buffer.name == name else buffer for buffer in program.buffers]
    renamed.stores = [(VALUE if buffer == name else buffer, number) for buffer, number in program.stores]
    return renamed


def launch(
    graph: fx.Graph, context: Context, region: Region, replaces: Iterable[fx.Node], *,
    gemm: str = "", operands: Sequence[fx.Node] = (), products: Sequence[str] = (),
) -> tuple[fx.Node, dict[Output, fx.Node]]:  # fmt: skip
    """Call a region's kernel: the call, and the node that now stands for each output.

    Args:
        replaces: nodes that stand in the graph still; the call comes behind the last.
        gemm: where the region is a product's epilogue, the product's text; then also
        operands: the tensors of its operands, and
        products: the region's buffers that are products.
    """
    program = region.program
    output_of = {buffer: output for output, buffer in region.outputs.items()}
    op = ops.run_gemm if gemm else ops.run_program
    last = max(node for node in replaces if not node._erased)
    results: dict[Output, fx.Node] = {}
    with graph.inserting_before(last):
        bases = [
            region.buffers.get(buffer.name) or empty_like(graph, output_of[buffer.name].node)
            for buffer in program.written()
        ]  # fmt: skip
        reads = [region.buffers[b.name] for b in program.buffers if b.access == "in" and b.name not in products]
        reads = [contiguous(graph, node) for node in [*operands, *reads]]
        call, stored = functionalized(graph, op, gemm or str(program), bases, reads, list(region.numbers.values()))
        for buffer, result in zip(program.written(), stored, strict=True):
            results[output_of[buffer.name]] = result
    _hand_over(graph, context, call, results)
    move_behind(call, list(results.values()))
    return call, results


def functionalized(
    graph: fx.Graph, op: Any, text: str, bases: Sequence[fx.Node], reads: Sequence[fx.Node], numbers: Sequence[int] = ()
) -> tuple[fx.Node, list[fx.Node]]:
    """A call of a program that writes tensors, as functionalisation leaves one: the call, and what it makes of each."""
    written = {"written": list(bases)}
    call, results = Mutation.call(graph, op, written, program=text, read=list(reads), numbers=list(numbers))
    return call.node, results


def _hand_over(graph: fx.Graph, context: Context, call: fx.Node, results: dict[Output, fx.Node]) -> None:
    """Give readers the results: an anchor what is stored where it writes, others any."""
    for output, result in results.items():
        for user in list(output.node.users):
            if is_anchor(user) and output.target is not None and user.args[0] is first_version(output.target):
                user.update_arg(1, result)
    for output, result in results.items():
        context.replace(graph, output.node, result, where=lambda user: user is not call)


def empty_like(graph: fx.Graph, like: fx.Node) -> fx.Node:
    """An allocation of a node's shape, type and device."""
    fake = value(like)
    return make(
        graph, aten.empty.memory_format, list(fake.shape), dtype=fake.dtype, device=fake.device, pin_memory=False
    )


def contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A node's tensor with its elements in row-major order."""
    if value(node).is_contiguous():
        return node
    return make(graph, aten.clone.default, node, memory_format=torch.contiguous_format)


def erase(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those nodes, given in the order of the graph, that nobody reads any more."""
    for node in reversed(nodes):
        if not node._erased:
            erase_dead(graph, node)
