"""Let the write-back take the gradient from its factors, tile by tile, instead of reading it.

    Before    %g = mm(dYᵀ, X)                                        m × n
              %r = mm(%g, Pᵀ)
              copy_(%w, %w - lr * (α * mm(%n, P) + %g * %φ))         Fira's update
    After     %g = mm(dYᵀ, X);  %r = mm(%g, Pᵀ)                      left to `reassociate`, which forms no %g
              %l = mm(dYᵀ, X)                                        further: read by the write-back alone
              copy_(%w, %w - lr * (α * mm(%n, P) + %l * %φ))

Requires  an update whose region reads the gradient in its write-back alone, element by element
          (:mod:`qgalore_compile.passes.update` refuses others); a gradient that is a sum of products, to be taken from
          them (:mod:`qgalore_compile.passes.reassociate`) and whose factors may live until then
          (:mod:`qgalore_compile.passes.until_update`); a lowering whose write-back takes several products.
Tier      rounding: of micro-batches one product over all tokens stands for their sum.

`fuse` makes both products of the write-back part of one kernel, so that neither exists as a whole: what is m × n is
%w alone.  The product of the gradient is not computed twice, for `reassociate` takes the other one's place.
"""

from __future__ import annotations

from torch import fx

from qgalore_compile.passes import products
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.nodes import aten, cast, dtype, make
from qgalore_compile.passes.reassociate import kept, not_late
from qgalore_compile.passes.regions import LayerUpdate, colour_regions, readers_of_gradient
from qgalore_compile.passes.until_update import until_update


def late_gradient(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Give every write-back that reads its gradient a product of its own."""
    changed = False
    for layer in context.layers:
        readers = readers_of_gradient(layer)
        if not readers:
            continue
        source, *others = dict.fromkeys(source for _, source in readers)
        parsed = products.parse(source)
        problem = not_late(layer) or kept(layer, context) or _obstacle(layer, [source, *others], parsed)
        if problem is not None:
            record.skip(layer.up, problem)
            continue
        record.match(layer.up)
        context.note(layer).keeps = str(until_update(layer, context))
        own = _once_more(graph, source, parsed.terms, min(node for node, _ in readers))
        for node, _ in readers:
            node.replace_input_with(source, own[0])
        if layer.projector:
            layer.further = (*layer.further, own[1])
        else:
            layer.up = own[1]
        changed = True
    if changed:
        context.facts(graph).forget()
        colour_regions(graph, context.layers)


def _obstacle(layer: LayerUpdate, sources: list[fx.Node], parsed: products.Sum) -> str | None:
    """Why what is read of the gradient, the first of it parsed, cannot be a product of the write-back's own."""
    if layer.projector and layer.up.target is not aten.mm.default:
        return "the product with the projector adds something by itself"
    if len(sources) > 1:
        return f"the write-back reads the gradient in several forms: {', '.join(sorted(map(str, sources)))}"
    if parsed.obstacle is not None:
        return f"what the write-back reads is no sum of matrix products: {parsed.obstacle.name}"
    return None


def _once_more(
    graph: fx.Graph, source: fx.Node, terms: list[products.Term], before: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """(what stands for a gradient of those terms, the product that it is made of), in front of a node."""
    same = len({term.scales for term in terms}) == 1
    with graph.inserting_before(before):
        lefts, rights = [], []
        for term in terms:
            left, right = term.matrices(graph)
            lefts.append(left if same else products.scaled(graph, left, term.scales))
            rights.append(right)
        # one product over the tokens of all micro-batches
        left, right = (
            each[0] if len(each) == 1 else make(graph, aten.cat.default, each, dim)
            for each, dim in ((lefts, 1), (rights, 0))
        )
        product = make(graph, aten.mm.default, left, right)
        found = products.scaled(graph, product, terms[0].scales) if same else product
        return cast(graph, found, dtype(source)), product
