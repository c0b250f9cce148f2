"""When a parameter's subspace is computed anew: a few numbers a parameter, and pure functions on them.

A parameter's schedule is one small float64 tensor on the CPU, so that it travels in ``state_dict`` and ``deepcopy`` as
it is and a compiled step can hand it to the refresh op: no registry, no handle, nothing to keep in step with a graph.

=========  ==========================================================================================================
element    meaning
=========  ==========================================================================================================
clock      calls of ``step`` in which the parameter had a gradient, those that a non-finite gradient skipped included:
           counting attempts lets the decision be made without waiting for the device
next       the clock of the next *turn*, at which the op looks at the gradient: to refresh, to check, to stand in
gap        calls from one refresh to the next; where refreshes are staggered, rounded down to a multiple of min_gap
last       the clock at the last refresh, -1 before the first
refreshes  refreshes so far, the stand-in not among them
slot       its layer's place in a round of min_gap calls, -1 where refreshes are not staggered
checks     energies that were compared with the reference so far
failures   decompositions so far that did not converge or were not finite (:mod:`qgalore_compile.subspace.refresh`)
energy     ‖R‖² / ‖G‖² as measured last, NaN before; the rounding of an INT4 projector can lift it above 1
reference  the same as measured at the call after the last refresh, NaN until then
10 …       the last ``queue_size`` similarities, oldest first, NaN where there is none yet
=========  ==========================================================================================================

A turn that a non-finite gradient spoilt, or decompositions that all failed, is made up for at the next call; so is one
whose gradient is exactly zero, which tells of no subspace.

Two rules.  ``"official"`` is the published one: due when ``clock % gap == 0``; once the queue is full and its mean
reaches the threshold, each refresh multiplies the gap by gamma; no cap, the queue is never cleared.  ``"subspace"``
counts from the last refresh and

caps       the gap, one that stands too: where ``max_gap`` has been set lower, from the next refresh on.  A lower
           ``update_proj_gap`` alone is a new floor, and shortens no gap that stands: by now gaps are what similarities
           have made of the first one, and how often they grew is not kept.
shrinks    it by gamma, not below min_gap, when the *newest* similarity is below ``shrink``.  Not the mean: that would
           hold up the answer by several of the longest gaps, while a false alarm costs a few refreshes.  What the
           queue held was true of the subspace before it moved, so it goes, and growth has to be earned again.
staggers   refreshes over layers.  The projected parameters of an optimizer's i-th layer have the slot i mod min_gap
           (:func:`qgalore_compile.optim.groups.layer_of` says what a layer is), and
           their turns come at clocks ≡ slot (mod min_gap) alone: the first at the slot, the others whole multiples of
           min_gap later.  Two parameters of different slots never meet, so of N layers whose clocks agree at most
           ceil(N / min_gap) refresh in one step, without a word between them, and where N is below min_gap most steps
           refresh nothing.  By parameters instead of layers, 210 of them and a gap of 200, nearly every step had one
           to refresh.  A parameter that had no gradient in some
           steps is behind by as many: its turns meet other slots' from then on, one in each of its rounds.  So do,
           for once, turns that are made up for.  Until its slot comes, a projector from a sketch of the
           first gradient stands in (:func:`~qgalore_compile.subspace.finder.sketched_subspace`): no step has N
           decompositions, the first neither.  What the stand-in and the first refresh have in common is not counted as
           a similarity, for it tells about the sketch.
energy     is, where a threshold is given, what decides at a turn, once in min_gap calls: refresh when the projector
           catches less than this part of the reference, or when max_gap calls have passed.  The reference is the next
           gradient's, not the refreshed one's own, which a projector fits better than any other.  The gap stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


class Rule(NamedTuple):
    """The constants of a parameter group.

    Attributes:
        official: Q-GaLore's published rule; else the rule of this project.
        threshold: mean similarity from which on the gap grows.
        gamma: factor by which it grows and shrinks.
        max_gap: the gap never exceeds it; None for no cap.
        min_gap: ``update_proj_gap``, the first gap; it does not shrink below, and staggered turns are multiples apart.
        shrink: similarity below which it shrinks; None for never.
        energy: fraction of the reference below which a check refreshes; None where similarities decide.
    """

    official: bool
    threshold: float
    gamma: float
    max_gap: int | None
    min_gap: int = 1
    shrink: float | None = None
    energy: float | None = None

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Rule:
        """Of the float64 tensor (fields,), the attributes in order, NaN for None."""
        numbers = zip(_KINDS, tensor.tolist(), strict=True)
        return cls._make(None if math.isnan(number) else kind(number) for kind, number in numbers)

    def to_tensor(self) -> Tensor:
        """float64 (fields,) on the CPU: a refresh op reads it, so that a number that is set compiles nothing anew."""
        numbers = [math.nan if number is None else float(number) for number in self]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")


_KINDS = tuple((get_args(hint) or (hint,))[0] for hint in get_type_hints(Rule).values())
"""The type of each field of ``Rule``, that of ``int | None`` being int."""


@dataclass(frozen=True)
class Schedule:
    """A parameter's schedule as Python numbers; the module's docstring describes the fields.

    Its tensor holds them in this order: counts, each annotated with the least that it can be, where it begins;
    energies; the queue.
    """

    clock: Annotated[int, 0]
    next: Annotated[int, 0]
    gap: Annotated[int, 1]
    last: Annotated[int, -1]
    refreshes: Annotated[int, 0]
    slot: Annotated[int, -1]
    checks: Annotated[int, 0]
    failures: Annotated[int, 0]
    energy: float
    reference: float
    queue: tuple[float, ...]

    @classmethod
    def first(cls, gap: int, queue_size: int, slot: int = -1) -> Schedule:
        """Before the first step."""
        numbers: dict[str, Any] = {**LEAST, "gap": gap, "slot": slot, **dict.fromkeys(ENERGIES, math.nan)}
        return cls(**numbers, queue=(math.nan,) * queue_size)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Schedule:
        """Read the float64 tensor (FIXED + queue_size,)."""
        numbers: list[float] = tensor.tolist()
        counts: dict[str, Any] = dict(zip(LEAST, map(int, numbers), strict=False))
        energies: dict[str, Any] = dict(zip(ENERGIES, numbers[EXACT:], strict=False))
        return cls(**counts, **energies, queue=tuple(numbers[FIXED:]))

    def to_tensor(self) -> Tensor:
        """float64 tensor (FIXED + queue_size,) on the CPU."""
        numbers = [getattr(self, name) for name in (*LEAST, *ENERGIES)]
        return torch.tensor([*numbers, *self.queue], dtype=torch.float64, device="cpu")

    @property
    def similarities(self) -> tuple[float, ...]:
        """The similarities in the queue, oldest first."""
        return tuple(value for value in self.queue if not math.isnan(value))

    @property
    def due(self) -> bool:
        """Whether it is the parameter's turn."""
        return self.clock >= self.next

    @property
    def stands_in(self) -> bool:
        """Whether this turn asks for the stand-in only, since the slot is still to come."""
        return self.refreshes == 0 and self.clock < self.slot

    @property
    def has_projector(self) -> bool:
        """Whether a refresh or a stand-in has put a projector in the place of the first zeros."""
        return self.refreshes > 0 or 0 < self.slot == self.next

    def stood_in(self) -> Schedule:
        """After the stand-in."""
        return replace(self, next=self.slot)

    def refreshed(self, rule: Rule, similarity: float | None) -> Schedule:
        """After a refresh at ``clock``; ``similarity`` of the new subspace to the old, None at the first refresh."""
        most = math.inf if rule.max_gap is None else rule.max_gap
        queue, gap = self.queue, int(min(max(self.gap, rule.min_gap), most))  # which may have been set anew since
        if similarity is not None:
            queue = (*queue[1:], similarity)
            if rule.shrink is not None and similarity < rule.shrink:
                queue = (math.nan,) * (len(queue) - 1) + (similarity,)
                gap = max(rule.min_gap, int(gap / rule.gamma))
            elif rule.energy is None and sum(queue) / len(queue) >= rule.threshold:  # NaN, where not full, is not
                gap = int(min(int(gap * rule.gamma), most))
        now = replace(self, gap=gap, last=self.clock, refreshes=self.refreshes + 1, queue=queue, reference=math.nan)
        return replace(now, next=now._next_refresh(rule))

    def _next_refresh(self, rule: Rule) -> int:
        if rule.official:
            return (self.clock // self.gap + 1) * self.gap
        if rule.energy is not None:
            return self.clock + 1  # to measure the reference
        return self._turn(self.clock, self.gap, rule)

    def _turn(self, start: int, gap: int, rule: Rule) -> int:
        """The clock of the turn that follows one at ``start``, or at the slot before it, after ``gap`` calls."""
        if self.slot < 0:
            return max(start + gap, self.clock + 1)
        return start - (start - self.slot) % rule.min_gap + max(gap // rule.min_gap, 1) * rule.min_gap

    def measures(self, rule: Rule) -> bool:
        """Whether this turn asks for the captured energy first."""
        return rule.energy is not None and self.refreshes > 0

    def measured(self, rule: Rule, energy: float) -> Schedule:
        """After measuring the captured energy; still due if it asks for a refresh."""
        assert rule.energy is not None
        # the reference's turn comes beside the others, which count from the refresh
        start = self.last if self.slot < 0 and self.clock == self.last + 1 else self.clock
        if math.isnan(self.reference):
            now = replace(self, energy=energy, reference=energy)
        else:
            now = replace(self, energy=energy, checks=self.checks + 1)
            if energy < rule.energy * self.reference:
                return now
            if rule.max_gap is not None and self.clock - self.last >= rule.max_gap:
                return now
        return replace(now, next=self._turn(start, rule.min_gap, rule))

    def failed(self, times: int) -> Schedule:
        """After decompositions that failed at ``clock``."""
        return replace(self, failures=self.failures + times)

    def ticked(self) -> Schedule:
        """After a call of ``step``."""
        return replace(self, clock=self.clock + 1)


LEAST: dict[str, int] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Schedule, include_extras=True).items()
    if get_origin(hint) is Annotated
}
"""The counts, by name in the order of the tensor, and what each is at least."""
ENERGIES = tuple(name for name, hint in get_type_hints(Schedule).items() if hint is float)
EXACT = len(LEAST)
"""Elements before ``energy``: integers, which two runs of the same step have in common, whatever rounds them."""
FIXED = EXACT + len(ENERGIES)
"""Elements before the queue."""
_CLOCK, _NEXT = (list(LEAST).index(name) for name in ("clock", "next"))


