"""The main job: train a LLaMA on text, one compiled graph a step, and compare it with the bigram model.

`pretrain(config)` writes into `config.out`: `metrics.jsonl` (one line a step), `curves.png`, `schedule.png`
(where anything is projected), `result.json`, and `checkpoint.pt`, from which a config with `resume=True` continues.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qgalore_compile.data import bigram_loss, check_lengths, load_corpus
from qgalore_compile.schedule_plot import plot_schedule
from qgalore_compile.telemetry import Display, MetricsLog, StepRecord, finite, plot_curves
from qgalore_compile.train_config import TrainConfig
from qgalore_compile.training import Run

CHECKPOINT, METRICS, RESULT = "checkpoint.pt", "metrics.jsonl", "result.json"
CURVES, SCHEDULE = "curves.png", "schedule.png"
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended: 128 + SIGINT


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; `result.json` holds the same.

    Attributes:
        interrupted: Ctrl-C stopped it before its last step.
        steps, tokens: done in all, those before a checkpoint included.
        val_loss, bigram_loss: on the validation split, nats per byte; val_loss is NaN where nothing was evaluated yet.
        tokens_per_second: of this process, without its first step, evaluations and checkpoints; NaN without such steps.
        compile_seconds: how long this process's first step took, compilation included; NaN without steps.
        graphs: graphs that Dynamo compiled in this process for the run.
        compiling_steps: the steps (from 1) in which it did.
        refreshes, skipped_steps: of all projected weights, and because of non-finite gradients.
    """

    interrupted: bool
    steps: int
    tokens: int
    val_loss: float
    bigram_loss: float
    tokens_per_second: float
    compile_seconds: float
    graphs: int
    compiling_steps: tuple[int, ...]
    refreshes: int
    skipped_steps: int

    @property
    def beats_bigram(self) -> bool:
        """Whether the model predicts the validation split better than the bigram model; a NaN loss does not."""
        return self.val_loss < self.bigram_loss

    @property
    def exit_status(self) -> int:
        """0: beats the bigram model; 1: does not; 130: stopped by Ctrl-C."""
        return INTERRUPTED if self.interrupted else int(not self.beats_bigram)


def pretrain(
    config: TrainConfig, *, console: Console | None = None, on_step: Callable[[StepRecord], None] | None = None
) -> TrainResult:
    """Train as `config` says.

    Ctrl-C (SIGINT) ends the run after the current step, with a checkpoint; a second one raises KeyboardInterrupt at
    once, and so does one during the first step, which may be compiling for minutes and has nothing to save.

    Args:
        config: the settings.
        console: where progress and the result are shown; standard output if None.
        on_step: called with the record of every step.

    Raises:
        ValueError: the corpus cannot be used; there is no checkpoint to resume, or it does not fit; an unfinished run
            is in the way. Nothing is written then.
    """
    console = console or Console()
    out = Path(config.out)
    saved = load_checkpoint(out / CHECKPOINT) if config.resume else None
    if saved is None:
        _refuse_to_overwrite(out / CHECKPOINT)
    else:
        config.check_resumable(saved["config"], str(out / CHECKPOINT))
    corpus = load_corpus(config.data)
    check_lengths(corpus, config.seq)
    if saved is not None and saved["corpus"] != corpus.fingerprint:
        raise ValueError(
            f"{corpus.source} is not the text that {out / CHECKPOINT} was trained on; give that one with --data"
        )
    bigram = bigram_loss(corpus.train, corpus.validation)
    run = Run(config, corpus)
    if saved is not None:
        run.load_state_dict(saved)
        del saved  # the tensors were copied; at 7B they are gigabytes
    out.mkdir(parents=True, exist_ok=True)
    _introduce(console, run, bigram)
    with (
        MetricsLog(out / METRICS, resume_step=run.step) as metrics,
        Display(console, f"{config.preset} {config.optimizer}", config.steps, run.step, config.log_every) as display,
        _deferred_interrupt(run) as interrupted,
    ):
        while run.step < config.steps and not interrupted.is_set():
            record = run.advance()
            metrics.write(record)
            display.update(record)
            if on_step is not None:
                on_step(record)
            if run.step % config.checkpoint_every == 0:
                save_checkpoint(out / CHECKPOINT, run.state_dict())
        save_checkpoint(out / CHECKPOINT, run.state_dict())
    result = _result(run, bigram)
    (out / RESULT).write_text(json.dumps(finite(asdict(result)), indent=2) + "\n", encoding="utf-8")
    title = f"{config.preset}, optimizer {config.optimizer}, backend {config.backend}"
    plot_curves(out / METRICS, out / CURVES, title=title, bigram=bigram)
    plot_schedule(out / METRICS, out / SCHEDULE, title=title)
    _conclude(console, config, result)
    return result


