"""The refresh op: one opaque op per projected parameter, which asks its schedule at run time.

A compiled step holds it between the projection and Adam.  It returns at once in a step that is not due, so one graph
serves every combination of refreshing layers (Python branches would recompile, ``torch.cond`` would defeat the
caches).  What only a refresh needs happens inside: the gradient, its subspace, the similarity, requantisation, and the
moments' change of basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore_compile import formats, rng
from qgalore_compile._ops import define
from qgalore_compile.gather import gathered, is_carrier
from qgalore_compile.moments import follow_
from qgalore_compile.projection import Side, official_similarity, projector_shape, side_of, subspace_similarity
from qgalore_compile.scheduler import Rule, Schedule
from qgalore_compile.subspace import Gradient, leading_subspace

SIMILARITIES = ("subspace", "official")


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


class _Settings(NamedTuple):
    """The op's constants: see :func:`refresh_`."""

    shape: Sequence[int]
    rank: int
    bits: int
    group_size: int
    method: str
    official: bool
    threshold: float
    gamma: float
    max_gap: int | None
    seed: int
    param: int
    power_iterations: int = 2
    on_refresh: str = "keep"
    beta1: float = 0.0
    beta2: float = 0.0


def _refresh(
    low: Tensor,
    projector: Sequence[Tensor],
    schedule: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[Tensor] | None = None,
    *,
    moments: Sequence[Tensor] = (),
    step: Tensor | None = None,
    **constants: Any,
) -> None:
    settings = _Settings(**constants)
    now = Schedule.from_tensor(schedule)
    rule = Rule(settings.official, settings.threshold, settings.gamma, settings.max_gap)
    if now.due(rule):
        factors = _scaled([gathered(factors[0], settings.shape)] if is_carrier(factors[0]) else factors, scales)
        if _finite(factors):
            updates = int(step) if step is not None else 0
            now = _compute_anew(low, projector, now, Gradient(factors), rule, settings, moments, updates)
        else:
            low.fill_(torch.nan)  # still due; and the optimizer shall see it even through a projector of zeros
    schedule.copy_(now.ticked().to_tensor())


def _refresh_with_moments(
    low: Tensor,
    projector: Sequence[Tensor],
    schedule: Tensor,
    moments: Sequence[Tensor],
    step: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[Tensor] | None = None,
    **constants: Any,
) -> None:
    _refresh(low, projector, schedule, factors, scales, moments=moments, step=step, **constants)


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
    # in float32 first: a norm in float64 takes as long as a tenth of a power step, and is needed where squares overflow
    return any(_bound(factors, dtype) <= torch.finfo(torch.float32).max for dtype in (torch.float32, torch.float64))


