"""Runs of two tiny blocks that `run_attacks.py` attacks: their settings, the command in a child, what they came to."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qgalore_compile import cli
from qgalore_compile.training.checkpoint_file import load_checkpoint
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.llama import PRESETS, LlamaConfig, Preset
from qgalore_compile.training.pretrain import pretrain
from qgalore_compile.training.telemetry import read_metrics

STEPS, EVERY = 60, 4

PRESETS["nano"] = Preset(LlamaConfig(32, 56, 2, 2, max_seq_len=64), 8, 0.02, 0.005, 4, steps=STEPS, batch=4, seq=16)


def config_of(folder: Path, name: str, **options: Any) -> TrainConfig:
    """A run `name` in `folder`, where its text is written if it is missing."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(b"one two three two one three three one two " * 200)
    defaults = dict(data=str(text), out=str(folder / name), backend="eager", eval_every=20, eval_tokens=256)
    return TrainConfig.from_preset("nano", **{**defaults, "checkpoint_every": EVERY, **options})


def digest(state: Any) -> str:
    """SHA-256 of every tensor, number and name in a nested state."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                sha.update(repr(key).encode())
                add(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        elif hasattr(value, "codes"):  # an INT8 weight
            for part in (value.codes, value.scale, value.offset):
                add(part)
        elif isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


def without_config(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "config"}


def start(arguments: list[str], said: Path) -> BaseProcess:
    """`qgalore train` in a child, which writes what it says into the file `said`."""
    return _forked(_train, arguments, said)


def killed_at(place: int, name: str, config: TrainConfig) -> bool:
    """Whether a run of `config` came to its `place`-th call of `os.<name>`, where SIGKILL ends it."""
    status = ended(_forked(_pretrain_up_to, place, name, config))
    assert status in (0, -signal.SIGKILL), "the run failed; its traceback is on standard error"
    return status == -signal.SIGKILL


def _forked(run: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A child that runs a function of this file.

    It is forked from a server that has imported torch and started none of its threads: a child of a process whose
    OpenMP threads run waits for them forever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qgalore_compile.cli", "qgalore_compile.training.pretrain"])
    child = context.Process(target=run, args=arguments)
    child.start()
    return child


def _train(arguments: list[str], said: Path) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(each, "w", closefd=False)) for each in (1, 2))
    sys.argv = ["qgalore", "train", *arguments]
    cli.main()


def _pretrain_up_to(place: int, name: str, config: TrainConfig) -> None:
    whole, calls = getattr(os, name), 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == place:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    setattr(os, name, counted)
    pretrain(config, console=Console(file=io.StringIO()))


def ended(child: BaseProcess) -> int:
    """Wait for a child; its exit status, negative for a signal that killed it."""
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def command(arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of `qgalore train`."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        status = ended(start(arguments, said))
        return status, said.read_text()


def arguments_of(config: TrainConfig, *, resume: bool = False) -> list[str]:
    if resume:
        return ["--resume", "--out", config.out]
    names = ("preset", "data", "out", "backend", "eval_every", "eval_tokens", "steps", "checkpoint_every")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]


_COMPARED = ("step", "loss", "lr", "grad_norm", "val_loss", "refreshed", "refreshes", "skipped_steps")


def outcome(config: TrainConfig) -> tuple[list[Any], str]:
    """What a run came to: its metrics but for times and memory, and the digest of its state."""
    records = read_metrics(Path(config.out, "metrics.jsonl"))
    state = without_config(load_checkpoint(Path(config.out, "checkpoint.pt")))
    return [[record[key] for key in _COMPARED] for record in records], digest(state)
