"""Take products of a float32 model in bfloat16, where ``options={"gemm": "bf16"}`` asks for it.

    Before    %u = mm(%n, %p)                                                 float32
    After     %u = cast(mm(cast(%n, bfloat16), cast(%p, bfloat16)), float32)

    Before    %y = addmm(%bias, %x, decode(%codes, …)ᵀ)
    After     %y = add(cast(mm(cast(%x), cast(decode(%codes, …))ᵀ)), %bias)

Which      the two projections of every layer that was matched, each product that R was taken apart into included, and
           every product with a matrix decoded from integers: INT8 weights in the forward and in the input's gradient.
Requires   products of float32, and the option.
Tier       rounding, and that of bfloat16: operands and products have eight bits.  Sums within a product are the
           library's, in float32; CPUs have no product of bfloat16 operands with a float32 result.

States, weights and all arithmetic between products stay float32.  What casts an operand becomes part of the kernel that
makes or decodes it (:mod:`qgalore_compile.passes.fuse`).
"""

from __future__ import annotations

import torch
from torch import fx

from qgalore_compile.passes import products
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.decoding import quantised_operands
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.nodes import (
    TRANSPOSES,
    arguments,
    aten,
    cast,
    dtype,
    erase_dead,
    is_gemm,
    make,
    operands,
    permutation,
    prims,
)
from qgalore_compile.passes.regions import LayerUpdate, colour_regions


def gemm_dtype(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace the products that the option is about."""
    if context.gemm != "bf16":
        return
    facts = context.facts(graph)
    updates = [(*_downs(facts, layer), layer.up, *layer.further) for layer in context.layers]
    found = {gemm: None for products in updates for gemm in products if is_gemm(gemm)}
    found.update((node, None) for node in graph.nodes if is_gemm(node) and quantised_operands(facts, node))
    projections = {node for layer in context.layers for node in (*layer.downs, layer.up, *layer.further)}
    for gemm in sorted(found):
        if dtype(gemm) != torch.float32:
            record.skip(gemm, f"a product of {dtype(gemm)}")
        elif gemm.target is not aten.mm.default and (gemm.target is not aten.addmm.default or gemm in projections):
            record.skip(gemm, "a batch of products, or a projection that something is added to")
        elif any(factor != 1 for factor in gemm.kwargs.values()):
            record.skip(gemm, "a sum with factors")
        else:
            record.match(gemm)
            _replace(graph, context, gemm)
    context.program["products_in_bfloat16"] = len(record.matches)
    colour_regions(graph, context.layers)


def _downs(facts: Facts, layer: LayerUpdate) -> list[fx.Node]:
    """The products that R follows from, as far as a projector takes part: of a gradient that was taken apart, both."""
    outer = [term.gemm for down in layer.downs for term in products.parse(down).terms]
    stored = frozenset(layer.projector)
    inner = [term.gemm for each in outer for side in operands(each) for term in products.parse(side).terms
             if any(facts.storage(operand) == stored for operand in operands(term.gemm))]  # fmt: skip
    return [*inner, *outer]


def _replace(graph: fx.Graph, context: Context, gemm: fx.Node) -> None:
    with graph.inserting_before(gemm):
        product = make(graph, aten.mm.default, *(_narrowed(graph, each) for each in operands(gemm)))
        result = widened = cast(graph, product, torch.float32)
        if gemm.target is aten.addmm.default:
            result = make(graph, aten.add.Tensor, widened, arguments(gemm)[0])
    context.replace(graph, gemm, result, up=product)
    erase_dead(graph, gemm)


def _narrowed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A matrix in bfloat16; of a transposed one the transpose of its cast, since a cast that transposes is a copy."""
    if node.target in TRANSPOSES:
        return make(graph, aten.permute.default, _narrowed(graph, arguments(node)[0]), permutation(node))
    if node.target is prims.convert_element_type.default and dtype(arguments(node)[0]) == torch.bfloat16:
        source: fx.Node = arguments(node)[0]
        return source
    return cast(graph, node, torch.bfloat16)
