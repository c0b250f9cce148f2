"""A run of two blocks on a few kilobytes of text, for the tests of `qgalore train`."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.llama import PRESETS, LlamaConfig, Preset
from qgalore_compile.training.pretrain import TrainResult, pretrain
from qgalore_compile.training.telemetry import StepRecord

NANO = Preset(LlamaConfig(32, 56, 2, 2, max_seq_len=64), 8, 0.02, 0.005, 4, steps=12, batch=4, seq=16)


def nano_config(folder: Path, **options: Any) -> TrainConfig:
    """A run of 12 steps in ``folder``, its text beside it; PRESETS must have NANO."""
    assert PRESETS["nano"] is NANO
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(b"one two three two one three three one two " * 200)
    defaults = dict(data=str(text), out=str(folder / "run"), backend="eager", eval_every=5, eval_tokens=256)
    return TrainConfig.from_preset("nano", **{**defaults, **options})


def train(config: TrainConfig, **arguments: Any) -> tuple[TrainResult, str]:
    """The result, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    result = pretrain(config, console=console, **arguments)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def send_at(step: int, number: int = signal.SIGINT) -> Callable[[StepRecord], None]:
    """For ``on_step``: a signal to this process once the step is done."""

    def on_step(record: StepRecord) -> None:
        if record.step == step:
            os.kill(os.getpid(), number)

    return on_step