# -- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` holds either the old checkpoint or the whole new one, whenever the process dies."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A `Run.state_dict` read from `path`, tensors memory-mapped on the CPU.

    Raises:
        ValueError: no file there, or no checkpoint of this program.
    """
    if not path.exists():
        raise ValueError(
            f"nothing to resume: {path} does not exist; drop --resume, or name the run's folder with --out"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is no checkpoint that can be read ({error}); delete it, or choose another --out"
        ) from error
    if (
        not isinstance(state, dict)
        or not {"step", "config", "corpus", "model", "optimizer", "scheduler"} <= state.keys()
    ):
        raise ValueError(f"{path} is no checkpoint of `qgalore train`; choose another --out")
    return state


def resumed_config(**options: Any) -> TrainConfig:
    """The config of the checkpoint in `out` with `options` in place of its own; None stands for an option not given.

    Raises:
        ValueError: no checkpoint there, or a value out of its range; `pretrain` says what does not fit the checkpoint.
    """
    given = {name: value for name, value in options.items() if value is not None}
    out = TrainConfig.from_preset(**given).out
    saved = load_checkpoint(Path(out) / CHECKPOINT)["config"]
    known = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{k: v for k, v in {**saved, **given, "out": out, "resume": True}.items() if k in known})


def _refuse_to_overwrite(path: Path) -> None:
    """A finished run is replaced by the next one with the same --out; work that can still be continued is not."""
    if not path.exists():
        return
    saved = load_checkpoint(path)
    if saved["step"] < saved["config"]["steps"]:
        raise ValueError(
            f"{path} holds an unfinished run ({saved['step']} of {saved['config']['steps']} steps); "
            "continue it with --resume, choose another --out, or delete it"
        )


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


@contextmanager
def _deferred_interrupt(run: Run) -> Iterator[threading.Event]:
    """Turn the first SIGINT into an event, so that the step in progress ends and is saved. Only in the main thread."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals reach the main thread only, and handlers can be set there only
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not run.started:
            raise KeyboardInterrupt
        interrupted.set()
        # Not through the console: the signal may have come while it prints, and it would print its buffer twice.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


# -- what people read ------------------------------------------------------------------------------------------------


def _introduce(console: Console, run: Run, bigram: float) -> None:
    config, corpus = run.config, run.corpus
    parameters = sum(p.numel() for p in run.model.parameters())
    lines = [
        f"model    {config.preset}: {parameters / 1e6:,.2f} M parameters, {config.dtype}",
        f"text     {corpus.source}: {len(corpus.train) / 1e6:,.2f} MB in {corpus.train_files} files to train on, "
        f"{len(corpus.validation) / 1e6:,.2f} MB in {corpus.validation_files} to validate on",
        f"bigram   {bigram:.4f} nats per byte on the validation part",
        f"step     {config.optimizer} optimizer, {config.backend} backend, {config.tokens_per_step:,} tokens",
        f"output   {config.out}" + (f", continued at step {run.step}" if run.step else ""),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _result(run: Run, bigram: float) -> TrainResult:
    return TrainResult(
        interrupted=run.step < run.config.steps,
        steps=run.step,
        tokens=run.step * run.config.tokens_per_step,
        val_loss=run.val_loss,
        bigram_loss=bigram,
        tokens_per_second=run.tokens_per_second,
        compile_seconds=run.compile_seconds,
        graphs=run.graphs,
        compiling_steps=tuple(run.compiling_steps),
        refreshes=run.refreshes,
        skipped_steps=run.skipped_steps,
    )


def _shown(value: float, form: str) -> str:
    """A dash for NaN: nothing was measured, or a loss that is no number."""
    return "–" if math.isnan(value) else form.format(value)


def _conclude(console: Console, config: TrainConfig, result: TrainResult) -> None:
    table = Table(show_header=False)
    table.add_row("validation loss", _shown(result.val_loss, "{:.4f} nats per byte"))
    table.add_row("bigram model's", _shown(result.bigram_loss, "{:.4f} nats per byte"))
    table.add_row("steps", f"{result.steps:,} of {config.steps:,}")
    table.add_row("tokens", f"{result.tokens:,}")
    table.add_row("tokens/s", _shown(result.tokens_per_second, "{:,.0f}"))
    compiled = ", compilation included" if result.graphs else ""
    table.add_row("first step", _shown(result.compile_seconds, "{:.1f} s" + compiled))
    table.add_row("graphs", f"{result.graphs}, compiled in steps {', '.join(map(str, result.compiling_steps)) or '–'}")
    if config.optimizer != "adamw":
        table.add_row("refreshes", f"{result.refreshes:,}")
    if result.skipped_steps:
        table.add_row("skipped steps", f"{result.skipped_steps:,} (a gradient was not finite)")
    console.print(table)
    if result.interrupted:
        words = f"Stopped and saved at step {result.steps}. To continue: qgalore train --resume --out {config.out}"
    elif result.beats_bigram:
        words = f"The model beats the bigram model by {result.bigram_loss - result.val_loss:.4f} nats per byte."
    else:
        words = "The model does NOT beat the bigram model: train longer, or with another --lr."
    console.print(words, soft_wrap=True, markup=False, highlight=False)
