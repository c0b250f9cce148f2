"""What a run tells of its first step while that is compiled, stage, kernels and seconds, and afterwards."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from types import TracebackType
from typing import Protocol

from qgalore_compile.progress import Progress, on_progress

SECONDS_BETWEEN = 0.25
"""Between two drawings on a terminal, of which seconds are seen to pass while a stage says nothing."""


class Shown(Protocol):
    """Where it is shown."""

    @property
    def draws(self) -> bool:
        """Whether what is shown is drawn over: a terminal."""

    def first(self, text: str) -> None:
        """Draw what the first step is at."""

    def say(self, line: str) -> None:
        """Print a line."""


def text_of(event: Progress, seconds: float) -> str:
    """An event in words, ``seconds`` after its compilation began."""
    where: str = event.stage
    if event.stage == "passes":
        where += f" {event.done}/{event.total} {event.name}"
    elif event.stage == "kernels":
        where += f" {event.done}/{event.total}"
    return f"{where}  {seconds:.0f} s"


class FirstStep:
    """A ``with`` block around the first step.

    On a terminal one line is drawn over, a few times a second; elsewhere each stage that a compilation is at is a line
    when it begins.  At the end a line says how many seconds went into which stage.  A step of which nothing is compiled
    by this backend says nothing.
    """

    def __init__(self, display: Shown) -> None:
        self._display = display
        self._events: list[Progress] = []
        self._at = 0.0  # of the latest event, on the clock
        self._over = threading.Event()
        self._drawing = threading.Thread(target=self._draw, name="qgalore-first-step", daemon=True)

    def __enter__(self) -> FirstStep:
        self._began = time.perf_counter()
        self._handle = on_progress(self._told)
        if self._display.draws:
            self._drawing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        seconds = time.perf_counter() - self._began
        self._handle.remove()
        self._over.set()
        if self._display.draws:
            self._drawing.join()
        if error is None and self._events:
            self._display.say(summary(self._events, seconds))

    def _told(self, event: Progress) -> None:
        before = self._events[-1] if self._events else None
        self._events.append(event)
        self._at = time.perf_counter()
        begins = before is None or (before.compilation, before.stage) != (event.compilation, event.stage)
        if begins and not self._display.draws and not event.skipped and event.stage not in ("guards", "done", "failed"):
            count = f" of {event.total}" * (event.total is not None)
            self._display.say(f"first step: {event.stage}{count}, after {event.seconds:.1f} s")

    def _draw(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN):
            if self._events and (event := self._events[-1]).stage not in ("done", "failed"):
                self._display.first(text_of(event, event.seconds + time.perf_counter() - self._at))


def by_stage(events: list[Progress]) -> dict[str, float]:
    """Seconds that compilations have spent at each stage, in the order in which they were at it first."""
    found: dict[str, float] = {}
    for event, after in pairwise(events):
        if event.compilation == after.compilation and not event.skipped:
            found[event.stage] = found.get(event.stage, 0.0) + after.seconds - event.seconds
    return found


def summary(events: list[Progress], seconds: float) -> str:
    """One line on a first step of so many seconds, by its events."""
    spent = by_stage(events)
    kernels = sum(event.done for event in events if event.stage == "done")
    told = [f"{stage} {taken:.1f}" for stage, taken in spent.items()]
    skipped = dict.fromkeys(event.stage for event in events if event.skipped and event.stage not in spent)
    told += [f"from a cache: {', '.join(skipped)}"] * bool(skipped)
    compiled = f" ({kernels} kernels compiled)" if kernels else ""
    return f"first step: {seconds:.1f} s{compiled}: {', '.join(told)}, the rest {seconds - sum(spent.values()):.1f}"