def _bound(factors: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Of |G|'s elements: Σ ‖dYᵢ‖ ‖Xᵢ‖; NaN or infinite where a factor is not finite."""
    norms = [float(torch.linalg.vector_norm(factor, dtype=dtype)) for factor in factors]
    return sum(grad_output * inputs for grad_output, inputs in zip(norms[::2], norms[1::2], strict=True))


def _compute_anew(
    low: Tensor,
    projector: Sequence[Tensor],
    now: Schedule,
    gradient: Gradient,
    rule: Rule,
    settings: _Settings,
    moments: Sequence[Tensor],
    updates: int,
) -> Schedule:
    """Overwrite the projector, R and the moments in place; the schedule after it."""
    side = side_of(settings.shape)
    form = ProjectorFormat(settings.bits, settings.group_size)
    columns = projector_shape(settings.shape, settings.rank)[1]
    new, failures = _found(gradient, low if now.refreshes else None, now.clock, side, settings)
    now = now.failed(failures)
    if new is None:
        return now  # still due, and R is the old projector's
    similarity, old = None, None
    if now.refreshes:
        old = form.decode(projector, columns)
        measure = official_similarity if rule.official else subspace_similarity
        similarity = measure(old, new, side)
    for stored, value in zip(projector, form.encode(new), strict=True):
        stored.copy_(value)
    if old is not None and moments:
        betas = (settings.beta1, settings.beta2)
        decoded = form.decode(projector, columns)
        follow_(moments, settings.on_refresh, old, decoded, side, updates=updates, betas=betas)
    low.copy_(gradient.project(lambda dtype: form.decode(projector, columns, dtype), side))
    return now.refreshed(rule, similarity)


def _found(
    gradient: Gradient, low: Tensor | None, clock: int, side: Side, settings: _Settings
) -> tuple[Tensor | None, int]:
    """(new projector, attempts that failed before it): by the group's method, by the SVD's other driver where there is
    one, by iteration alone; None where all of them fail."""
    attempts: list[dict[str, Any]] = [{"method": settings.method, "ordered": settings.official}]
    if settings.method == "svd" and gradient.factors[0].is_cuda:
        attempts.append({"method": "svd", "driver": "gesvd"})
    attempts.append({"method": "power", "exact": False})
    for failures, attempt in enumerate(attempts):
        try:
            new = leading_subspace(
                gradient, settings.rank, side, power_iterations=settings.power_iterations, low=low,
                seed=settings.seed, step=clock, param=settings.param, **attempt,
            )  # fmt: skip
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, but not in its __all__
            continue
        if bool(torch.isfinite(new).all()):
            return new, failures
    return None, len(attempts)


_FACTORS = "Tensor[] factors, Tensor[]? scales=None"
_CONSTANTS = (
    "SymInt[] shape, int rank, int bits, int group_size, str method, bool official, float threshold, float gamma, "
    "int? max_gap, int seed, int param, int power_iterations=2"
)
# it decides on the host: no part of a CUDA graph
_refresh_op = define(
    f"refresh_(Tensor(a!) low, Tensor(b!)[] projector, Tensor(c!) schedule, {_FACTORS}, *, {_CONSTANTS}) -> ()",
    _refresh,
    lambda *args, **kwargs: None,
    torch.Tag.cudagraph_unsafe,
)
# An overload, so that groups that keep their moments have a graph in which nothing but Adam writes them.
_refresh_with_moments_op = define(
    "refresh_.moments(Tensor(a!) low, Tensor(b!)[] projector, Tensor(c!) schedule, Tensor(d!)[] moments, Tensor step, "
    f"{_FACTORS}, *, {_CONSTANTS}, str on_refresh, float beta1, float beta2) -> ()",
    _refresh_with_moments,
    lambda *args, **kwargs: None,
    torch.Tag.cudagraph_unsafe,
)


class Moments(NamedTuple):
    """What follows a projector: :func:`~qgalore_compile.moments.stored_moments`, the 0-d count of the updates that they
    hold, ``on_refresh`` ("reset" or "rotate") and the betas."""

    stored: Sequence[Tensor]
    step: Tensor
    on_refresh: str
    betas: tuple[float, float]


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
    power_iterations: int = 2,
    moments: Moments | None = None,
) -> None:
    """Compute a parameter's subspace anew if its schedule says so, and count the call.

    Args:
        low: R, float32, of this gradient and the projector as it was; overwritten in a refresh.
        projector: its stored tensors (:class:`ProjectorFormat`); overwritten in a refresh.
        schedule: float64 on the CPU (:mod:`qgalore_compile.scheduler`); overwritten.
        factors: ``[G]`` or ``[dY1, X1, …]``; a compiled step may pass what :mod:`qgalore_compile.gather` collected, and
            0-d ``scales``, one a product.  Where they are not finite, the projector stays, the parameter stays due
            and R becomes NaN, which the optimizer's non-finite check sees.
        shape: (m, n) of the weight.
        rank, form, method, rule, power_iterations: the group's settings.
        seed, param: select the random numbers of the range finder.
        moments: overwritten in every refresh but the first, whether or not the optimizer then refuses the step for
            another parameter's sake: the projector is new, and moments belong to a projector.  None to keep them.

    A method that does not converge, or whose result is not finite, is followed by the next: the SVD's other driver (on
    CUDA), then "power" without an SVD.  Where that fails too, the projector and R stay as they are and the parameter
    stays due.  The schedule counts each failure.
    """
    constants: dict[str, Any] = dict(
        shape=list(shape),
        rank=rank,
        bits=form.bits,
        group_size=form.group_size,
        method=method,
        official=rule.official,
        threshold=rule.threshold,
        gamma=rule.gamma,
        max_gap=rule.max_gap,
        seed=rng.signed_seed(seed),
        param=param,
        power_iterations=power_iterations,
    )
    if moments is None:
        _refresh_op(low, list(projector), schedule, list(factors), **constants)
        return
    beta1, beta2 = moments.betas
    _refresh_with_moments_op(
        low, list(projector), schedule, list(moments.stored), moments.step, list(factors),
        on_refresh=moments.on_refresh, beta1=beta1, beta2=beta2, **constants,
    )  # fmt: skip
