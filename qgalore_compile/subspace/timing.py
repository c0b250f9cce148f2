"""How long each parameter's refreshes took: for people to read, never for a run to decide by.

Wall time is no state: two runs of the same step differ in it, and a resumed run would start from another's.  So it is
kept beside the schedules, not in them, by the identity of the schedule's tensor: ``state_dict``, ``deepcopy`` and
:func:`qgalore_compile.reports.check` do not see it.  An entry goes with its tensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_seconds = WeakTensorKeyDictionary()


@contextmanager
def timed(schedule: Tensor, device: torch.device) -> Iterator[None]:
    """Add the block's wall time to ``schedule``'s; on an accelerator, of the work that the block has started."""
    _wait(device)
    start = time.perf_counter()
    try:
        yield
    finally:
        _wait(device)
        _seconds[schedule] = seconds_of(schedule) + time.perf_counter() - start


def seconds_of(schedule: Tensor) -> float:
    """What :func:`timed` has added up for this tensor in this process."""
    return float(_seconds.get(schedule, 0.0))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # a refresh reads values on the host anyway
