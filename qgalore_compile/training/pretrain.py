"""The main job: train a LLaMA on text, one compiled graph a step, and compare it with the bigram model.

`pretrain(config)` writes into `config.out`: `metrics.jsonl` (one line a step), `curves.png`, `schedule.png`
(where anything is projected), `result.json`, and `checkpoint.pt`, from which a config with `resume=True` continues.
One process has the folder at a time. Every file is replaced as a whole, and a checkpoint is written only after the
lines of the steps before it, so that whatever ends the process a resumed run goes on as if nothing had.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qgalore_compile.files import lock_folder, refuse_other_than_file, remove_left_behind, replacing
from qgalore_compile.training.checkpoint_file import load_checkpoint, save_checkpoint
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import Corpus, bigram_loss, check_lengths, load_corpus
from qgalore_compile.training.first_step import FirstStep
from qgalore_compile.training.forecast import check_forecast
from qgalore_compile.training.machine import check_device, check_memory
from qgalore_compile.training.run import Run
from qgalore_compile.training.schedule_plot import plot_schedule
from qgalore_compile.training.stopping import Output, Stop, tell
from qgalore_compile.training.telemetry import Display, MetricsLog, StepRecord, finite, plot_curves

CHECKPOINT, METRICS, RESULT = "checkpoint.pt", "metrics.jsonl", "result.json"
CURVES, SCHEDULE = "curves.png", "schedule.png"
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended: 128 + SIGINT
CANNOT_WRITE = 74  # sysexits' EX_IOERR


class SavingError(OSError):
    """A file of the run cannot be written, the disk being full, say; the message says what there is to go on from."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; `result.json` holds the same.

    Attributes:
        interrupted: something stopped it before its last step.
        steps, tokens: done in all, those before a checkpoint included.
        val_loss, bigram_loss: on the validation split, nats per byte; val_loss is NaN where nothing was evaluated yet.
        tokens_per_second: of this process, without its first step, evaluations and checkpoints; NaN without such steps.
        compile_seconds: how long this process's first step took, compilation included; NaN without steps.
        graphs: graphs that Dynamo compiled in this process for the run.
        compiling_steps: the steps (from 1) in which it did.
        refreshes, skipped_steps: of all projected weights, and because of non-finite gradients.
        stopped_by: what interrupted it: "SIGINT", "SIGTERM" or "SIGHUP"; "SIGPIPE" or "output" where nobody takes its
            output, or it cannot be written. None for a run that came to its end.
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
    stopped_by: str | None = None

    @property
    def beats_bigram(self) -> bool:
        """Whether the model predicts the validation split better than the bigram model; a NaN loss does not."""
        return self.val_loss < self.bigram_loss

    @property
    def exit_status(self) -> int:
        """0: beats the bigram model; 1: does not; 128 + the signal that stopped it (130 for Ctrl-C, 143 for SIGTERM,
        129 for SIGHUP, 141 for a broken pipe); 74: its output cannot be written."""
        if self.interrupted:
            return exit_status_of(self.stopped_by)
        return int(not self.beats_bigram)


def exit_status_of(stopped_by: str | None) -> int:
    """The exit status that tells of a `TrainResult.stopped_by`."""
    if stopped_by == "output":
        return CANNOT_WRITE
    return INTERRUPTED if stopped_by is None else 128 + signal.Signals[stopped_by]


