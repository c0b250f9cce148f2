"""What a compilation tells while it lasts: which stage it is at, how many kernels are compiled, how many seconds went.

:func:`on_progress` registers a callback.  The places that know a stage call :func:`tell`; where nobody listens that is
one look at an empty dict, and nothing of it is in a graph, a guard or a cache's key (as an option of the backend would
be).  A compilation belongs to the thread that compiles, and so do its events: other threads compile kernels, but it is
the thread that waits for them that tells.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import Any, Literal

from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)

Stage = Literal["tracing", "autograd", "passes", "code", "kernels", "guards", "done", "failed"]
CACHED: tuple[Stage, ...] = ("passes", "code", "kernels")
"""What a cache may have done before."""


@dataclass(frozen=True)
class Progress:
    """One event of a compilation.

    Attributes:
        stage: what begins, or goes on: "tracing" by Dynamo; "autograd", AOTAutograd's graph, and what Inductor makes of
            it before our passes; "passes", ours; "code", Inductor's lowering and code generation, on a GPU with
            Triton's compiler; "kernels", the C++ compiler, as far as it is still to be waited for, and loading;
            "guards", Dynamo's conditions on what the graph is valid for; then "done", or "failed" where no graph came
            of it (an error, or a function that Dynamo leaves to Python).
        done, total: of "passes": those that have run, and all; of "kernels" and "done": those that are compiled, and
            all that this compilation has had compiled (one that a cache holds is not among them).  Else 0 and None.
        seconds: since the compilation began, by the wall clock.
        name: of "passes": of the one that begins.
        function: whose compilation it is.
        compilation: its number in the process, from 0.
        skipped: nothing was done at this stage, since a cache had what it makes.
    """

    stage: Stage
    done: int
    total: int | None
    seconds: float
    name: str = ""
    function: str = ""
    compilation: int = 0
    skipped: bool = False


@dataclass
class _Watch:
    """One compilation: since when, which stages it has been at, and the kernels that were begun."""

    function: str
    number: int = field(default_factory=count().__next__)
    started: float = field(default_factory=time.perf_counter)
    begun: set[Stage] = field(default_factory=set)
    kernels: dict[Future[Any], int] = field(default_factory=dict)
    """By what ends when they are compiled, how many."""


_callbacks: OrderedDict[int, Callable[[Progress], object]] = OrderedDict()
_now = threading.local()


def on_progress(callback: Callable[[Progress], object]) -> RemovableHandle:
    """Call ``callback`` with a :class:`Progress` at each stage of every compilation by this backend in the process.

    ``with qg.on_progress(print): step(batch)``, or for good, until ``handle.remove()``.  It is called in the thread
    that compiles, in the middle of the work: it should be short and leave tensors alone.  What is compiled while it
    runs tells nothing.  A callback that raises is told of once, by a warning of the logger
    ``qgalore_compile.progress``, and is called no more: no display is worth a compilation of minutes.

    Returns:
        torch's handle: ``remove()``, or a ``with`` block.
    """
    if not callable(callback):
        raise TypeError(f"on_progress takes a function of one Progress, got {callback!r}")
    handle = RemovableHandle(_callbacks)
    _callbacks[handle.id] = callback
    return handle


def tell(stage: Stage, done: int = 0, total: int | None = None, *, name: str = "", skipped: bool = False) -> None:
    """An event of what this thread compiles; nothing where it compiles nothing of ours."""
    watch = _watch()
    if watch is None:
        return
    watch.begun.add(stage)
    if not _callbacks or getattr(_now, "telling", False):
        return
    seconds = time.perf_counter() - watch.started
    event = Progress(stage, done, total, seconds, name, watch.function, watch.number, skipped)
    _now.telling = True
    try:
        for number in list(_callbacks):
            _call(number, event)
    finally:
        _now.telling = False


def _call(number: int, event: Progress) -> None:
    callback = _callbacks.get(number)
    if callback is None:  # removed by one that was called before it, or in another thread
        return
    try:
        callback(event)
    except Exception as error:
        _callbacks.pop(number, None)
        log.warning("a callback of progress raised, and is called no more: %r: %r", callback, error)


def _watch() -> _Watch | None:
    return getattr(_now, "watch", None)


# -- the places that know a stage -------------------------------------------------------------------------------------


@contextmanager
def compiling(function: str) -> Iterator[None]:
    """Around all of a compilation; it begins with "tracing"."""
    before, _now.watch = _watch(), _Watch(function)
    try:
        tell("tracing")
        yield
        compiled = sum(_now.watch.kernels.values())
        tell("done", compiled, compiled)
    except BaseException:
        tell("failed")
        raise
    finally:
        _now.watch = before


def tell_skipped() -> None:
    """Of the stages that this compilation has not been at, where it has come to its end."""
    watch = _watch()
    for stage in CACHED:
        if watch is not None and stage not in watch.begun:
            tell(stage, skipped=True)


def counted(submit: Callable[..., Future[Any]], kernels: int = 1) -> Callable[..., Future[Any]]:
    """``submit`` of an executor, which begins to compile so many kernels of what this thread compiles."""

    @wraps(submit)
    def submitted(*args: Any, **kwargs: Any) -> Future[Any]:
        future = submit(*args, **kwargs)
        if (watch := _watch()) is not None:
            watch.kernels[future] = kernels
        return future

    return submitted


def wait_for_kernels() -> None:
    """Wait for the kernels that were begun, and tell of each that is done; nothing where nobody listens, since whoever
    needs a kernel waits for it.  One that does not compile is an error there."""
    watch = _watch()
    if watch is None or not _callbacks:
        return
    pending = {future for future in watch.kernels if not future.done()}
    total = sum(watch.kernels.values())
    done = total - sum(watch.kernels[future] for future in pending)
    if not total or not (pending or "kernels" not in watch.begun):
        return
    tell("kernels", done, total)
    for future in as_completed(pending):
        done += watch.kernels[future]
        tell("kernels", done, total)
