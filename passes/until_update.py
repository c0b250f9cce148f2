"""What lives until a layer's update where the write-back reads the gradient: its factors, or the gradient itself.

    one micro-batch, and the update comes at once     the factors: they are there, and die with the update
    several, or the update waits for other layers     whichever is smaller: the factors of all of them, or the gradient

An update waits where its write-back reads a number that follows from other layers' gradients: whether all of them are
finite (``nonfinite="skip_step"``), or the factor of a clip by their common norm.  No weight is written before such a
number is known, so what each layer needs of its gradient lives until the end of the backward.

Source: the rule with accumulation is the design's (``docs/architecture.md``).  Sizes are of two matrices for each
micro-batch, an upper bound: layers that share an input, as queries, keys and values do, share one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.filesize import decimal
from torch import fx

from qgalore_compile.passes.context import Context
from qgalore_compile.passes.nodes import dtype, hint, is_scalar
from qgalore_compile.passes.regions import LayerUpdate, readers_of_gradient


@dataclass(frozen=True)
class UntilUpdate:
    """What a layer may keep.

    Attributes:
        batches: micro-batches that the gradient is a sum over.
        factors, gradient: bytes.
        waits: the number that the update waits for; None where it comes at once.
    """

    batches: int
    factors: int
    gradient: int
    waits: fx.Node | None

    @property
    def keeps_factors(self) -> bool:
        """Whether it keeps the factors, and the gradient never exists."""
        return (self.batches == 1 and self.waits is None) or self.factors <= self.gradient

    def __str__(self) -> str:
        factors = f"its factors ({decimal(self.factors)} of {self.batches} micro-batch{'es' * (self.batches > 1)})"
        sizes = (factors, f"the gradient ({decimal(self.gradient)})")
        kept, other = sizes if self.keeps_factors else reversed(sizes)
        if self.waits is None:
            return f"{kept} until its update, which comes at once, not {other}"
        return (
            f"{kept} until {self.waits.name} is known, which follows from other layers' gradients, not {other}; with "
            'nonfinite="skip_parameter" and without max_grad_norm the update comes at once'
        )


def until_update(layer: LayerUpdate, context: Context) -> UntilUpdate | None:
    """What a layer keeps; None where its write-back does not read the gradient, or reads one that is no sum of
    products."""
    if not layer.factors.terms or not readers_of_gradient(layer):
        return None
    (m, n), terms = map(hint, layer.shape), layer.factors.terms
    element = dtype(layer.factors.terms[0].gemm).itemsize
    factors = sum(hint(term.contracted) for term in terms) * (m + n) * element
    if context.waiting is None:
        context.waiting = _waiting(layer.up.graph, context.layers)
    return UntilUpdate(len(terms), factors, m * n * dtype(layer.gradient).itemsize, context.waiting.get(layer))


_MANY = object()


def _waiting(graph: fx.Graph, layers: list[LayerUpdate]) -> dict[LayerUpdate, fx.Node]:
    """By layer that waits, the number that it waits for.  One walk for all layers."""
    follows: dict[fx.Node, object] = {}
    downs = {down: layer for layer in layers for down in layer.downs}
    for node in graph.nodes:
        sources = {follows[source] for source in node.all_input_nodes if source in follows}
        sources |= {downs[node]} if node in downs else set()
        if sources:
            follows[node] = sources.pop() if len(sources) == 1 else _MANY
    found = {}
    for layer in layers:
        inside = set(layer.region)
        read = (source for node in layer.region for source in node.all_input_nodes if source not in inside)
        number = next((node for node in read if is_scalar(node) and follows.get(node, layer) is not layer), None)
        if number is not None:
            found[layer] = number
    return found
