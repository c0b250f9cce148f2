"""Decode a quantised operand of a product where the product loads it.

    Before    %w = decode(%codes, %scale, %offset)          (m, n) in floating point
              %y = mm(%x, %wᵀ)
    After     %y = gemm("…", [%x, %codes, %scale, %offset])

    Before    %y = addmm(%bias, %x, %wᵀ)
    After     %p = gemm("…", [%x, %codes, %scale, %offset]);  %y = add(%p, %bias)

Requires  a product of two matrices one of which is decoded from integers that are inputs of the graph: INT8 weights in
          the forward and in the gradient of the input, INT4 projectors; a device that a lowering exists for.  What
          an ``addmm`` adds is added with the factor 1, and not to a projection.
Tier      rounding: a product computed in blocks, which a library may add up in another order.  The sum of an ``addmm``
          is Inductor's, which fuses it with what reads it: in bfloat16 the product is rounded before it, too.

The decoded operand exists in blocks.  Inductor would store it whole, and compute the backward's beside the forward's.
"""

from __future__ import annotations

from torch import fx

from qgalore_compile.kernels import ops
from qgalore_compile.kernels.ir.gemm import GemmProgram
from qgalore_compile.kernels.read.region import RefusedError
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.decoding import decoding_of, quantised_operands
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.launch import contiguous, no_lowering, operand, refuse_without_kernel
from qgalore_compile.passes.nodes import arguments, aten, erase_dead, is_gemm, make, operands


def fuse_products(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace every product of two matrices with a quantised operand."""
    facts = context.facts(graph)
    downs = {down for layer in context.layers for down in layer.downs}
    # a product inside an update that was not fused is a part of that
    taken = {node for layer in context.layers for node in layer.region}
    found = {node: quantised_operands(facts, node) for node in graph.nodes if is_gemm(node) and node not in taken}
    left: list[dict[str, str]] = []
    for gemm, quantised in found.items():
        if not quantised:
            continue
        problem = no_lowering(gemm)
        if gemm.target not in (aten.mm.default, aten.addmm.default) or len(quantised) > 1:
            problem = "only a product of two matrices, one of them quantised"
        elif any(factor != 1 for factor in gemm.kwargs.values()):
            problem = "a sum with factors"
        elif gemm.target is aten.addmm.default and gemm in downs:
            problem = "a sum of a projected gradient and something else"
        if problem is None:
            try:
                _replace(graph, context, gemm, quantised)
            except RefusedError as refused:
                problem = str(refused)
        if problem is not None:
            record.skip(gemm, problem)
            name = _weight(facts, context, quantised)
            if name is not None:
                left.append({"name": name, "reason": problem, "node": gemm.name})
            continue
        record.match(gemm)
    if left:
        context.program["unfused_products"] = left


def _weight(facts: Facts, context: Context, quantised: list[fx.Node]) -> str | None:
    """The name of a quantised weight among a product's operands; None where those are projectors."""
    projectors = {stored for layer in context.layers for stored in layer.projector}
    for stored in sorted(node for each in quantised for node in facts.storage(each) or ()):
        known = context.parameters
        if stored not in projectors if known is None else stored.name in known:
            return context.name_of.get(stored.name, stored.name)
    return None


def _replace(graph: fx.Graph, context: Context, gemm: fx.Node, quantised: list[fx.Node]) -> None:
    parts = [operand(decoding_of(each) if each in quantised else [], each) for each in operands(gemm)]
    program = GemmProgram(parts[0][0], parts[1][0])
    refuse_without_kernel(program, [node for _, tensors in parts for node in tensors], gemm)
    with graph.inserting_before(gemm):
        reads = []
        for each, tensors in parts:
            reads += [contiguous(graph, node) if each.prologue else node for node in tensors]
        result = make(graph, ops.gemm, str(program), reads)
        if gemm.target is aten.addmm.default:
            result = make(graph, aten.add.Tensor, result, arguments(gemm)[0])
    context.replace(graph, gemm, result)
    erase_dead(graph, gemm)
