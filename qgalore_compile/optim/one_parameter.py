"""What a step does with one parameter, in plain PyTorch: both of its phases, as ``adamw.py`` tells them.

Between them stands what the optimizer knows of all parameters together: how far gradients are clipped, and what may be
written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore_compile.formats import rounding
from qgalore_compile.optim import groups, layout
from qgalore_compile.optim.rules import RuleState, Written
from qgalore_compile.rng import MOMENT_STREAM, PROJECTOR_STREAM, random_bits
from qgalore_compile.subspace.projection import Side, other_side, project, project_back, side_of
from qgalore_compile.subspace.refresh import refresh_
from qgalore_compile.weights import QuantizedWeight, write_back_


class Parameter(NamedTuple):
    """A parameter that has a gradient.

    Attributes:
        weight, gradient: of one shape.
        group: the optimizer's, or what an operator makes of ``told``.
        state: its own, changed in place.
        position: over the optimizer's groups in order; selects random numbers.
        told: what an operator is told of the group while a step is traced (``operators.py``); else "".
    """

    weight: Tensor
    gradient: Tensor
    group: Any
    state: dict[str, Tensor]
    position: int
    told: str = ""


class Projected(NamedTuple):
    """A parameter's gradient between the phases.

    Attributes:
        low: R in the gradient's dtype, or G as it came where it is not projected.  The GEMM runs in that dtype, and all
            R of a step wait for the last one's norm (6 GiB in float32 at 7B).
        norm: of ``low``, 0-d float32.
        across: the sketch of the other side, of rules that want one.
    """

    low: Tensor
    norm: Tensor
    across: Tensor | None = None


def project_(parameter: Parameter) -> Projected:
    """Phase one: R after the refresh, if one is due, which changes the projector, its schedule and moments."""
    low, across = parameter.gradient, None
    rule = parameter.group.rule
    if layout.projects(parameter.group):
        low = _project(parameter)
    if rule is not None and rule.sketches:
        side = other_side(side_of(parameter.weight.shape))
        across = project(parameter.gradient, _drawn(parameter, side), side)
    return Projected(low, torch.linalg.vector_norm(low, dtype=torch.float32), across)


def _project(parameter: Parameter) -> Tensor:
    weight, gradient, group, state, position, _ = parameter
    side = side_of(weight.shape)
    if group.rule.drawn:
        return project(gradient, _drawn(parameter, side), side)
    low = project(gradient, layout.projector(weight, group, state, gradient.dtype), side)
    refresh_(
        low, layout.parts_in(state, group.formats), state["schedule"], [gradient],
        shape=weight.shape, rank=layout.rank_of(group, weight), form=group.formats.projector,
        method=group["refresh"], power_iterations=group["power_iterations"], rule=group.numbers.rule,
        seed=group["seed"], param=position, moments=groups.moments_that_follow(group, state, group.numbers.betas),
    )  # fmt: skip
    return low


def update_(parameter: Parameter, projected: Projected, clip: Tensor | None, ok: Tensor) -> None:
    """Phase two: moments, update and weight; where ``ok`` is False every store writes what was there."""
    p, _, group, state, position, _ = parameter
    low, _, across = projected
    grad = low.to(torch.float32)
    across = None if across is None else across.to(torch.float32)
    if clip is not None:
        grad = grad * clip
        across = None if across is None else across * clip
    step = state["step"] + 1
    formats = group.formats.moments_of(group, p)
    noise = None
    if formats.rounds and group["rounding"] == "stochastic":
        # a stream beside the weight's
        shape = _drawn_as(p, low.shape)
        noise = random_bits(shape, seed=group["seed"], step=step, param=position | MOMENT_STREAM).view(grad.shape)
    moments = RuleState(group, p.shape, state, formats, noise, step, ok, low.dtype, across)
    rule = group.rule
    update = moments.adam(grad) if rule is None else _whole(rule.step(grad, moments), parameter, clip, moments)
    weight = p.dequantize(torch.float32) if isinstance(p, QuantizedWeight) else p.to(torch.float32)
    weight = weight - group["lr"] * update
    if torch.compiler.is_dynamo_compiling() or group["weight_decay"] != 0:  # a graph is of every number
        weight = weight - group["lr"] * group.numbers.weight_decay * weight
    noise = None
    if group["rounding"] == "stochastic" and (isinstance(p, QuantizedWeight) or p.dtype in rounding.DTYPES):
        noise = _draws(parameter, step)
    if isinstance(p, QuantizedWeight):
        write_back_(p, weight, noise, ok)
    else:
        p.copy_(torch.where(ok, rounding.round_to(weight, p.dtype, noise), p))
    state["step"].copy_(torch.where(ok, step, state["step"]))


def _whole(written: Written, parameter: Parameter, clip: Tensor | None, moments: RuleState) -> Tensor:
    """U: what a rule says is to be written, in the weight's shape.  The GEMM runs in the gradient's dtype again."""
    p, gradient, group, state, position, _ = parameter
    update: Tensor | None = None
    if written.low is not None:
        back = written.low
        if layout.projects(group):
            projector = layout.projector(p, group, state, gradient.dtype)
            back = project_back(back.to(gradient.dtype), projector, side_of(p.shape))
        update = group.numbers.scale * back.to(torch.float32)
    if written.scales is not None:
        gradient = gradient.to(torch.float32)
        if group.rule.whole:
            gradient = gradient if clip is None else gradient * clip
            form, noise = group.formats.momenta[layout.width_of(p)], None
            if group["rounding"] == "stochastic" and form.rounds:
                noise = random_bits(p.shape, seed=group["seed"], step=moments.step, param=position | MOMENT_STREAM)
            scaled = moments.whole(gradient, form, layout.momentum_names(form), noise) * written.scales
        else:
            scaled = gradient * (written.scales if clip is None else written.scales * clip)
        update = scaled if update is None else update + scaled
    if update is None:
        raise ValueError(f"rule {group['rule']!r} writes nothing: its step must give low, scales, or both")
    return update


def _drawn(parameter: Parameter, side: Side) -> Tensor:
    """A projector for a side, of entries ±1/√r: a sign for each bit that is drawn, others every ``update_proj_gap``
    steps, or in every step for sketches, where what is off in one should not be so in the next."""
    weight, gradient, group, state, position, _ = parameter
    m, n = weight.shape
    rank = layout.rank_of(group, weight)
    rows, columns = (rank, n) if side == "right" else (m, rank)
    turn = state["step"] if group.rule.sketches else state["step"] // group["update_proj_gap"]
    stream = PROJECTOR_STREAM if side == side_of(weight.shape) else PROJECTOR_STREAM | MOMENT_STREAM
    words = random_bits((rows, -(-columns // 16)), seed=group["seed"], step=turn, param=position | stream)
    places = torch.arange(16, dtype=torch.int32, device=weight.device)
    bits = ((words.unsqueeze(-1) >> places) & 1).view(rows, -1)[:, :columns]
    signs: Tensor = 1 - 2 * bits
    return signs.to(gradient.dtype).div(rank**0.5)


def _draws(parameter: Parameter, step: Tensor) -> Tensor:
    """16 random bits for each element of a weight."""
    p, _, group, _, position, _ = parameter
    shape = p.shape if "rank" in group else _drawn_as(p, p.shape)
    return random_bits(shape, seed=group["seed"], step=step, param=position).view(p.shape)


def _drawn_as(weight: Tensor, drawn: Sequence[int]) -> Sequence[int]:
    """In which shape bits are drawn for a tensor of a certain one, where they do not lie by a projected weight's rows:
    along the flattened tensor, as moments do, since of rows as short as a convolution's most draws would be left over;
    for a weight that is quantised by rows, and for the moments of one that is updated at full rank, by rows."""
    by_rows = isinstance(weight, QuantizedWeight) and tuple(drawn) == tuple(weight.shape)
    return drawn if by_rows else (math.prod(drawn),)
