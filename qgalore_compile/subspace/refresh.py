"""The refresh op: one opaque op per projected parameter, which asks its schedule at run time.

A compiled step holds it between the projection and Adam.  It returns at once in a step that is not the parameter's
turn, so one graph serves every combination of refreshing layers (Python branches would recompile, ``torch.cond`` would
defeat the caches).  What only a turn needs happens inside: the gradient, the energy that the projector catches of it,
its subspace, the similarity, requantisation, and the moments' change of basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore_compile import rng
from qgalore_compile._ops import called_directly, define, numbered
from qgalore_compile.formats import Format
from qgalore_compile.subspace.finder import Gradient, captured_energy, leading_subspace, sketched_subspace
from qgalore_compile.subspace.gather import gathered, is_carrier
from qgalore_compile.subspace.moments import MomentFormats, follow_
from qgalore_compile.subspace.projection import Side, official_similarity, projector_shape, side_of, subspace_similarity
from qgalore_compile.subspace.scheduler import Rule, Schedule, ticked_unless_due
from qgalore_compile.subspace.timing import timed

SIMILARITIES = ("subspace", "official")
TRIGGERS = ("similarity", "energy")


Observer = Callable[[Tensor, Sequence[Tensor], Gradient], Sequence[Tensor]]
"""From the first of the tensors that store a projector, what is to be stored in them, and the gradient: what is."""

_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Ask ``observer`` at every new projector, before R and the moments follow it: for comparing two runs of a step."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


class _Settings(NamedTuple):
    """The rule, and the op's constants in the order of its schema: see :func:`refresh_`."""

    rule: Rule
    shape: Sequence[int]
    rank: int
    format: str
    method: str
    power_iterations: int
    seed: int
    param: int
    on_refresh: str = "keep"
    moments_format: str = "32bit"

    @property
    def form(self) -> Format:
        return Format.parse(self.format)


# Every layer calls one of these two in every step, so nothing is built before the schedule has been asked.


def _refresh(
    low: Tensor,
    projector: Sequence[Tensor],
    schedule: Tensor,
    rule: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    *constants: Any,
) -> None:
    if not ticked_unless_due(schedule):
        settings = _Settings(Rule.from_tensor(rule), *constants)
        _turn(low, projector, schedule, factors, scales, settings, (), None, None)


def _refresh_with_moments(
    low: Tensor,
    projector: Sequence[Tensor],
    schedule: Tensor,
    moments: Sequence[Tensor],
    step: Tensor,
    rule: Tensor,
    betas: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    *constants: Any,
) -> None:
    if not ticked_unless_due(schedule):
        settings = _Settings(Rule.from_tensor(rule), *constants)
        _turn(low, projector, schedule, factors, scales, settings, moments, step, betas)


def _turn(
    low: Tensor,
    projector: Sequence[Tensor],
    schedule: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    settings: _Settings,
    moments: Sequence[Tensor],
    step: Tensor | None,
    betas: Tensor | None,
) -> None:
    """A call in which it is the parameter's turn."""
    with timed(schedule, low.device):
        now = Schedule.from_tensor(schedule)
        factors = _scaled([gathered(factors[0], settings.shape)] if is_carrier(factors[0]) else factors, scales)
        gradient = Gradient(factors)
        if not _finite(factors):
            low.fill_(torch.nan)  # still due; and the optimizer shall see it even through a projector of zeros
        elif not gradient.is_zero():  # of zeros, any subspace is as good as another: still due, and R is zero as it is
            if now.measures(settings.rule):
                now = now.measured(settings.rule, captured_energy(low.to(torch.float32), gradient))
            if now.due:
                now = _compute_anew(low, projector, now, gradient, settings, moments, step, betas)
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
    settings: _Settings,
    moments: Sequence[Tensor],
    step: Tensor | None,
    betas: Tensor | None,
) -> Schedule:
    """Overwrite the projector, R and the moments in place; the schedule after it."""
    side, form = side_of(settings.shape), settings.form
    size = projector_shape(settings.shape, settings.rank)
    new, failures = _found(gradient, low, now, side, settings)
    now = now.failed(failures)
    if new is None:
        return now  # still due, and R is the old projector's
    # the first refresh may follow a stand-in: the moments are of its basis, and its similarity would tell of a sketch
    old = form.decode(projector, size) if now.has_projector else None
    if old is not None and str(form) == "float32":
        old = old.clone()  # decoded, it is the stored tensor itself, which is about to be overwritten
    similarity = None
    if old is not None and now.refreshes:
        measure = official_similarity if settings.rule.official else subspace_similarity
        similarity = measure(old, new, side)
    encoded: Sequence[Tensor] = form.encode(new)
    for observer in _observers:
        encoded = observer(projector[0], encoded, gradient)
    for stored, value in zip(projector, encoded, strict=True):
        stored.copy_(value)
    if old is not None and step is not None:
        assert betas is not None
        beta1, beta2 = betas.tolist()
        follow_(
            moments,
            settings.on_refresh,
            old,
            form.decode(projector, size),
            side,
            shape=low.shape,
            updates=int(step),
            betas=(beta1, beta2),
            formats=MomentFormats.parse(settings.moments_format),
        )
    low.copy_(gradient.project(lambda dtype: form.decode(projector, size, dtype), side))
    return now.stood_in() if now.stands_in else now.refreshed(settings.rule, similarity)


