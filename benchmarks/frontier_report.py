"""Tables and the picture of the tuned comparison: loss against bytes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from frontier_plan import Method, Plan, Rates, Setting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality_plan import loss_of

_BLUE, _ORANGE, _GREY = "#2a6f97", "#c2571a", "#9a9a9a"
_MIB = 1 << 20


class Row(NamedTuple):
    """A method in a setting: its best rates, how many pairs were tried, losses by seed, bytes by kind."""

    method: Method
    rates: Rates
    tried: int
    over: bool
    losses: tuple[float, ...]
    bytes: dict[str, int]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)

    @property
    def total(self) -> float:
        """MiB."""
        return sum(self.bytes.values()) / _MIB


def rows(plan: Plan, setting: Setting) -> list[Row]:
    """The methods that have been tried, the best first."""
    found = []
    for method in plan.methods:
        tried = plan.tried(setting, method)
        if not tried or min(tried.values()) == math.inf:
            continue
        rates = min(tried, key=lambda each: tried[each])
        results = [
            result
            for name, result in sorted(plan.results.items())
            if name.startswith(f"{setting.name}/{method.name}/") and Rates(*result["rates"]) == rates
        ]
        losses = tuple(map(loss_of, results))
        over = plan.best(setting, method) is not None
        found.append(Row(method, rates, len(tried), over, losses, results[0]["bytes"]))
    return sorted(found, key=lambda row: row.mean)


def table(setting: Setting, found: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        f"## {setting.name}: {setting.steps} steps of {setting.tokens:,} tokens of `{setting.preset}`",
        "",
        "| method | loss | range over seeds | seeds | rate of the blocks | of the rest | pairs tried "
        "| weights | state | gradients | MiB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        spread = f"{min(row.losses):.4f}-{max(row.losses):.4f}" if len(row.losses) > 1 else "–"
        sizes = [f"{row.bytes[kind] / _MIB:.2f}" for kind in ("weights", "state", "gradients")]
        cells = [
            row.method.title,
            f"{row.mean:.4f}",
            spread,
            str(len(row.losses)),
            f"{row.rates.blocks:g}",
            f"{row.rates.plain:g}",
            f"{row.tried}{'' if row.over else ', more to come'}",
            *sizes,
            f"{row.total:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write_report(plan: Plan, folder: Path) -> Iterator[Path]:
    """Tables of all settings that have results, and a picture with a panel for each."""
    found = {setting: rows(plan, setting) for setting in plan.settings}
    found = {setting: each for setting, each in found.items() if each}
    if not found:
        return
    summary = folder / "summary.md"
    head = (
        "# Loss against bytes\n\n"
        "Held-out loss in nats a byte, each method at its own best pair of rates (`benchmarks/frontier.py`); bytes of\n"
        "weights, optimizer state and gradients that live until the update; of prototypes as compiled code would keep\n"
        "them.\n"
    )
    summary.write_text("\n".join([head, *(table(setting, each) for setting, each in found.items())]))
    yield summary
    figure = Figure(figsize=(6.4 * len(found), 4.6), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (setting, each) in zip(axes, found.items(), strict=True):
        _panel(axis, setting, each)
    picture = folder / "frontier.png"
    figure.savefig(picture, dpi=110)
    yield picture


def _panel(axis: Axes, setting: Setting, found: Sequence[Row]) -> None:
    best = math.inf
    frontier = []
    for row in sorted(found, key=lambda each: (each.total, each.mean)):
        if row.mean < best:
            best = row.mean
            frontier.append(row)
    axis.step([row.total for row in frontier], [row.mean for row in frontier], where="post", color=_GREY, linewidth=1)
    for row in found:
        colour = _BLUE if row.method.optimizer in ("rules", "whole") else _ORANGE  # prototypes, and optimizers
        low, high = row.mean - min(row.losses), max(row.losses) - row.mean
        axis.errorbar([row.total], [row.mean], yerr=[[low], [high]], fmt="o", color=colour, markersize=5, capsize=2)
        axis.annotate(row.method.name, (row.total, row.mean), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    for shown in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        shown("{x:g}")
    axis.set_xlabel("MiB of weights, state and gradients")
    axis.set_ylabel("held-out loss, nats a byte")
    axis.set_title(f"{setting.preset}, {setting.tokens:,} tokens a step", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