def is_due(schedule: Tensor) -> bool:
    """``Schedule.from_tensor(schedule).due``, at a fifth of its time."""
    numbers = schedule.numpy()
    return bool(numbers[_CLOCK] >= numbers[_NEXT])


def ticked_unless_due(schedule: Tensor) -> bool:
    """Count the call in ``schedule`` if it is nobody's turn; False, and nothing counted, if it is.

    Every layer comes here in every step.  Through NumPy, which writes one element in place: 3 µs, where PyTorch's
    indexing takes 7 and reading and writing all of it took 21.
    """
    numbers = schedule.numpy()
    if numbers[_CLOCK] >= numbers[_NEXT]:
        return False
    numbers[_CLOCK] += 1
    return True


@dataclass(frozen=True)
class ScheduleRecord:
    """The refresh schedule of one projected parameter.

    Attributes:
        name, shape, side, rank: of the parameter and its projector.
        gap: calls from one refresh to the next, as the similarities have it; staggered refreshes round it down to a
            multiple of update_proj_gap, and with trigger "energy" it is update_proj_gap.
        last, next: steps (from 0) of the last refresh, -1 before the first, and of the next turn: a refresh, or with
            trigger "energy" a look at the gradient.  They count the steps in which the parameter had a gradient.
        refreshes: so far, the stand-in not among them.
        similarities: the last ``queue_size`` ones, oldest first; since the last fall, where one fell low.
        slot: its layer's place in a round of update_proj_gap steps; None where refreshes are not staggered.
        checks: captured energies that were compared with the reference so far.
        failures: decompositions so far that did not converge or were not finite.
        energy, reference: ‖R‖² / ‖G‖² as measured last, and as measured after the last refresh; None where trigger
            "energy" has not measured it yet.
        seconds: spent in the turns of this parameter by this process; no part of the state, nor of comparisons.
    """

    name: str
    shape: tuple[int, ...]
    side: str
    rank: int
    gap: int
    last: int
    next: int
    refreshes: int
    similarities: tuple[float, ...]
    slot: int | None
    checks: int
    failures: int
    energy: float | None
    reference: float | None
    seconds: float = field(repr=False, compare=False)


def record_of(now: Schedule, name: str, shape: tuple[int, ...], side: str, rank: int, seconds: float) -> ScheduleRecord:
    """What there is to tell of a schedule."""
    same: dict[str, Any] = {each.name: getattr(now, each.name) for each in fields(now) if each.name in _RECORDED}
    measured = {each: None if math.isnan(value := getattr(now, each)) else value for each in ENERGIES}
    own: dict[str, Any] = {
        "next": max(now.clock, now.next),
        "slot": now.slot if now.slot >= 0 else None,
        "similarities": now.similarities,
        **measured,
    }
    return ScheduleRecord(**{**same, **own}, name=name, shape=shape, side=side, rank=rank, seconds=seconds)


_RECORDED = {each.name for each in fields(ScheduleRecord)}
