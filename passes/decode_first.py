"""Decode a quantised operand before its product where a GPU is faster so.

    Before    %y = gemm("…", [%x, %codes, %scale, %offset])
    After     %d = auto_functionalized(run_program, "…", read=[%codes, %scale, %offset], _all_bases=[empty(…)])
              %y = mm(%x, getitem(%d, 1)ᵀ)

    Before    auto_functionalized(run_gemm, "…", read=[%n, %scale, %offset, %codes, …], _all_bases=[…])
    After     the same with a program that takes P as it is, and read=[%n, getitem(%d, 1), …]

Requires  a product with a quantised operand, on a GPU; rows of a multiple of 8 elements, and that the model of
          :mod:`qgalore_compile.kernels.triton.decode_first` finds it faster; or groups that are rotated, of any rows.
Tier      rounding: a library may add up a product in another order.  What is decoded is the same bit for bit.

What has been decoded lives from its own kernel to the product behind it, and the products of a step share that memory.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qgalore_compile.kernels import lowering, ops
from qgalore_compile.kernels.ir.gemm import Operand, parsed
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton.decode_first import decoded_program, decodes_first, value_of
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.kernel_calls import KernelCall, kernel_calls
from qgalore_compile.passes.launch import functionalized
from qgalore_compile.passes.nodes import Mutation, aten, erase_dead, make, transpose, value


def decode_first(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Take the decoding out of every product of a GPU that is faster without."""
    known: dict[Any, bool] = {}  # of equal layers
    for call in kernel_calls(graph):
        if lowering.runs("decode_first", call.device) and call.text.startswith("gemm ") and _faster(call, known):
            result = _in_place(graph, call, call.mutation) if call.mutation else _by_library(graph, context, call)
            record.match(result)


def _faster(call: KernelCall, known: dict[Any, bool]) -> bool:
    target = triton_kernels.target_of(call.device)
    fakes = [value(each) for each in call.reads]
    product, _ = triton_kernels.product_of(parsed(call.text), fakes, target, triton_kernels.precision())
    key = (call.text, *product[1:], target)
    if key not in known:
        known[key] = decodes_first(product, target)
    return known[key]


def _in_place(graph: fx.Graph, call: KernelCall, mutation: Mutation) -> fx.Node:
    """The product whose result an epilogue takes stays a generated kernel."""
    program = parsed(call.text)
    (left, right), *_ = program.operands(call.reads)
    with graph.inserting_before(call.node):
        operands = [_decoded(graph, program.left, left), _decoded(graph, program.right, right)]
    rest = call.reads[len(left) + len(right) :]
    return mutation.with_(program=str(decoded_program(program)), reads=[*operands, *rest]).node


def _by_library(graph: fx.Graph, context: Context, call: KernelCall) -> fx.Node:
    program = parsed(call.text)
    with graph.inserting_before(call.node):
        operands = []
        for operand, tensors in zip((program.left, program.right), program.operands(call.reads)[0], strict=True):
            matrix = _decoded(graph, operand, tensors)
            operands.append(transpose(graph, matrix) if operand.transposed else matrix)
        result = make(graph, aten.mm.default, *operands)
    context.replace(graph, call.node, result)
    erase_dead(graph, call.node)
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
