"""Decode a quantised operand before its product where a GPU is faster so.

    Before    %y = gemm("…", [%x, %codes, %scale, %offset])
    After     %d = auto_functionalized(run_program, "…", read=[%codes, %scale, %offset], _all_bases=[empty(…)])
              %y = mm(%x, getitem(%d, 1)ᵀ)

    Before    auto_functionalized(run_gemm, "…", read=[%n, %scale, %offset, %codes, …], _all_bases=[…])
    After     the same with a program that takes P as it is, and read=[%n, getitem(%d, 1), …]

Requires  a product with a quantised operand, on a GPU; rows of a multiple of 8 elements; that the model of
          :mod:`qgalore_compile.kernels.triton.decode_first` finds it faster.
Tier      rounding: a library may add up a product in another order.  What is decoded is the same bit for bit.

What has been decoded lives from its own kernel to the product behind it, and the products of a step share that memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qgalore_compile.kernels import ops
from qgalore_compile.kernels.ir.gemm import Operand, parsed
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton.decode_first import decoded_program, decodes_first, value_of
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.launch import functionalized, replace
from qgalore_compile.passes.nodes import FUNCTIONALIZED, arguments_changed, aten, make, transpose, value


def decode_first(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Take the decoding out of every product of a GPU that is faster without."""
    known: dict[Any, bool] = {}  # of equal layers: the model looks at some hundred tiles, which takes 20 ms
    for node in list(graph.nodes):
        functional = node.target is FUNCTIONALIZED and node.args[0] is ops.run_gemm
        if not functional and node.target is not ops.gemm:
            continue
        device = value(node.kwargs["_all_bases"][0] if functional else node).device
        if not triton_kernels.on_gpu(device) or not _faster(node, device, functional, known):
            continue
        result = _in_place(graph, node) if functional else _by_library(graph, node)
        record.match(result)
        for layer in context.layers:
            layer.up, layer.down = (result if each is node else each for each in (layer.up, layer.down))
            layer.low = result if layer.low is node else layer.low


def _faster(node: fx.Node, device: torch.device, functional: bool, known: dict[Any, bool]) -> bool:
    target = triton_kernels.target_of(device)
    text, reads = _call(node, functional)
    fakes = [value(each) for each in reads]
    product, _ = triton_kernels.product_of(parsed(text), fakes, target, triton_kernels.precision())
    call = (text, *product[1:], target)
    if call not in known:
        known[call] = decodes_first(product, target)
    return known[call]


def _call(node: fx.Node, functional: bool) -> tuple[str, list[fx.Node]]:
    text: Any = node.kwargs["program"] if functional else node.args[0]
    reads: Any = node.kwargs["read"] if functional else node.args[1]
    return text, list(reads)


def _in_place(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The product whose result an epilogue takes stays a generated kernel."""
    text, reads = _call(node, True)
    program = parsed(text)
    left, right = program.operands(reads)
    with graph.inserting_before(node):
        operands = [_decoded(graph, program.left, left), _decoded(graph, program.right, right)]
    rest = reads[len(left) + len(right) :]
    node.kwargs = {**node.kwargs, "program": str(decoded_program(program)), "read": [*operands, *rest]}
    arguments_changed(node)
    return node


def _by_library(graph: fx.Graph, node: fx.Node) -> fx.Node:
    text, reads = _call(node, False)
    program = parsed(text)
    with graph.inserting_before(node):
        operands = []
        for operand, tensors in zip((program.left, program.right), program.operands(reads), strict=True):
            matrix = _decoded(graph, operand, tensors)
            operands.append(transpose(graph, matrix) if operand.transposed else matrix)
        result = make(graph, aten.mm.default, *operands)
    replace(graph, node, result)
    return result


def _decoded(graph: fx.Graph, operand: Operand, tensors: list[fx.Node]) -> fx.Node:
    """The tensor of an operand, which may be its transpose."""
    prologue = operand.prologue
    if prologue is None:
        return tensors[0]
    dtype, device = MEMORY[value_of(prologue)].dtype, value(tensors[0]).device
    size = [prologue.space.rows, prologue.space.columns]
    out = make(graph, aten.empty.memory_format, size, dtype=dtype, device=device, pin_memory=False)
    _, (result,) = functionalized(graph, ops.run_program, str(prologue), [out], tensors)
    return result
