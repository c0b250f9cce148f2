"""What a compilation tells while it lasts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import pytest
import torch
from support import compiled, data, small, step_of

import qgalore_compile as qg
from qgalore_compile import progress
from qgalore_compile.passes import PASSES
from qgalore_compile.progress import CACHED, Progress

Events = list[Progress]


@pytest.fixture
def events() -> Iterator[Events]:
    found: Events = []
    with qg.on_progress(found.append):
        yield found


def stages(events: Events) -> list[str]:
    """Without repetitions."""
    return list(dict.fromkeys(event.stage for event in events))


# -- of a step --------------------------------------------------------------------------------------------------------


def test_a_step_tells_each_stage_each_pass_and_its_end_and_of_what_is_compiled_no_more_nothing(events: Events) -> None:
    step, _ = compiled(step_of(*small()))
    step(data())
    assert stages(events) == ["tracing", "autograd", "passes", "code", "guards", "done"]  # interpreted: no kernels
    passes = [event for event in events if event.stage == "passes"]
    assert [event.name for event in passes] == [each.name for each in PASSES]
    assert [(event.done, event.total) for event in passes] == [(index, len(PASSES)) for index in range(len(PASSES))]
    seconds = [event.seconds for event in events]
    assert seconds == sorted(seconds)
    assert {(event.function, event.skipped) for event in events} == {("step", False)}

    before = len(events)
    step(data())
    assert len(events) == before
    step(data()[:3])  # another batch: another compilation
    assert len({event.compilation for event in events}) == 2
    assert stages(events[before:]) == stages(events[:before])


def test_explain_tells_of_its_own(events: Events) -> None:
    qg.explain(step_of(*small()), data())
    assert stages(events) == ["tracing", "autograd", "passes", "code", "guards", "done"]


def test_what_cannot_be_compiled_fails_in_the_stage_that_was_told_last(events: Events) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(step)[0](data())
    assert stages(events) == ["tracing", "failed"]


def test_steps_of_other_backends_tell_nothing(events: Events) -> None:
    torch.compile(lambda x: x + 1, backend="eager")(data())
    assert events == []


def test_a_callback_that_raises_is_told_once_and_the_step_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    calls: Events = []

    def broken(event: Progress) -> None:
        calls.append(event)
        raise RuntimeError("no display")

    found: Events = []
    step, backend = compiled(step_of(*small()))
    with (
        caplog.at_level(logging.WARNING, "qgalore_compile.progress"),
        qg.on_progress(broken),
        qg.on_progress(found.append),
    ):
        step(data())
    assert backend.count == 1
    assert len(calls) == 1
    assert stages(found)[-1] == "done"
    (record,) = (each for each in caplog.records if each.name == "qgalore_compile.progress")
    assert "no display" in record.getMessage()


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_a_callback_is_called_until_its_handle_is_removed() -> None:
    found: Events = []
    handle = qg.on_progress(found.append)
    with progress.compiling("step"):
        pass
    handle.remove()
    handle.remove()  # as torch's
    with progress.compiling("step"):
        pass
    assert stages(found) == ["tracing", "done"]
    assert len(found) == 2


def test_an_event_cannot_be_changed(events: Events) -> None:
    with progress.compiling("step"):
        pass
    with pytest.raises(FrozenInstanceError):
        events[0].done = 3  # type: ignore[misc]


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="a function of one Progress, got 'print'"):
        qg.on_progress("print")  # type: ignore[arg-type]


def test_what_is_compiled_inside_a_callback_tells_nothing() -> None:
    found: Events = []

    def compiling_too(event: Progress) -> None:
        found.append(event)
        with progress.compiling("inner"):
            progress.tell("code")

    with qg.on_progress(compiling_too), progress.compiling("outer"):
        progress.tell("code")
    assert [(event.function, event.stage) for event in found] == [
        ("outer", "tracing"), ("outer", "code"), ("outer", "done"),
    ]  # fmt: skip


def test_outside_of_a_compilation_nothing_is_told(events: Events) -> None:
    progress.tell("code")
    progress.tell_skipped()
    progress.wait_for_kernels()
    assert events == []


def test_two_threads_have_a_compilation_each_and_are_told_in_their_own() -> None:
    found: list[tuple[str, str, int]] = []
    both = threading.Barrier(2)

    def compile_it(name: str) -> None:
        with progress.compiling(name):
            both.wait(10)
            progress.tell("code")
            both.wait(10)

    def note(event: Progress) -> None:
        found.append((event.function, threading.current_thread().name, event.compilation))

    threads = [threading.Thread(target=compile_it, args=(name,), name=name) for name in ("one", "other")]
    with qg.on_progress(note):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6
    assert all(function == thread for function, thread, _ in found)
    assert len(set(found)) == 2


# -- kernels, and what a cache holds ----------------------------------------------------------------------------------


def submitter() -> tuple[Callable[[], Future[None]], list[Future[None]]]:
    """In place of an executor's ``submit``: what it has begun, for a test to end."""
    begun: list[Future[None]] = []

    def submit() -> Future[None]:
        begun.append(Future())
        return begun[-1]

    return submit, begun


def test_kernels_are_counted_as_they_are_done(events: Events) -> None:
    with ThreadPoolExecutor(1) as pool, progress.compiling("step"):
        first = progress.counted(pool.submit)(int)
        first.result()
        go = threading.Event()
        progress.counted(pool.submit, 16)(go.wait, 10)
        progress.counted(pool.submit, 2)(int)
        events.clear()
        threading.Timer(0.01, go.set).start()
        progress.wait_for_kernels()
        progress.wait_for_kernels()  # nothing is left to wait for, and nothing is told twice
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("kernels", 1, 19), ("kernels", 17, 19), ("kernels", 19, 19), ("done", 19, 19),
    ]  # fmt: skip


def test_kernels_that_another_thread_begins_are_not_ours(events: Events) -> None:
    submit, _ = submitter()
    with progress.compiling("step"):
        thread = threading.Thread(target=progress.counted(submit))
        thread.start()
        thread.join()
        progress.wait_for_kernels()
    assert stages(events) == ["tracing", "done"]


def test_where_nobody_listens_nobody_waits() -> None:
    submit, begun = submitter()
    with progress.compiling("step"):
        progress.counted(submit)()
        progress.wait_for_kernels()
    assert not begun[0].done()


def test_a_kernel_that_does_not_compile_is_an_error_of_whoever_needs_it(events: Events) -> None:
    submit, _ = submitter()
    with progress.compiling("step"):
        future = progress.counted(submit)()
        future.set_exception(RuntimeError("no such intrinsic"))
        progress.wait_for_kernels()
    assert stages(events) == ["tracing", "kernels", "done"]
    with pytest.raises(RuntimeError, match="no such intrinsic"):
        future.result()


def test_what_a_cache_held_is_told_as_skipped(events: Events) -> None:
    with progress.compiling("step"):
        progress.tell("autograd")
        progress.tell_skipped()
    assert [event.stage for event in events if not event.skipped] == ["tracing", "autograd", "done"]
    assert [event.stage for event in events if event.skipped] == [*CACHED]
