"""When a parameter's subspace is computed anew: a few numbers a parameter, and pure functions on them.

A parameter's schedule is one small float64 tensor on the CPU, so that it travels in ``state_dict`` and ``deepcopy`` as
it is and a compiled step can hand it to the refresh op: no registry, no handle, nothing to keep in step with a graph.

=========  ==========================================================================================================
element    meaning
=========  ==========================================================================================================
clock      calls of ``step`` in which the parameter had a gradient, those that a non-finite gradient skipped included:
           counting attempts lets the decision be made without waiting for the device
gap        calls from one refresh to the next
last       the clock at the last refresh, -1 before the first
refreshes  refreshes so far
failures   decompositions so far that did not converge or were not finite (:mod:`qgalore_compile.refresh`)
5 …        the last ``queue_size`` similarities, oldest first, NaN where there is none yet
=========  ==========================================================================================================

Two rules.  ``"official"`` is the published one: due when ``clock % gap == 0`` (or later, where that refresh failed on a
gradient that was not finite); once the queue is full and its mean reaches the threshold, each refresh multiplies the
gap by gamma; no cap, the queue is never cleared.  ``"subspace"`` counts from the last refresh, and caps the gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

FIXED = 5  # elements before the queue


class Rule(NamedTuple):
    """The constants of a parameter group.

    Attributes:
        official: Q-GaLore's published rule; else the rule of this project.
        threshold: mean similarity from which on the gap grows.
        gamma: factor by which it grows.
        max_gap: the gap never exceeds it; None for no cap.
    """

    official: bool
    threshold: float
    gamma: float
    max_gap: int | None


@dataclass(frozen=True)
class Schedule:
    """A parameter's schedule as Python numbers; the module's docstring describes the fields."""

    clock: int
    gap: int
    last: int
    refreshes: int
    queue: tuple[float, ...]
    failures: int = 0

    @classmethod
    def first(cls, gap: int, queue_size: int) -> Schedule:
        """Before the first step."""
        return cls(clock=0, gap=gap, last=-1, refreshes=0, queue=(math.nan,) * queue_size)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Schedule:
        """Read the float64 tensor (5 + queue_size,)."""
        clock, gap, last, refreshes, failures, *queue = tensor.tolist()
        return cls(int(clock), int(gap), int(last), int(refreshes), tuple(queue), int(failures))

    def to_tensor(self) -> Tensor:
        """float64 tensor (5 + queue_size,) on the CPU."""
        fixed = (self.clock, self.gap, self.last, self.refreshes, self.failures)
        return torch.tensor([*fixed, *self.queue], dtype=torch.float64, device="cpu")

    @property
    def similarities(self) -> tuple[float, ...]:
        """The similarities in the queue, oldest first."""
        return tuple(value for value in self.queue if not math.isnan(value))

    def due(self, rule: Rule) -> bool:
        """Whether the step at ``clock`` refreshes the subspace."""
        if self.last < 0:
            return True
        if rule.official:  # a multiple of the gap has come since: the published clock % gap == 0, but for failed ones
            return self.clock // self.gap > self.last // self.gap
        return self.clock - self.last >= self.gap

    def next(self, rule: Rule) -> int:
        """The clock of the next refresh."""
        if self.last < 0:
            return self.clock
        if rule.official:
            return max(self.clock, (self.last // self.gap + 1) * self.gap)
        return max(self.clock, self.last + self.gap)

    def refreshed(self, rule: Rule, similarity: float | None) -> Schedule:
        """After a refresh at ``clock``; ``similarity`` of the new subspace to the old, None at the first refresh."""
        queue, gap = self.queue, self.gap
        if similarity is not None:
            queue = (*queue[1:], similarity)
            if not any(map(math.isnan, queue)) and sum(queue) / len(queue) >= rule.threshold:
                gap = int(gap * rule.gamma)
                if rule.max_gap is not None:
                    gap = max(self.gap, min(gap, rule.max_gap))
        return replace(self, gap=gap, last=self.clock, refreshes=self.refreshes + 1, queue=queue)

    def failed(self, times: int) -> Schedule:
        """After decompositions that failed at ``clock``."""
        return replace(self, failures=self.failures + times)

    def ticked(self) -> Schedule:
        """After a call of ``step``."""
        return replace(self, clock=self.clock + 1)


@dataclass(frozen=True)
class ScheduleRecord:
    """The refresh schedule of one projected parameter; steps count from 0, ``last`` is -1 before the first refresh."""

    name: str
    shape: tuple[int, ...]
    side: str
    rank: int
    gap: int
    last: int
    next: int
    refreshes: int
    similarities: tuple[float, ...]
    failures: int
