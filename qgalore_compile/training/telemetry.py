"""What a training run tells while it runs: a progress bar or plain lines, JSONL metrics, a PNG of the curves."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any

import psutil
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qgalore_compile.files import replacing
from qgalore_compile.training.stopping import Output, Stop


@dataclass(frozen=True)
class Turn:
    """A projected weight's turn in a step: its refresh, the stand-in for it, or a look at the captured energy.

    Attributes:
        name: of the weight.
        refreshed: whether its subspace was computed anew; the stand-in does not count.
        gap: from now on, steps.
        similarity: of the new subspace to the old; None where no two were compared.
        energy: ‖R‖² / ‖G‖² before the refresh, if that was measured.
        seconds: that the turn took, gathering included.
    """

    name: str
    refreshed: bool
    gap: int
    similarity: float | None
    energy: float | None
    seconds: float


@dataclass(frozen=True)
class StepRecord:
    """One step; one line of `metrics.jsonl`.

    Attributes:
        step: steps done with this one, from 1.
        loss: training loss before the update, nats per byte.
        lr: learning rate of the update.
        grad_norm: the optimizer's; of projected gradients where it projects.
        tokens_per_second: of this step alone; of the first one, compilation included.
        rss: resident memory of the process, bytes.
        refreshes: of all layers so far.
        refreshed: names of the weights whose subspace this step computed anew.
        skipped_steps: steps so far that a non-finite gradient stopped.
        graphs: graphs that Dynamo has compiled for this run so far.
        compile_seconds: how long the process's first step took, compilation included; None for the others.
        val_loss: nats per byte, where the step ends with an evaluation.
        turns: of the weights whose turn it was.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    rss: int
    refreshes: int
    refreshed: tuple[str, ...]
    skipped_steps: int
    graphs: int
    compile_seconds: float | None = None
    val_loss: float | None = None
    turns: tuple[Turn, ...] = ()


def resident_bytes() -> int:
    """Resident memory of this process, bytes."""
    return int(psutil.Process().memory_info().rss)


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with None for NaN and infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, written line by line; NaN and infinity are written as null.

    A resumed run keeps the lines up to the checkpoint's step and drops what an interrupted process wrote after it; the
    file is replaced as a whole. A new run leaves an old file alone until its first line is there.

    Args:
        path: the file.
        resume_step: of the checkpoint that the run goes on from; 0 for a new run.
        tell: called with a sentence for each line that is no record, and about steps that no line tells of.
        begin: called before a new run's first line replaces an old file.

    Raises:
        OSError: the file cannot be read or written; names it.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int = 0,
        tell: Callable[[str], None] = lambda sentence: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._begin = path, begin
        self._descriptor = -1
        if resume_step:
            self._open(_kept_lines(path, resume_step, tell))

    def write(self, record: StepRecord) -> None:
        """Append a record; where that fails the file ends with the record before."""
        if self._descriptor < 0:
            self._begin()
            self._open([])
        line = (json.dumps(finite(asdict(record))) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size)
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from error

    def sync(self) -> None:
        """Make all lines last through a power failure, as a checkpoint that counts on them does."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)

    def _open(self, lines: list[bytes]) -> None:
        with replacing(self._path) as file:
            file.writelines(lines)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _kept_lines(path: Path, last: int, tell: Callable[[str], None]) -> list[bytes]:
    """The lines of steps 1 … last as they stand in the file, each step once."""
    lines: list[bytes] = []
    steps = 0
    for number, line in enumerate(_lines(path), 1):
        record = parse_metrics(line, whole=True)
        if isinstance(record, str):
            tell(f"{path}: line {number} {record}; dropped")
        elif record["step"] > last:
            continue  # done after the checkpoint, and so to be done again
        elif record["step"] <= steps:
            tell(f"{path}: line {number} is of step {record['step']}, and comes after step {steps}; dropped")
        else:
            lines.append(line)
            steps = record["step"]
    if len(lines) < last:
        tell(f"{path}: no line tells of {last - len(lines)} of the {last} steps before the checkpoint")
    return lines


def _lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with path.open("rb") as file:  # read as bytes, it ends lines at \n alone
        return file.readlines()


def parse_metrics(line: bytes, *, whole: bool = False) -> dict[str, Any] | str:
    """The record of one line of a `metrics.jsonl`, or why it is none; `whole`: all that every step has must be there,
    and not the step's number alone."""
    if not line.endswith(b"\n"):
        return "ends in the middle"
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return "is no JSON"
    if not isinstance(record, dict):
        return "is no JSON object"
    for key, kinds in _KINDS.items():
        if key not in record:
            if whole or key == "step":
                return f"has no {key!r}"
            continue
        if not isinstance(record[key], kinds) or isinstance(record[key], bool):
            return f"has {key!r}: {str(record[key])[:40]}"
    if record["step"] < 1:
        return f"is of step {record['step']}"
    if not all(isinstance(name, str) for name in record.get("refreshed", [])):
        return "has 'refreshed' that are no names"
    turns = record.get("turns", [])
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        return "has 'turns' that are none"
    return record