def _found(
    gradient: Gradient, low: Tensor, now: Schedule, side: Side, settings: _Settings
) -> tuple[Tensor | None, int]:
    """(new projector, attempts that failed before it): by the group's method, by the SVD's other driver where there is
    one, by iteration alone; None where all of them fail.  A stand-in is a sketch, or by iteration alone."""
    draws: dict[str, Any] = {"seed": settings.seed, "step": now.clock, "param": settings.param}
    compute = partial(
        leading_subspace, gradient, settings.rank, side, power_iterations=settings.power_iterations,
        low=low.to(torch.float32) if now.refreshes else None, **draws,
    )  # fmt: skip
    attempts: list[Callable[[], Tensor]] = []
    if now.stands_in:
        attempts.append(partial(sketched_subspace, gradient, settings.rank, side, **draws))
    else:
        attempts.append(partial(compute, method=settings.method, ordered=settings.rule.official))
        if settings.method == "svd" and gradient.factors[0].is_cuda:
            attempts.append(partial(compute, method="svd", driver="gesvd"))
    attempts.append(partial(compute, method="power", exact=False))
    for failures, attempt in enumerate(attempts):
        try:
            new = attempt()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, but not in its __all__
            continue
        if bool(torch.isfinite(new).all()):
            return new, failures
    return None, len(attempts)


# No argument is keyword-only, and none has a default: as keywords, passing them on costs twice as much.
_GRADIENT = "Tensor[] factors, Tensor[]? scales"
_CONSTANTS = "SymInt[] shape, int rank, str format, str method, int power_iterations, int seed, int param"
# it decides on the host: no part of a CUDA graph
_refresh_op = define(
    f"refresh_(Tensor(a!) low, Tensor(b!)[] projector, Tensor(c!) schedule, Tensor rule, {_GRADIENT}, {_CONSTANTS}) "
    "-> ()",
    _refresh,
    lambda *args, **kwargs: None,
    torch.Tag.cudagraph_unsafe,
)
# An overload, so that groups that keep their moments have a graph in which nothing but Adam writes them.
_refresh_with_moments_op = define(
    "refresh_.moments(Tensor(a!) low, Tensor(b!)[] projector, Tensor(c!) schedule, Tensor(d!)[] moments, Tensor step, "
    f"Tensor rule, Tensor betas, {_GRADIENT}, {_CONSTANTS}, str on_refresh, str moments_format) -> ()",
    _refresh_with_moments,
    lambda *args, **kwargs: None,
    torch.Tag.cudagraph_unsafe,
)
called_directly(_refresh_op, _refresh)
called_directly(_refresh_with_moments_op, _refresh_with_moments)
numbered(_refresh_op, "param", _refresh, lambda *args: None)
numbered(_refresh_with_moments_op, "param", _refresh_with_moments, lambda *args: None)
REFRESHES = (_refresh_op, _refresh_with_moments_op)
"""Both overloads, as a graph names them."""


class Moments(NamedTuple):
    """What follows a projector: the moments' tensors, the 0-d count of the updates that they
    hold, ``on_refresh`` ("reset" or "rotate"), the betas, float64 (2,) on the CPU, and the group key ``moments``."""

    stored: Sequence[Tensor]
    step: Tensor
    on_refresh: str
    betas: Tensor
    text: str = "8bit"


def refresh_(
    low: Tensor,
    projector: Sequence[Tensor],
    schedule: Tensor,
    factors: Sequence[Tensor],
    *,
    shape: Sequence[int],
    rank: int,
    form: Format,
    method: str,
    rule: Rule | Tensor,
    seed: int,
    param: int,
    power_iterations: int = 1,
    moments: Moments | None = None,
) -> None:
    """Compute a parameter's subspace anew if its schedule says so, and count the call.

    Args:
        low: R, in the gradient's dtype, of this gradient and the projector as it was; overwritten in a refresh.
        projector: its stored tensors (``Format.encode``); overwritten in a refresh.
        schedule: float64 (10 + queue_size,) on the CPU (:mod:`qgalore_compile.subspace.scheduler`); overwritten.
        factors: ``[G]`` or ``[dY1, X1, …]``; a compiled step may pass what ``gather.py`` collected, and
            0-d ``scales``, one a product.  Where they are not finite, the projector stays, the parameter stays due
            and R becomes NaN, which the optimizer's non-finite check sees.  Where the gradient is exactly zero, nothing
            is refreshed or measured and the parameter stays due: no arbitrary subspace shall last for a gap.
        shape: (m, n) of the weight.
        rank, form, method, rule, power_iterations: the group's settings; the rule as it is or as its tensor, which a
            graph does not take for a constant.
        seed, param: select the random numbers of the range finder, of sketches and of completions.
        moments: overwritten in every refresh that replaces a projector, be it a stand-in, whether or not the optimizer
            then refuses the step for another parameter's sake: the projector is new, and moments belong to a projector.
            None to keep them.

    A method that does not converge, or whose result is not finite, is followed by the next: the SVD's other driver (on
    CUDA), then "power" without an SVD.  Where that fails too, the projector and R stay as they are and the parameter
    stays due.  The schedule counts each failure.
    """
    constants = (list(shape), rank, form.text, method, power_iterations, rng.signed_seed(seed), param)
    if isinstance(rule, Rule):
        rule = rule.to_tensor()
    if moments is None:
        _refresh_op(low, list(projector), schedule, rule, list(factors), None, *constants)
        return
    _refresh_with_moments_op(
        low, list(projector), schedule, list(moments.stored), moments.step, rule, moments.betas, list(factors), None,
        *constants, moments.on_refresh, moments.text,
    )  # fmt: skip
