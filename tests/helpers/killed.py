"""A training run in a process of its own that is killed in the middle of replacing a file."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from typing import Any

from rich.console import Console

from qgalore_compile.training.llama import PRESETS
from qgalore_compile.training.pretrain import pretrain


def killed_at(place: int, name: str, config: Any) -> bool:
    """Whether a run of ``config`` came to its ``place``-th call of ``os.<name>``, where SIGKILL ends it.

    Its process is forked from a server that has imported torch and started none of its threads: a child of a process
    whose OpenMP threads run waits for them forever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qgalore_compile.training.pretrain"])
    child = context.Process(target=_run, args=(place, name, config, PRESETS))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "the run failed; its traceback is on standard error"
    return child.exitcode == -signal.SIGKILL


def _run(place: int, name: str, config: Any, presets: dict[str, Any]) -> None:
    PRESETS.update(presets)
    whole, calls = getattr(os, name), 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == place:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    setattr(os, name, counted)
    pretrain(config, console=Console(file=io.StringIO()))
