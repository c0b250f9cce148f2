"""What this project's compiled step makes of each gradient: R in place of it, its factors, or the gradient itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qgalore_compile.kernels.rows import BLOCK_BYTES
from qgalore_compile.optim import layout
from qgalore_compile.optim.rules.base import Rule
from qgalore_compile.planning.recording import Recording
from qgalore_compile.planning.refreshes import refresh_bytes
from qgalore_compile.planning.states import Holding, Resident
from qgalore_compile.planning.timeline import Treatment
from qgalore_compile.subspace.projection import projector_shape


def treatments_of(
    resident: Resident,
    recording: Recording,
    holdings: Mapping[str, Holding],
    tokens: int,
    layers: Mapping[str, int],
    device: str,
) -> dict[str, Treatment]:
    """A treatment for each parameter that has a gradient.

    Args:
        resident: model and optimizer.
        recording: of the forward and backward.
        holdings: of each recorded parameter, by its name there.
        tokens: of a micro-batch.
        layers: the recorded layer of each parameter.
        device: "cpu" or "cuda".
    """
    waits = resident.nonfinite == "skip_step" or resident.max_grad_norm is not None
    found = {}
    for name, value in recording.gradients.items():
        element = recording.elements[name]
        gradient = math.prod(holdings[name].parameter.shape) * element
        treatment = Treatment(gradient, waits=waits)
        rule = holdings[name].group.rule
        if rule is not None and not layout.projects(holdings[name].group):  # R is all of the gradient, float32 inside
            treatment = treatment._replace(while_updated=_inside(rule, gradient // element))
        elif rule is not None and _is_product(recording, value):
            treatment = _projected(holdings[name], tokens, element, waits)
        elif rule is None and device == "cpu" and _by_rows(recording, value, holdings[name], tokens):
            block = min(BLOCK_BYTES, gradient)
            treatment = Treatment(0, forms=False, factors=waits, by_rows=True, waits=waits, while_updated=block)
        found[name] = treatment._replace(layer=layers[name])
    return found


def _inside(rule: Rule, elements: int) -> int:
    """Bytes of what a rule computes from R beside N: of Muon three matrices of Newton and Schulz's iteration."""
    return 3 * 4 * elements if rule.name == "muon" else 0


def _is_product(recording: Recording, value: int) -> bool:
    """Whether a gradient is one product, whose factors are then there in its place."""
    return any(value in op.writes and op.name in ("aten.mm", "aten.addmm") for op in recording.ops)


def _by_rows(recording: Recording, value: int, holding: Holding, tokens: int) -> bool:
    """Whether a gradient at full rank is made by blocks of rows: an embedding's or a head's, whose factors are no
    larger (:mod:`qgalore_compile.passes.row_blocks`)."""
    shape = tuple(holding.parameter.shape)
    if len(shape) != 2:
        return False
    if _is_product(recording, value):
        return tokens * sum(shape) <= math.prod(shape)
    return any(value in op.writes and "index_put" in op.name for op in recording.ops) and tokens <= shape[0]


def _projected(holding: Holding, tokens: int, element: int, waits: bool) -> Treatment:
    group, shape = holding.group, tuple(holding.parameter.shape)
    rule, rank = group.rule, layout.rank_of(group, holding.parameter)
    low = math.prod(layout.low_shape(group, holding.parameter)) * element
    made = tokens * rank * element
    if rule.drawn:  # P has no place in memory between steps: it is drawn as floats
        made += math.prod(projector_shape(shape, rank)) * element
    if rule.sketches:
        low += max(shape) * rank * element
    factors, gradient = tokens * sum(shape) * element, math.prod(shape) * element
    reads = rule.reads_gradient and waits
    keeps_gradient = reads and factors > gradient
    refreshed = 0 if rule.drawn else refresh_bytes(group, shape, rank, tokens, element)
    return Treatment(
        low + (gradient if keeps_gradient else 0),
        forms=keeps_gradient,
        while_made=0 if keeps_gradient else made,
        factors=reads and not keeps_gradient,
        waits=waits,
        while_updated=low + _inside(rule, max(shape) * rank),
        while_refreshed=refreshed,
    )
