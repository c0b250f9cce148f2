"""Tables and figures of the study of quality, from its results alone: `quality.py --report` writes them.

summary.md, summary.csv   a row a case at its own best rate: loss (mean and range over seeds), refreshes, memory, speed
runs.csv                  a row a run
curves-SCALE.png          held-out loss over steps: the mean of the seeds, and their range as a band
rates-SCALE.png           what the search has seen: final loss over learning rate
variants-SCALE.png        loss of ours with one thing changed, less ours' with the same seed

A figure needs two points, a row one run; what has not been run yet is left out.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write_whole
from matplotlib.figure import Figure
from quality_plan import METHODS, OURS, SEARCHED, VARIANTS, Case, Plan, Result, RunSpec, Scale, loss_of

MIB = 2**20
METHODS_HEAD = (
    "method",
    "lr",
    "seeds",
    "loss, nats per byte",
    "refreshes a weight",
    "of fixed gap's",
    "time in refreshes",
    "tokens/s",
    "weights + state, MiB",
    "peak memory, MiB",
    "graphs",
)
VARIANTS_HEAD = (
    "ours, but",
    "seeds",
    "loss",
    "less ours'",
    "refreshes a weight",
    "time in refreshes",
    "weights + state, MiB",
)


@dataclass(frozen=True)
class Row:
    """A case at one scale and at its own best rate: the results of its seeds, in their order."""

    scale: Scale
    case: Case
    lr: float
    results: list[Result]
    ours: list[Result]

    @property
    def losses(self) -> list[float]:
        return [loss_of(result) for result in self.results]

    @property
    def differences(self) -> list[float]:
        """Loss less ours', for the seeds that both have: the same weights to begin with and the same batches."""
        reference = {result["seed"]: loss_of(result) for result in self.ours}
        return [loss_of(r) - reference[r["seed"]] for r in self.results if r["seed"] in reference]

    def mean(self, key: str) -> float:
        return statistics.fmean(result[key] for result in self.results)

    @property
    def fixed_refreshes(self) -> int:
        """Refreshes of a weight in a run with a gap that never changes."""
        return math.ceil(self.scale.steps / self.scale.gap)

    @property
    def live_mib(self) -> float:
        return sum(self.results[0]["live_bytes"].values()) / MIB

    @property
    def peak_mib(self) -> float:
        """Most resident memory above what the process had before there was a model, compiling left out if possible."""
        return max((r["peak_rss_steps"] or r["peak_rss"]) - r["rss_before"] for r in self.results) / MIB

    def record(self) -> dict[str, Any]:
        """The row of summary.csv."""
        losses, differences = self.losses, self.differences
        live = self.results[0]["live_bytes"]
        return {
            "scale": self.scale.name,
            "case": self.case.name,
            "title": self.case.title,
            "lr": self.lr,
            "seeds": len(losses),
            "loss_mean": statistics.fmean(losses),
            "loss_min": min(losses),
            "loss_max": max(losses),
            "difference_mean": statistics.fmean(differences) if differences else None,
            "difference_min": min(differences, default=None),
            "difference_max": max(differences, default=None),
            "refreshes_a_weight": self.mean("refreshes_a_weight"),
            "fixed_gap_refreshes": self.fixed_refreshes,
            "refresh_seconds": self.mean("refresh_seconds"),
            "refresh_share": self.mean("refresh_share"),
            "tokens_per_second": self.mean("tokens_per_second"),
            "median_step_ms": self.mean("median_step_ms"),
            "weights_bytes": live["weights"],
            "state_bytes": live["state"],
            "peak_mib": self.peak_mib,
            "graphs": max(result["graphs"] for result in self.results),
        }

    def as_method(self) -> list[str]:
        return [
            self.case.title,
            f"{self.lr:g}",
            str(len(self.results)),
            spread(self.losses),
            *self._refreshed(),
            f"{self.mean('tokens_per_second'):,.0f}",
            f"{self.live_mib:.1f}",
            f"{self.peak_mib:,.0f}",
            str(max(result["graphs"] for result in self.results)),
        ]

    def as_variant(self) -> list[str]:
        refreshes, _, share = self._refreshed()
        differences = spread(self.differences, "+.4f") if self.differences else "–"
        return [
            self.case.title,
            str(len(self.results)),
            spread(self.losses),
            differences,
            refreshes,
            share,
            f"{self.live_mib:.1f}",
        ]

    def _refreshed(self) -> list[str]:
        refreshes = self.mean("refreshes_a_weight")
        if not refreshes:
            return ["–"] * 3
        return [f"{refreshes:.1f}", f"{refreshes / self.fixed_refreshes:.0%}", f"{self.mean('refresh_share'):.1%}"]


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """The mean, and the range where there are several."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def rows_of(plan: Plan, scale: Scale, cases: Sequence[Case]) -> list[Row]:
    """The rows that have a result, of cases that are planned at this scale: a variant that is ours itself is not."""
    planned = {each.spec.case.name for each in plan if each.spec.scale == scale and each.skipped is None}

    def results(case: Case) -> list[Result]:
        rate = plan.best_lr(scale, case)
        found = [plan.result(RunSpec(scale, case, rate, seed)) for seed in range(case.seeds)]
        return [result for result in found if result is not None]

    ours = results(OURS)
    rows = [Row(scale, case, plan.best_lr(scale, case), results(case), ours) for case in cases if case.name in planned]
    return [row for row in rows if row.results]


def write_report(plan: Plan, folder: Path) -> list[Path]:
    """Write everything of which there are results into `folder`; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, records, written = [], [], list[Path]()
    for scale in plan.scales:
        methods, variants = rows_of(plan, scale, METHODS), rows_of(plan, scale, VARIANTS)
        records += [row.record() for row in (*methods, *variants)]
        if methods:
            texts.append(_words(scale, methods, variants))
        written += _figures(plan, scale, methods, variants, folder)
    if texts:
        written.append(folder / "summary.md")
        write_whole(written[-1], "\n".join(["# Quality on real text", "", _HOW, *texts]))
    runs = [each.result for each in plan if each.result is not None]
    for name, table in (("summary.csv", records), ("runs.csv", [_flat(run) for run in runs])):
        if table:
            written.append(folder / name)
            write_whole(written[-1], _csv(table))
    return written


