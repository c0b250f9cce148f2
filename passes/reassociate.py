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

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from qgalore_compile.passes import products
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.nodes import (
    FUNCTIONALIZED,
    arguments,
    arguments_changed,
    aten,
    cast,
    dtype,
    erase_dead,
    hint,
    make,
    operands,
)
from qgalore_compile.passes.update import LayerUpdate, colour_regions

T = sympy.Symbol("T", positive=True, integer=True)
"""Tokens of a micro-batch (batch × sequence length)."""


@dataclass(frozen=True)
class Cost:
    """Of both ways to R, as expressions in the tokens T.

    Attributes:
        operations: multiplications and additions, (through the gradient, through the factors).
        traffic: bytes that the products read and write, likewise.
        tokens: T where it is known; None where it is symbolic.
    """

    operations: tuple[sympy.Expr, sympy.Expr]
    traffic: tuple[sympy.Expr, sympy.Expr]
    tokens: int | None

    def falls(self, pair: tuple[sympy.Expr, sympy.Expr], hint: int) -> bool:
        """Whether the second way costs less, at the token count or, where that is symbolic, at ``hint``."""
        at = self.tokens or hint
        return bool((pair[1] - pair[0]).subs(T, at) < 0)

    def __str__(self) -> str:
        return f"operations {self._inequality(self.operations)}; bytes {self._inequality(self.traffic)}"

    def _inequality(self, pair: tuple[sympy.Expr, sympy.Expr]) -> str:
        through_gradient, through_factors = pair
        if self.tokens:
            before, after = (int(side.subs(T, self.tokens)) for side in pair)
            return f"{after:,} {'<' if after < before else '>='} {before:,}"
        return f"{sympy.sstr(through_factors)} < {sympy.sstr(through_gradient)} {holds_where(pair)}"


def holds_where(pair: tuple[sympy.Expr, sympy.Expr]) -> str:
    """For which token counts the second of two costs, linear in T, is the smaller one; in words."""
    slope, constant = (sympy.Poly(sympy.expand(pair[1] - pair[0]), T).coeff_monomial(power) for power in (T, 1))
    if slope == 0:
        return "for every T" if constant < 0 else "for no T"
    bound = sympy.Rational(-constant, slope)
    if slope < 0:
        return "for every T" if bound < 1 else f"for T > {int(sympy.floor(bound))}"
    return "for no T" if bound <= 1 else f"for T < {int(sympy.ceiling(bound))}"


def cost(layer: LayerUpdate) -> Cost:
    """What R costs through the gradient and through its factors."""
    m, n = map(hint, layer.shape)
    r, terms = hint(layer.rank), len(layer.factors.terms)
    size = dtype(layer.down).itemsize
    sizes: list[Any] = [term.contracted for term in layer.factors.terms]
    known = all(isinstance(tokens, int) for tokens in sizes)
    tokens = sum(sizes) // terms if known else None  # micro-batches are equal but for the last
    low = (m if layer.side == "right" else n) * r
    skinny = n if layer.side == "right" else m  # the dimension that P contracts
    operations = (terms * 2 * T * m * n + 2 * r * m * n, terms * 2 * T * r * (m + n))
    # each product reads its operands and writes its result once; a sum of gradients reads and writes one more
    through_gradient = terms * (T * (m + n) + m * n) + (terms - 1) * m * n + m * n + skinny * r + low
    through_factors = terms * (T * skinny + skinny * r + T * r + T * r + T * (m + n - skinny) + low)
    return Cost(
        tuple(map(sympy.expand, operations)),
        (sympy.expand(size * through_gradient), sympy.expand(size * through_factors)),
        tokens,
    )


def obstacle(layer: LayerUpdate, besides: fx.Node | None = None) -> str | None:
    """Why a layer's gradient cannot be taken apart; None if it can.

    Args:
        layer: of the analysis.
        besides: a reader of the gradient that does not count.
    """
    if layer.factors.obstacle is not None:
        node = layer.factors.obstacle
        if node.op == "placeholder":
            return f"the gradient comes into the graph with {node.name}: compile the backward in the same step"
        return f"the gradient is no sum of matrix products: {node.name} ({node.target})"
    inside = layer.factors.nodes
    for node in inside:
        for reader in node.users:
            if reader not in inside and reader is not layer.down and reader is not besides:
                return f"the gradient has another reader: {_describe(reader)}"
    return None


def _describe(reader: fx.Node) -> str:
    if reader.op == "output":
        return "the step returns it, or leaves it in .grad (call zero_grad in the step)"
    if reader.target is FUNCTIONALIZED:
        return f"{reader.name} ({reader.args[0]})"
    return f"{reader.name} ({reader.target})"


def wanted(layer: LayerUpdate, mode: str) -> bool:
    """Whether ``mode`` asks for it; the answer and its inequality hold for every pass that asks."""
    if mode == "cost":
        estimate = cost(layer)
        seen = max(hint(term.contracted) for term in layer.factors.terms)
        return estimate.falls(estimate.operations, seen) and estimate.falls(estimate.traffic, seen)
    return mode == "memory"


def reassociate(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace the down-projection of every layer that allows it."""
    added = False
    for layer in context.layers:
        refused = obstacle(layer, besides=layer.refresh)
        if layer.factors.terms:
            context.note(layer, inequality=str(cost(layer)))
        if refused is None and not wanted(layer, context.reassociate):
            refused = f'reassociate="{context.reassociate}" keeps it'
        refused = refused or obstacle(layer)
        if refused is not None:
            record.skip(layer.down, refused)
            context.note(layer, reassociated=False, not_reassociated=refused)
            continue
        record.match(layer.down)
        context.note(layer, reassociated=True)
        added |= layer.down.target is aten.addmm.default
        _contract(graph, layer)
    if added:  # what a down-projection added is the update's now
        colour_regions(graph, context.layers)


def _contract(graph: fx.Graph, layer: LayerUpdate) -> None:
    """R from the factors, in place of ``layer.down``."""
    old = layer.down
    first, second = operands(old)
    projector_first = second is layer.gradient
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
    old.replace_all_uses_with(result, delete_user_cb=arguments_changed)
    if layer.low is old:
        layer.low = total
    layer.down, layer.gradient = total, total
    erase_dead(graph, old)
