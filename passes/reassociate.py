"""Contract a gradient's factors with the projector, instead of the gradient.

    Before    %g = mm(dYᵀ, X)            (m, n)         right side; P (r, n)
              %r = mm(%g, Pᵀ)            (m, r)
    After     %xp = mm(X, Pᵀ)            (T, r)
              %r  = mm(dYᵀ, %xp)         (m, r)

    Before    %r = mm(Pᵀ, %g)            (r, n)         left side; P (m, r)
    After     %pd = mm(Pᵀ, dYᵀ)          (r, T)
              %r  = mm(%pd, X)           (r, n)

A matrix product is associative, so the m × n gradient need not exist.  It distributes over a sum, which is what a
gradient accumulated over micro-batches is, and commutes with numbers and casts (the latter up to rounding): what stands
between the products and the projection is looked through (:mod:`qgalore_compile.passes.products`).

Requires  an update found by :mod:`qgalore_compile.passes.update` whose gradient is a sum of products, each of which
          nobody else reads.  The refresh op reads the gradient until :mod:`qgalore_compile.passes.refresh` has run.
Tier      rounding: a product is taken in another order.

Operations: 2 T r (m + n) instead of 2 T m n + 2 r m n.  ``reassociate="memory"``, the default, does it wherever it can,
since the gradient's m n elements go; ``"cost"`` only where neither operations nor bytes moved grow; ``"never"`` not at
all.  The inequality is in the record either way.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qgalore_compile.kernels import lowering
from qgalore_compile.passes import products
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.nodes import (
    FUNCTIONALIZED,
    arguments,
    aten,
    cast,
    dtype,
    erase_dead,
    hint,
    make,
    operands,
    value,
)
from qgalore_compile.passes.regions import LayerUpdate, colour_regions, readers_of_gradient
from qgalore_compile.passes.until_update import until_update
from qgalore_compile.subspace.cost import Projection, projection


def cost(layer: LayerUpdate) -> Projection:
    """What R costs through the gradient and through its factors."""
    m, n = map(hint, layer.shape)
    sizes: list[Any] = [term.contracted for term in layer.factors.terms]
    known = all(isinstance(tokens, int) for tokens in sizes)
    tokens = sum(sizes) // len(sizes) if known else None  # micro-batches are equal but for the last
    return projection(m, n, hint(layer.rank), layer.side, len(sizes), dtype(layer.down).itemsize, tokens)


def kept(layer: LayerUpdate, context: Context) -> str | None:
    """Why a layer's gradient is formed, its refresh op aside; None where R is to be taken from the factors.  The answer
    holds for every pass that asks."""
    if layer not in context.kept:
        refused = obstacle(layer)
        if refused is None and not _wanted(layer, context.reassociate):
            refused = f'reassociate="{context.reassociate}" keeps the gradient'
        elif refused is None and (found := until_update(layer, context)) is not None and not found.keeps_factors:
            refused = f'reassociate="{context.reassociate}" keeps {found}'
        context.kept[layer] = refused
    return context.kept[layer]


def obstacle(layer: LayerUpdate) -> str | None:
    """Why a layer's gradient cannot be taken apart, its refresh op aside; None if it can."""
    if layer.factors.obstacle is not None:
        node = layer.factors.obstacle
        if node.op == "placeholder":
            return f"the gradient comes into the graph with {node.name}: compile the backward in the same step"
        return f"the gradient is no sum of matrix products: {node.name} ({node.target})"
    own = {*layer.factors.nodes, *layer.downs, layer.refresh, *late_readers(layer)}
    others = (reader for node in layer.factors.nodes for reader in node.users if reader not in own)
    other = next(others, None)
    return None if other is None else _another_reader(other)


def late_readers(layer: LayerUpdate) -> set[fx.Node]:
    """Nodes of the write-back that read the gradient, and can be given a product of their own."""
    return set() if not_late(layer) else {node for node, _ in readers_of_gradient(layer)}


def not_late(layer: LayerUpdate) -> str | None:
    """Why a write-back cannot multiply the gradient's factors itself; None where it can."""
    found = lowering.of_graph(value(layer.down).device)
    if found is None:
        return "there are no generated kernels for this device"
    if layer.projector and not found.products:
        return "kernels of this device take one product in a write-back"
    if not found.lengths and not all(isinstance(term.contracted, int) for term in layer.factors.terms):
        return "kernels of this device are made for a number of tokens, which is known only when the step runs"
    return None


def _another_reader(reader: fx.Node) -> str:
    return f"the gradient has another reader: {_describe(reader)}"


def _refresh_reads(layer: LayerUpdate) -> bool:
    """Whether the refresh op still takes the gradient, or a part of it."""
    return any(layer.refresh in node.users for node in layer.factors.nodes)


def _describe(reader: fx.Node) -> str:
    if reader.op == "output":
        return "the step returns it, or leaves it in .grad (call zero_grad in the step)"
    if reader.target is FUNCTIONALIZED:
        return f"{reader.name} ({reader.args[0]})"
    return f"{reader.name} ({reader.target})"


def _wanted(layer: LayerUpdate, mode: str) -> bool:
    """Whether ``mode`` asks for it."""
    if mode == "cost":
        return cost(layer).falls(max(hint(term.contracted) for term in layer.factors.terms))
    return mode == "memory"


def reassociate(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace the down-projection of every layer that allows it."""
    added = False
    for layer in context.layers:
        note, refused = context.note(layer), kept(layer, context)
        if layer.factors.terms:
            note.inequality = str(cost(layer))
        if refused is None and layer.refresh is not None and _refresh_reads(layer):
            refused = _another_reader(layer.refresh)
        note.reassociated, note.not_reassociated = refused is None, refused
        if refused is not None:
            record.skip(layer.down, refused)
            continue
        record.match(layer.down)
        added |= layer.down.target is aten.addmm.default
        gradient = layer.gradient
        for old in layer.downs:
            _contract(graph, context, layer, old, gradient)
    if added:  # what a down-projection added is the update's now
        colour_regions(graph, context.layers)


def _contract(graph: fx.Graph, context: Context, layer: LayerUpdate, old: fx.Node, gradient: fx.Node) -> None:
    """R from the gradient's factors, in place of ``old``."""
    first, second = operands(old)
    projector_first = second is gradient
    projector = first if projector_first else second
    total: Any = None
    with graph.inserting_before(old):
        for term in layer.factors.terms:
            left, right = term.matrices(graph)
            thin = cast(graph, projector, dtype(left))
            if projector_first:
                product = make(graph, aten.mm.default, make(graph, aten.mm.default, thin, left), right)
            else:
                product = make(graph, aten.mm.default, left, make(graph, aten.mm.default, right, thin))
            product = products.scaled(graph, cast(graph, product, dtype(old)), term.scales)
            total = product if total is None else make(graph, aten.add.Tensor, total, product)
        result = total
        if old.target is aten.addmm.default:
            alpha, beta = (old.kwargs.get(name, 1) for name in ("alpha", "beta"))
            total = products.scaled(graph, total, products.times((), alpha))
            added = products.scaled(graph, arguments(old)[0], products.times((), beta))
            result = make(graph, aten.add.Tensor, added, total)
    is_low = old is layer.down
    context.replace(graph, old, result, down=total, low=total)
    if is_low:
        layer.gradient = total
    erase_dead(graph, old)