_HOW = """Written by `benchmarks/quality.py --report` from the results beside this file. Losses are of the same held-out
bytes for every run, in nats per byte, after the last step; of several seeds the mean, with smallest and largest.
"Best" is the best of three learning rates a factor of two apart or, where the best was at an edge, of more. Peak memory
is resident memory above that of the process before there was a model, without what compiling took and gave back.
"""


def _words(scale: Scale, methods: list[Row], variants: list[Row]) -> str:
    tokens, machine = scale.steps * scale.batch * scale.seq, methods[0].results[0]["machine"]
    where = "its best learning rate" if scale.lr_of is None else f"the learning rate that was best for `{scale.lr_of}`"
    parts = [
        f"## `{scale.preset}`: {scale.steps} steps, {tokens / 1e6:.2f} M tokens, `update_proj_gap` {scale.gap}\n",
        f"Each method at {where}. {machine['cpu']}; torch {machine['torch']}; {machine['date']}.\n",
        _table(METHODS_HEAD, [row.as_method() for row in methods]),
    ]
    ours = next((row for row in methods if row.case == OURS), None)
    fixed = next((row for row in variants if row.case.name == "fixed-gap"), None)
    if ours is not None and fixed is not None:
        fewer = 1 - ours.mean("refreshes_a_weight") / fixed.mean("refreshes_a_weight")
        parts.append(
            f"Ours refreshed {fewer:.0%} less often than with a fixed gap, whose loss less ours' is "
            f"{spread(fixed.differences, '+.4f')}; it spent {ours.mean('refresh_share'):.1%} of its time in refreshes, "
            f"the fixed gap {fixed.mean('refresh_share'):.1%}.\n"
        )
    if variants:
        parts.append(_table(VARIANTS_HEAD, [row.as_variant() for row in variants]))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _flat(run: Result) -> dict[str, Any]:
    """A run as one row: what is a number or a name, and the bytes."""
    plain = {key: value for key, value in run.items() if not isinstance(value, dict | list)}
    return {
        **plain,
        "weights_bytes": run["live_bytes"]["weights"],
        "state_bytes": run["live_bytes"]["state"],
        "commit": run["machine"]["commit"],
    }


def _csv(table: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    names = dict.fromkeys(name for row in table for name in row)  # a result may be older than a figure
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


# -- figures -----------------------------------------------------------------------------------------------------------


def _figures(plan: Plan, scale: Scale, methods: list[Row], variants: list[Row], folder: Path) -> list[Path]:
    written = []
    if any(len(row.results[0]["curve"]) > 1 for row in methods):
        written.append(_curves(scale, methods, folder / f"curves-{scale.name}.png"))
    if scale.lr_of is None and methods:
        written.append(_rates(plan, scale, folder / f"rates-{scale.name}.png"))
    if any(row.differences for row in variants):
        written.append(_variants(scale, variants, folder / f"variants-{scale.name}.png"))
    return written


def _curves(scale: Scale, methods: list[Row], path: Path) -> Path:
    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    for row in methods:
        curves = [[_number(loss) for _, loss in result["curve"]] for result in row.results]
        steps = [step for step, _ in row.results[0]["curve"]]
        (line,) = axes.plot(
            steps,
            [statistics.fmean(at) for at in zip(*curves, strict=True)],
            "o-",
            ms=3,
            label=f"{row.case.title}, lr {row.lr:g}",
        )
        low, high = ([choose(at) for at in zip(*curves, strict=True)] for choose in (min, max))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
    title = f"{scale.preset}: mean and range over seeds"
    axes.set(xlabel="step", ylabel="held-out loss, nats per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _rates(plan: Plan, scale: Scale, path: Path) -> Path:
    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    for case in SEARCHED:
        found = [plan.result(RunSpec(scale, case, rate, 0)) for rate in plan.search(scale, case)[0]]
        points = [(result["lr"], _number(result["val_loss"])) for result in found if result is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=case.title)
    axes.set(
        xscale="log",
        xlabel="peak learning rate",
        ylabel="held-out loss, nats per byte",
        title=f"{scale.preset}: one seed",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _variants(scale: Scale, variants: list[Row], path: Path) -> Path:
    rows = [row for row in variants if row.differences and all(map(math.isfinite, row.differences))]
    axes = (figure := Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")).subplots()
    for place, row in enumerate(rows):
        axes.plot(row.differences, [place] * len(row.differences), "o", color="tab:blue", ms=5, alpha=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.case.title for row in rows])
    axes.set(
        xlabel="held-out loss less ours', nats per byte (right is worse)",
        title=f"{scale.preset}: one dot a seed",
        ylim=(len(rows) - 0.5, -0.5),
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def _number(loss: float | None) -> float:
    """NaN, which is not drawn, for a loss that was not finite."""
    return math.nan if loss is None else loss