def pretrain(
    config: TrainConfig, *, console: Console | None = None, on_step: Callable[[StepRecord], None] | None = None
) -> TrainResult:
    """Train as `config` says.

    Ctrl-C (SIGINT), SIGTERM and SIGHUP end the run after the current step, with a checkpoint, and so does output that
    nobody takes any more; a second Ctrl-C raises KeyboardInterrupt at once, and so does a signal during the first step,
    which may be compiling for minutes and has nothing to save.

    Args:
        config: the settings.
        console: where progress and the result are shown; standard output if None.
        on_step: called with the record of every step.

    Raises:
        ValueError: the corpus, the device or the memory cannot do; there is no checkpoint to resume, or it is damaged
            or does not fit; an unfinished run is in the way; another process is in the folder, which is named. No file
            has changed then.
        SavingError: a file cannot be written; the last checkpoint is as it was.
    """
    stop = Stop()
    output, out = Output(console or Console(), stop), Path(config.out)
    device = check_device(config.device)
    check_memory(config, device)
    memory = check_forecast(config, device)
    if config.resume and not out.is_dir():
        load_checkpoint(out / CHECKPOINT)  # says that there is nothing to resume
    with lock_folder(out):
        saved = _saved_state(config, out)
        corpus = _corpus(config, saved, out)
        bigram = bigram_loss(corpus.train, corpus.validation)
        run = Run(config, corpus)
        if saved is not None:
            try:
                run.load_state_dict(saved)
            except ValueError as error:
                raise ValueError(f"{out / CHECKPOINT}: {error}; choose another --out to start another run") from error
            del saved  # the tensors were copied; at 7B they are gigabytes
        remove_left_behind(out)
        _introduce(output, run, bigram, memory)
        with stop.by_signals(lambda: run.started):
            _train(run, output, out, on_step)
            result = _result(run, bigram, stop.reason)
            if result.steps:
                with _saving(out, run.step):
                    _write_result(result, config, out, bigram)
    _conclude(output, config, result)
    return result


def _train(run: Run, output: Output, out: Path, on_step: Callable[[StepRecord], None] | None) -> None:
    """Step after step to the last one, or until something asks to stop; with checkpoints on the way and at the end."""
    config, kept = run.config, run.step
    with _saving(out, kept):
        metrics = MetricsLog(out / METRICS, run.step, output.print, lambda: _remove_results(out))
    title = f"{config.preset} {config.optimizer}"
    with metrics, Display(output, title, config.steps, run.step, config.log_every) as display:
        while run.step < config.steps and output.stop.reason is None:
            with nullcontext() if run.started else FirstStep(display):
                record = run.advance()
            with _saving(out, kept):
                metrics.write(record)
            display.update(record)
            if on_step is not None:
                on_step(record)
            if run.step % config.checkpoint_every == 0:
                kept = _save(run, metrics, out, kept)
        if run.step != kept:
            _save(run, metrics, out, kept)


def _save(run: Run, metrics: MetricsLog, out: Path, kept: int) -> int:
    """Write a checkpoint, and return its step. Metrics first: no checkpoint is of a step whose line can be lost."""
    with _saving(out, kept):
        metrics.sync()
        save_checkpoint(out / CHECKPOINT, run.state_dict())
    return run.step


@contextmanager
def _saving(out: Path, kept: int) -> Iterator[None]:
    """An OSError of writing says what there is to go on from: the checkpoint of step `kept`; 0 for none."""
    try:
        yield
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        rest = "no checkpoint was written yet"
        if kept:
            rest = f"the checkpoint of step {kept} is whole: when there is room, qgalore train --resume --out {out}"
        raise SavingError(f"cannot write {named}; {rest}") from error


def _remove_results(out: Path) -> None:
    """What a finished run left, before the next one's first line takes the place of its own: no checkpoint stands
    beside another run's metrics. Later than at the start, so that a step that does not compile costs nobody a model."""
    for name in (CHECKPOINT, RESULT, CURVES, SCHEDULE):
        (out / name).unlink(missing_ok=True)


# -- what a run goes on from -----------------------------------------------------------------------------------------


