"""What a training run tells while it runs: a progress bar or plain lines, JSONL metrics, a PNG of the curves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
    """`metrics.jsonl`: one JSON object a line, flushed line by line; NaN and infinity are written as null.

    A resumed run keeps the lines up to the checkpoint's step and drops what an interrupted process wrote after it.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if resume_step and path.exists() else []
        self._file = path.open("w", encoding="utf-8")
        for record in kept:
            self._write(record)

    def write(self, record: StepRecord) -> None:
        """Append a record."""
        self._write(asdict(record))

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(finite(record)) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that a killed process left half written is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Display:
    """A progress bar on a terminal; elsewhere a plain line every `every` steps and at every evaluation."""

    def __init__(self, console: Console, title: str, steps: int, done: int, every: int) -> None:
        self._console, self._every, self._steps = console, every, steps
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(title), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=steps, completed=done, text="first step …")
        self._val_loss: float | None = None

    def update(self, record: StepRecord) -> None:
        """Show a step."""
        self._val_loss = record.val_loss if record.val_loss is not None else self._val_loss
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, text=self._text(record))
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
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def plot_curves(metrics: Path, png: Path, *, title: str, bigram: float) -> None:
    """Draw a `metrics.jsonl`: losses over steps, the bigram model's as a line; below, one mark per refresh per layer.

    Args:
        metrics, png: read, and written.
        title: of the figure.
        bigram: validation loss of the bigram model, nats per byte.
    """
    records = read_metrics(metrics)
    refreshed = [(r["step"], name) for r in records for name in r["refreshed"]]
    # Figure without pyplot: draws with Agg, needs no display, and leaves the process's matplotlib backend alone.
    figure = Figure(figsize=(8, 6 if refreshed else 4), layout="constrained")
    if refreshed:
        losses, refreshes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _plot_refreshes(refreshes, refreshed)
    else:
        losses = refreshes = figure.subplots()
    trained = [(r["step"], r["loss"]) for r in records if r["loss"] is not None]
    validated = [(r["step"], r["val_loss"]) for r in records if r["val_loss"] is not None]
    losses.plot(*zip(*trained, strict=True) if trained else ([], []), lw=0.8, alpha=0.6, label="training batch")
    losses.plot(*zip(*validated, strict=True) if validated else ([], []), "o-", ms=3, label="validation")
    losses.axhline(bigram, color="black", ls="--", lw=0.8, label=f"bigram model, validation: {bigram:.3f}")
    losses.set(ylabel="loss (nats per byte)", title=title)
    losses.grid(alpha=0.3)
    losses.legend()
    refreshes.set_xlabel("step")
    figure.savefig(png, dpi=120)


def _plot_refreshes(axes: Axes, refreshed: list[tuple[int, str]]) -> None:
    """Rows are projected weights in the order of the optimizer, which is that of the first step's refreshes."""
    rows = {name: row for row, name in enumerate(dict.fromkeys(name for _, name in refreshed))}
    axes.plot([step for step, _ in refreshed], [rows[name] for _, name in refreshed], "|", ms=4, color="tab:green")
    axes.set(ylabel="projected weight", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(alpha=0.3)
