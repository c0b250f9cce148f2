"""The refresh op: one opaque op per projected parameter, which asks its schedule at run time.

A compiled step holds it between the projection and Adam.  It returns at once in a step that is not due, so one graph
serves every combination of refreshing layers (Python branches would recompile, ``torch.cond`` would defeat the
caches).  What only a refresh needs (the gradient, its SVD, the similarity, requantisation) happens inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore_compile import formats, rng
from qgalore_compile._ops import define
from qgalore_compile.gather import gathered, is_carrier
from qgalore_compile.projection import (
    captured_energy,
    full_gradient,
    leading_subspace,
    official_similarity,
    project,
    projector_shape,
    side_of,
    sketched_subspace,
    subspace_similarity,
)
from qgalore_compile.scheduler import Rule, Schedule, ticked_unless_due
from qgalore_compile.timing import timed

METHODS = ("svd", "randomized")
SIMILARITIES = ("subspace", "official")
TRIGGERS = ("similarity", "energy")


class ProjectorFormat(NamedTuple):
    """How a projector is stored: ``bits`` 4 (packed) or 8 in groups of ``group_size``, or 0 for float32."""

    bits: int
    group_size: int

    def encode(self, projector: Tensor) -> list[Tensor]:
        """The stored tensors of a float32 projector: [P], or [codes, scale, offset]."""
        if self.bits == 0:
            return [projector]
        quantize = formats.quantize_int4 if self.bits == 4 else formats.quantize_int8
        return list(quantize(projector, self.group_size)[:3])

    def decode(self, stored: Sequence[Tensor], columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The projector (…, columns), computed in float32 and returned in ``dtype``."""
        if self.bits == 0:
            return stored[0].to(dtype)
        codes, scale, offset = stored
        if self.bits == 8:
            return formats.dequantize_int8(codes, scale, offset, self.group_size, dtype=dtype)
        return formats.dequantize_int4(codes, scale, offset, columns, self.group_size, dtype=dtype)


def _refresh(
    low: Tensor,
    projector: Sequence[Tensor],
    schedule: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    shape: Sequence[int],
    rank: int,
    bits: int,
    group_size: int,
    method: str,
    official: bool,
    threshold: float,
    gamma: float,
    max_gap: int | None,
    min_gap: int,
    shrink: float | None,
    energy: float | None,
    seed: int,
    param: int,
) -> None:
    if ticked_unless_due(schedule):
        return
    with timed(schedule, low.device):
        now = Schedule.from_tensor(schedule)
        rule = Rule(official, threshold, gamma, max_gap, min_gap, shrink, energy)
        factors = _scaled([gathered(factors[0], shape)] if is_carrier(factors[0]) else factors, scales)
        if _finite(factors):
            if now.measures(rule):
                now = now.measured(rule, captured_energy(low, factors))
            if now.due:
                form = ProjectorFormat(bits, group_size)
                now = _compute_anew(low, projector, now, factors, shape, rank, form, method, rule, seed, param)
        else:
            low.fill_(torch.nan)  # still due; and the optimizer shall see it even through a projector of zeros
        schedule.copy_(now.ticked().to_tensor())


def _scaled(factors: Sequence[Tensor], scales: Sequence[Tensor] | None) -> list[Tensor]:
    """The factors with each product's scale moved into its first one, in float32: half precision might underflow."""
    scaled = list(factors)
    for index, scale in enumerate(scales or ()):
        scaled[2 * index] = scaled[2 * index].to(torch.float32) * scale
    return scaled


def _finite(factors: Sequence[Tensor]) -> bool:
    """Whether the gradient is finite, told from its factors where those are given: a product may overflow."""
    if len(factors) == 1:
        return bool(torch.isfinite(factors[0]).all())
    norms = [float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in factors]
    bound = sum(grad_output * inputs for grad_output, inputs in zip(norms[::2], norms[1::2], strict=True))
    return bound <= torch.finfo(torch.float32).max  # NaN is not


def _compute_anew(
    low: Tensor,
    projector: Sequence[Tensor],
    now: Schedule,
    factors: Sequence[Tensor],
    shape: Sequence[int],
    rank: int,
    form: ProjectorFormat,
    method: str,
    rule: Rule,
    seed: int,
    param: int,
) -> Schedule:
    """Overwrite the projector and R in place; the schedule after it."""
    side = side_of(shape)
    columns = projector_shape(shape, rank)[1]
    draws = {"seed": seed, "step": now.clock, "param": param}
    if now.stands_in:
        new = sketched_subspace(factors, rank, side, **draws)
    else:
        new = leading_subspace(factors, rank, side, method=method, **draws)
    similarity = None
    if now.refreshes:
        measure = official_similarity if rule.official else subspace_similarity
        similarity = measure(form.decode(projector, columns), new, side)
    for stored, value in zip(projector, form.encode(new), strict=True):
        stored.copy_(value)
    dtype = factors[-1].dtype  # the first one has been scaled
    gradient = factors[0] if len(factors) == 1 else full_gradient(factors).to(dtype)
    low.copy_(project(gradient, form.decode(projector, columns, dtype), side))
    return now.stood_in() if now.stands_in else now.refreshed(rule, similarity)


# No argument is keyword-only: as keywords, passing them on costs twice as much, in every layer and step.
_refresh_op = define(
    "refresh_(Tensor(a!) low, Tensor(b!)[] projector, Tensor(c!) schedule, Tensor[] factors, Tensor[]? scales, "
    "SymInt[] shape, int rank, int bits, int group_size, str method, "
    "bool official, float threshold, float gamma, int? max_gap, int min_gap, float? shrink, float? energy, "
    "int seed, int param) -> ()",
    _refresh,
    lambda *args, **kwargs: None,
    torch.Tag.cudagraph_unsafe,  # it decides on the host
)


def refresh_(
    low: Tensor,
    projector: Sequence[Tensor],
    schedule: Tensor,
    factors: Sequence[Tensor],
    *,
    shape: Sequence[int],
    rank: int,
    form: ProjectorFormat,
    method: str,
    rule: Rule,
    seed: int,
    param: int,
) -> None:
    """Compute a parameter's subspace anew if its schedule says so, and count the call.

    Args:
        low: R, float32, projected with the projector as it was; overwritten in a refresh.
        projector: its stored tensors (:class:`ProjectorFormat`); overwritten in a refresh.
        schedule: float64 (9 + queue_size,) on the CPU (:mod:`qgalore_compile.scheduler`); overwritten.
        factors: ``[G]`` or ``[dY1, X1, …]``; a compiled step may pass what :mod:`qgalore_compile.gather` collected, and
            0-d ``scales``, one a product.  Where they are not finite, the projector stays, the parameter stays due
            and R becomes NaN, which the optimizer's non-finite check sees.
        shape: (m, n) of the weight.
        rank, form, method, rule: the group's settings.
        seed, param: select the random numbers of the range finder.
    """
    _refresh_op(
        low, list(projector), schedule, list(factors), None, list(shape), rank, form.bits, form.group_size, method,
        *rule, rng.signed_seed(seed), param,
    )  # fmt: skip
