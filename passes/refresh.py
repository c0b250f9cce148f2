"""Move everything that only a refresh needs into the refresh op.

    Before    %g = mm(dYᵀ, X)                                        every step
              refresh_(%r, projector, schedule, [%g])
    After     refresh_(%r, projector, schedule, [dY, X])             the op forms G when its schedule says so

    Before    %g = addmm(mm(dY1ᵀ, X1), dY2ᵀ, X2)                     two micro-batches
    After     %c1 = gather_gradient(None, schedule, dY1, X1)         returns at once when no refresh is due
              %c2 = gather_gradient(%c1, schedule, dY2, X2)
              refresh_(%r, projector, schedule, [%c2])

With one product the op takes the factors themselves, which die right behind it; it forms G only where that is cheaper
(:mod:`qgalore_compile.subspace.cost`).
With several, one op a micro-batch adds to a buffer that exists for due parameters in due steps alone, so that no
micro-batch's factors wait for the last one.

Requires  an update whose gradient is read by its down-projection and its refresh op only and is a sum of products, and
          whose down-projection will be taken from the factors (:mod:`qgalore_compile.passes.reassociate`).
Tier      rounding: the op adds the products in float32, or takes the subspace from the factors.
"""

from __future__ import annotations

import torch
from torch import fx

from qgalore_compile.passes import products
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.nodes import Mutation, erase_dead, hint, is_tensor, make, transpose, value
from qgalore_compile.passes.reassociate import kept
from qgalore_compile.passes.regions import LayerUpdate
from qgalore_compile.subspace.cost import described
from qgalore_compile.subspace.refresh import REFRESHES


def refresh(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Hand every refresh op the gradient's factors."""
    for layer in context.layers:
        if layer.refresh is None or Mutation.of(layer.refresh, *REFRESHES) is None:
            continue
        call = Mutation(layer.refresh)
        note = context.note(layer)
        refused = kept(layer, context)
        given = call["factors"]
        gradient = given[0] if len(given) == 1 else None
        parsed = None
        if refused is None and is_tensor(gradient):
            parsed = layer.factors if gradient is layer.gradient else products.parse(gradient)
        if refused is None and (parsed is None or parsed.obstacle is not None):
            refused = "what the op was given is no gradient that can be taken apart"
        if refused is not None:
            record.skip(call.node, refused)
            note.refresh_takes, note.refresh_cost = "the gradient, in every step", _cost(layer, call, 0)
            continue
        assert parsed is not None
        assert isinstance(gradient, fx.Node)
        record.match(call.node)
        count = len(parsed.terms)
        note.refresh_takes = "the factors of the gradient" if count == 1 else f"{count} gathered products"
        note.refresh_cost = _cost(layer, call, count)
        _hand_over(graph, call, parsed)
        erase_dead(graph, gradient)


def _hand_over(graph: fx.Graph, call: Mutation, parsed: products.Sum) -> None:
    carried: fx.Node | None = None
    factors: list[fx.Node] = []
    scales: list[fx.Node] = []
    with graph.inserting_before(call.node):
        for term in parsed.terms:
            left, right = term.matrices(graph)
            grad_output, inputs = transpose(graph, left), right
            scale = products.scale_of(graph, term.scales, value(grad_output).device)
            if len(parsed.terms) > 1:
                gather = torch.ops.qgalore.gather_gradient.default
                carried = make(graph, gather, carried, call["schedule"], grad_output, inputs, scale)
                continue
            factors = [grad_output, inputs]
            scales = [scale] if scale is not None else []
    call.with_(factors=[carried] if carried is not None else factors, scales=scales)


def _cost(layer: LayerUpdate, call: Mutation, terms: int) -> str:
    """What one refresh costs beside the step: operations in the tokens T, and bytes that exist for its time."""
    m, n = map(hint, layer.shape)
    return described(call["method"], m, n, hint(layer.rank), call["power_iterations"], terms)