_NUMBER = (int, float, NoneType)
_KINDS: dict[str, Any] = {
    "step": int,
    "loss": _NUMBER,
    "lr": _NUMBER,
    "grad_norm": _NUMBER,
    "tokens_per_second": _NUMBER,
    "rss": int,
    "refreshes": int,
    "refreshed": list,
    "skipped_steps": int,
    "graphs": int,
    "val_loss": _NUMBER,
}
_TURN_KINDS: dict[str, Any] = {
    "name": str,
    "refreshed": bool,
    "gap": int,
    "similarity": _NUMBER,
    "energy": _NUMBER,
    "seconds": (int, float),
}


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(key, ...), kind) for key, kind in _TURN_KINDS.items())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line that is none, such as one that a killed process left half written, is
    left out."""
    records = map(parse_metrics, _lines(path))
    return [record for record in records if not isinstance(record, str)]


class Display:
    """A progress bar on a terminal; elsewhere a plain line every `every` steps and at every evaluation."""

    def __init__(self, console: Console | Output, title: str, steps: int, done: int, every: int) -> None:
        self._output = console if isinstance(console, Output) else Output(console, Stop())
        self._every, self._steps = every, steps
        self._bar: Progress | None = None
        self._drawn = 0.0
        if self._output.console.is_terminal:
            # drawn by this thread alone: an output that is lost is found where it can be answered
            self._bar = Progress(
                TextColumn(title),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self._output.console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task(title, total=steps, completed=done, text="first step …")
        self._val_loss: float | None = None

    @property
    def draws(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def first(self, text: str) -> None:
        """Say on the bar what the first step is at; from any thread, though not beside ``update``."""
        if self._bar is not None:
            self._bar.update(self._task, text=f"first step: {text}")
            with self._output.watched():
                self._bar.refresh()

    def update(self, record: StepRecord) -> None:
        """Show a step."""
        self._val_loss = record.val_loss if record.val_loss is not None else self._val_loss
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, text=self._text(record))
            if time.monotonic() - self._drawn > 0.1:
                with self._output.watched():
                    self._bar.refresh()
                self._drawn = time.monotonic()
        elif record.step % self._every == 0 or record.val_loss is not None or record.compile_seconds is not None:
            width = len(str(self._steps))
            self.say(f"step {record.step:{width}d}/{self._steps}  {self._text(record)}")

    def _text(self, record: StepRecord) -> str:
        parts = [f"loss {record.loss:.3f}"]
        if self._val_loss is not None:
            parts.append(f"validation {self._val_loss:.3f}")
        parts += [f"{record.tokens_per_second:,.0f} tokens/s", f"{record.rss / 2**30:.2f} GiB"]
        if record.refreshes:
            parts.append(f"{record.refreshes} refreshes")
        if record.skipped_steps:
            parts.append(f"{record.skipped_steps} steps skipped (gradient not finite)")
        return "  ".join(parts)

    def say(self, line: str) -> None:
        """Print a line (above the bar where there is one), unwrapped and as it is."""
        self._output.print(line)

    def __enter__(self) -> Display:
        if self._bar is not None:
            with self._output.watched():
                self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            with self._output.watched():
                self._bar.stop()


def plot_curves(metrics: Path, png: Path, *, title: str, bigram: float) -> None:
    """Draw a `metrics.jsonl`: losses over steps, the bigram model's as a line; below, one mark per refresh per layer.

    Args:
        metrics, png: read, and written.
        title: of the figure.
        bigram: validation loss of the bigram model, nats per byte.
    """
    records = read_metrics(metrics)
    refreshed = [(r["step"], name) for r in records for name in r.get("refreshed", ())]
    # Figure without pyplot: draws with Agg, needs no display, and leaves the process's matplotlib backend alone.
    figure = Figure(figsize=(8, 6 if refreshed else 4), layout="constrained")
    if refreshed:
        losses, refreshes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _plot_refreshes(refreshes, refreshed)
    else:
        losses = refreshes = figure.subplots()
    trained = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validated = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    losses.plot(*zip(*trained, strict=True) if trained else ([], []), lw=0.8, alpha=0.6, label="training batch")
    losses.plot(*zip(*validated, strict=True) if validated else ([], []), "o-", ms=3, label="validation")
    losses.axhline(bigram, color="black", ls="--", lw=0.8, label=f"bigram model, validation: {bigram:.3f}")
    losses.set(ylabel="loss (nats per byte)", title=title)
    losses.grid(alpha=0.3)
    losses.legend()
    refreshes.set_xlabel("step")
    with replacing(png) as file:
        figure.savefig(file, dpi=120, format="png")


def _plot_refreshes(axes: Axes, refreshed: list[tuple[int, str]]) -> None:
    """Rows are projected weights in the order of the optimizer, which is that of the first step's refreshes."""
    rows = {name: row for row, name in enumerate(dict.fromkeys(name for _, name in refreshed))}
    axes.plot([step for step, _ in refreshed], [rows[name] for _, name in refreshed], "|", ms=4, color="tab:green")
    axes.set(ylabel="projected weight", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(alpha=0.3)
