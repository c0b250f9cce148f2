"""What the command `qgalore` does with signals while it is still importing, which takes seconds.

Imported first of all.  In the command's own process, and nowhere else, Ctrl-C, SIGTERM and SIGHUP then end it in a line
and with their status instead of a traceback out of the middle of torch; and output that nobody takes (`qgalore train
--help | head`) ends it as it ends other programs.  `qgalore train` sets other handlers once it runs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from types import FrameType


def is_command(arguments: list[str], original: list[str]) -> bool:
    """Whether ``sys.argv`` and ``sys.orig_argv`` are those of the command `qgalore`, or `python -m
    qgalore_compile.cli`."""
    if arguments and os.path.splitext(os.path.basename(arguments[0]))[0] == "qgalore":
        return True
    return any(pair == ("-m", "qgalore_compile.cli") for pair in itertools.pairwise(original))


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def begin() -> None:
    """Set the handlers; signals that the process was started to ignore stay ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if is_command(sys.argv, sys.orig_argv):
    begin()
