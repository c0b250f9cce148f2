"""What a run tells of its first step while it is compiled, and afterwards."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from qgalore_compile import progress
from qgalore_compile.progress import Progress, Stage
from qgalore_compile.training import first_step
from qgalore_compile.training.first_step import FirstStep, by_stage, summary, text_of
from qgalore_compile.training.telemetry import Display


class Lines:
    """A display that keeps what it is told."""

    def __init__(self, *, draws: bool) -> None:
        self.draws = draws
        self.lines: list[str] = []
        self.drawn: list[str] = []
        self.seen = threading.Event()

    def first(self, text: str) -> None:
        self.drawn.append(text)
        self.seen.set()

    def say(self, line: str) -> None:
        self.lines.append(line)


def compile_something() -> None:
    with progress.compiling("step"):
        progress.tell("autograd")
        progress.tell("passes", 0, 2, name="update")
        progress.tell("passes", 1, 2, name="order")
        progress.tell("code")
        progress.tell("kernels", 3, 40)
        progress.tell("kernels", 40, 40)


def event(stage: Stage, seconds: float, done: int = 0, *, skipped: bool = False, compilation: int = 0) -> Progress:
    return Progress(stage, done, None, seconds, "", "step", compilation, skipped)


def test_without_a_terminal_each_stage_is_a_line_and_the_end_one_more() -> None:
    lines = Lines(draws=False)
    with FirstStep(lines):
        compile_something()
    assert [line.split(",")[0] for line in lines.lines[:-1]] == [
        "first step: tracing",
        "first step: autograd",
        "first step: passes of 2",
        "first step: code",
        "first step: kernels of 40",
    ]
    assert lines.lines[-1].startswith("first step: 0.0 s: tracing 0.0, autograd 0.0, passes 0.0, code 0.0, kernels 0.0")
    assert lines.drawn == []


def test_on_a_terminal_it_is_drawn_while_a_stage_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_step, "SECONDS_BETWEEN", 0.001)
    lines = Lines(draws=True)
    with FirstStep(lines), progress.compiling("step"):
        progress.tell("kernels", 3, 40)
        lines.seen.clear()
        assert lines.seen.wait(10)
        drawn = lines.drawn[-1]
    assert drawn == "kernels 3/40  0 s"
    assert len(lines.lines) == 1  # the summary


def test_it_is_the_text_on_the_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with Display(console, "tiny", steps=9, done=0, every=1) as display:
        assert display.draws
        display.first("kernels 3/40  7 s")
    assert "first step: kernels 3/40  7 s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_where_nothing_is_compiled_nothing_is_said() -> None:
    lines = Lines(draws=False)
    with FirstStep(lines):
        pass
    assert lines.lines == []


def test_of_a_step_that_fails_there_is_no_summary_and_nobody_listens_any_more() -> None:
    lines = Lines(draws=False)
    with pytest.raises(RuntimeError), FirstStep(lines), progress.compiling("step"):
        raise RuntimeError
    compile_something()
    assert len(lines.lines) == 1
    assert lines.lines[0].startswith("first step: tracing")


def test_seconds_of_a_stage_are_those_until_the_next_in_each_compilation() -> None:
    events = [
        event("tracing", 0.0), event("autograd", 1.5), event("passes", 2.0), event("done", 4.0),
        event("tracing", 0.0, compilation=1), event("autograd", 1.0, compilation=1), event("done", 9.0, compilation=1),
    ]  # fmt: skip
    assert by_stage(events) == {"tracing": 2.5, "autograd": 8.5, "passes": 2.0}


def test_the_summary_tells_what_a_cache_held_and_what_is_left() -> None:
    cold = [event("tracing", 0.0), event("kernels", 2.0), event("done", 6.0, done=40)]
    assert summary(cold, 6.5) == "first step: 6.5 s (40 kernels compiled): tracing 2.0, kernels 4.0, the rest 0.5"
    skipped = [event(stage, 3.0, skipped=True) for stage in ("passes", "code", "kernels")]
    warm = [event("tracing", 0.0), event("autograd", 2.0), *skipped, event("done", 3.0)]
    assert summary(warm, 3.5) == (
        "first step: 3.5 s: tracing 2.0, autograd 1.0, from a cache: passes, code, kernels, the rest 0.5"
    )


def test_events_in_words() -> None:
    assert text_of(Progress("passes", 3, 16, 0.0, "fuse"), 7.6) == "passes 3/16 fuse  8 s"
    assert text_of(Progress("tracing", 0, None, 0.0), 0.2) == "tracing  0 s"