def _saved_state(config: TrainConfig, out: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from, of these settings; None for a new run, for which nothing is in the way."""
    for name in (CHECKPOINT, METRICS, RESULT, CURVES, SCHEDULE):
        refuse_other_than_file(out / name)
    path = out / CHECKPOINT
    if not config.resume:
        _refuse_to_overwrite(path)
        return None
    saved = load_checkpoint(path)
    config.check_resumable(saved["config"], str(path))
    return saved


def _corpus(config: TrainConfig, saved: dict[str, Any] | None, out: Path) -> Corpus:
    """The text; where a run goes on, the one that it read before, wherever that is now."""
    try:
        corpus = load_corpus(config.data)
    except ValueError as error:
        if saved is None or config.data != saved["config"].get("data"):
            raise
        raise ValueError(
            f"{error} (that is where the run read it; if it has moved, name its place with --data)"
        ) from error
    check_lengths(corpus, config.seq)
    if saved is not None and saved["corpus"] != corpus.fingerprint:
        raise ValueError(
            f"{corpus.source} is not the text that {out / CHECKPOINT} was trained on; give that one with --data"
        )
    return corpus


def resumed_config(**options: Any) -> TrainConfig:
    """The config of the checkpoint in `out` with `options` in place of its own; None stands for an option not given.

    Raises:
        ValueError: no checkpoint there, or a value out of its range; `pretrain` says what does not fit the checkpoint.
    """
    given = {name: value for name, value in options.items() if value is not None}
    out = TrainConfig.from_preset(**given).out
    path = Path(out) / CHECKPOINT
    saved = load_checkpoint(path)["config"]
    known = {field.name for field in fields(TrainConfig)}
    settings = {k: v for k, v in {**saved, **given, "out": out, "resume": True}.items() if k in known}
    try:
        return TrainConfig(**settings)
    except TypeError as error:  # a setting that is missing, or of another type
        raise ValueError(f"{path}: its settings are none of this version ({error}); choose another --out") from error


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


# -- what people read ------------------------------------------------------------------------------------------------


def _introduce(output: Output, run: Run, bigram: float, memory: str | None) -> None:
    config, corpus = run.config, run.corpus
    parameters = sum(p.numel() for p in run.model.parameters())
    lines = [
        f"model    {config.preset}: {parameters / 1e6:,.2f} M parameters, {config.dtype}",
        f"text     {corpus.source}: {len(corpus.train) / 1e6:,.2f} MB in {corpus.train_files} files to train on, "
        f"{len(corpus.validation) / 1e6:,.2f} MB in {corpus.validation_files} to validate on",
        f"bigram   {bigram:.4f} nats per byte on the validation part",
        f"step     {config.optimizer} optimizer, {config.backend} backend, {config.tokens_per_step:,} tokens",
        *filter(None, [memory]),
        f"output   {config.out}" + (f", continued at step {run.step}" if run.step else ""),
    ]
    for line in lines:
        output.print(line)


def _result(run: Run, bigram: float, stopped_by: str | None) -> TrainResult:
    interrupted = run.step < run.config.steps
    return TrainResult(
        interrupted=interrupted,
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
        stopped_by=stopped_by if interrupted else None,
    )


def _write_result(result: TrainResult, config: TrainConfig, out: Path, bigram: float) -> None:
    with replacing(out / RESULT) as file:
        file.write((json.dumps(finite(asdict(result)), indent=2) + "\n").encode())
    title = f"{config.preset}, optimizer {config.optimizer}, backend {config.backend}"
    plot_curves(out / METRICS, out / CURVES, title=title, bigram=bigram)
    plot_schedule(out / METRICS, out / SCHEDULE, title=title)


def _shown(value: float, form: str, dash: str) -> str:
    """A dash for NaN: nothing was measured, or a loss that is no number."""
    return dash if math.isnan(value) else form.format(value)


def _conclude(output: Output, config: TrainConfig, result: TrainResult) -> None:
    dash = output.encodable("–")
    table = Table(show_header=False)
    table.add_row("validation loss", _shown(result.val_loss, "{:.4f} nats per byte", dash))
    table.add_row("bigram model's", _shown(result.bigram_loss, "{:.4f} nats per byte", dash))
    table.add_row("steps", f"{result.steps:,} of {config.steps:,}")
    table.add_row("tokens", f"{result.tokens:,}")
    table.add_row("tokens/s", _shown(result.tokens_per_second, "{:,.0f}", dash))
    compiled = ", compilation included" if result.graphs else ""
    table.add_row("first step", _shown(result.compile_seconds, "{:.1f} s" + compiled, dash))
    table.add_row("graphs", f"{result.graphs}, compiled in steps {', '.join(map(str, result.compiling_steps)) or dash}")
    if config.optimizer != "adamw":
        table.add_row("refreshes", f"{result.refreshes:,}")
    if result.skipped_steps:
        table.add_row("skipped steps", f"{result.skipped_steps:,} (a gradient was not finite)")
    output.print(table)
    if result.interrupted and not result.steps:
        words = "Stopped before the first step; nothing was changed."
    elif result.interrupted:
        words = f"Stopped and saved at step {result.steps}. To continue: qgalore train --resume --out {config.out}"
    elif result.beats_bigram:
        words = f"The model beats the bigram model by {result.bigram_loss - result.val_loss:.4f} nats per byte."
    else:
        words = "The model does NOT beat the bigram model: train longer, or with another --lr."
    output.print(words)
    if output.lost:
        tell(words)
