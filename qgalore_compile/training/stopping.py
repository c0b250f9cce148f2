"""What ends a run from outside: Ctrl-C, SIGTERM, SIGHUP, and output that nobody takes any more.

A signal is answered after the step in progress, so that the run is saved.  One that the process was started to ignore
(`nohup`, a shell's background job) stays ignored.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from rich.console import Console

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
Handler = Callable[[int, FrameType | None], Any]


class Stopped(KeyboardInterrupt):
    """A signal ends the process at once, with nothing to save.

    Attributes:
        signal: its name, "SIGTERM".
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number).name


@contextmanager
def handled(handle: Handler) -> Iterator[None]:
    """Answer the signals of SIGNALS with ``handle``.  Only in the main thread, which alone gets and sets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # None: not Python's handler, and so not to be put back by it
    mine = [number for number, old in before.items() if old is not signal.SIG_IGN and old is not None]
    try:
        for number in mine:
            signal.signal(number, handle)
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])


def at_once(number: int, frame: FrameType | None) -> None:
    """Handler: end the process now, with clean-up."""
    raise Stopped(number)


def ignore_broken_pipe() -> None:
    """Make a broken pipe an OSError of who writes to it, and not a signal that ends the process: Python's default,
    which the command `qgalore` gives up for as long as it has nothing to save."""
    if hasattr(signal, "SIGPIPE") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


class Stop:
    """Whether to stop after the step in progress, and why.

    Attributes:
        reason: a signal's name, "SIGPIPE" or "output"; None for going on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    @contextmanager
    def by_signals(self, started: Callable[[], bool]) -> Iterator[None]:
        """Let a signal set ``reason``.  Before a first step is done, which may be compiling for minutes and has nothing
        to save, it raises Stopped, and so does a second Ctrl-C."""

        def handle(number: int, frame: FrameType | None) -> None:
            again = self.reason is not None and number == signal.SIGINT
            if again or not started():
                raise Stopped(number)
            if self.reason is None:
                self.reason = signal.Signals(number).name
                what = "Ctrl-C again stops" if number == signal.SIGINT else "Ctrl-C stops"
                # Not through the console: the signal may have come while it prints, and it would print its buffer twice
                tell(f"\nstopping after this step; {what} at once, without saving")

        with handled(handle):
            yield


def tell(line: str) -> None:
    """A line on standard error, if there still is one."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="replace"))


class Output:
    """A console whose other end may go away, or take no more: that is kept, and printing does nothing from then on.

    Attributes:
        stop: told of it.
        lost: whether that has happened.
    """

    def __init__(self, console: Console, stop: Stop) -> None:
        self.console, self.stop, self.lost = console, stop, False

    def print(self, *objects: Any) -> None:
        """Print, unwrapped and as it is; a character that the output's encoding lacks as a question mark."""
        if self.lost:
            return
        with self.watched():
            self.console.print(*map(self.encodable, objects), soft_wrap=True, markup=False, highlight=False)

    def encodable(self, given: Any) -> Any:
        """Text as the output's encoding can have it."""
        if not isinstance(given, str):
            return given
        encoding = self.console.encoding
        return given.encode(encoding, errors="replace").decode(encoding)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take what printing in the block raises when the output is lost."""
        try:
            yield
        except OSError as error:
            self._lose("SIGPIPE" if isinstance(error, BrokenPipeError) else "output", error.strerror or str(error))
        except SystemExit:  # rich's answer to a broken pipe
            self._lose("SIGPIPE", "Broken pipe")

    def _lose(self, reason: str, why: str) -> None:
        self.lost = True
        self.console.quiet = True
        if self.console.file is sys.stdout:
            # what is in its buffer cannot be written at the end of the process either, which would then fail
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, sys.stdout.fileno())
                os.close(null)
        tell(f"\nthe output cannot be written ({why}); stopping")
        if self.stop.reason is None:
            self.stop.reason = reason
