"""A picture of a run's refreshes from its `metrics.jsonl`: gaps, similarities and cost of every projected weight.

Weights are rows, sorted by what they are in their block (all queries, all keys, …) and then by layer, so that 24 layers
of seven weights are seven bands.  Steps are columns; what a turn has found is shown until the next one.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from qgalore_compile.files import replacing
from qgalore_compile.training.telemetry import read_metrics

_COLUMNS = 1500  # more than a panel has pixels
_UNKNOWN = "0.92"  # grey, before the first refresh


def plot_schedule(metrics: Path, png: Path, *, title: str) -> bool:
    """Draw the refreshes that a `metrics.jsonl` tells of; False, and nothing drawn, where it tells of none.

    Above, one row a weight: its gap (with trigger "energy" the energy that its projector caught, of the gradient's),
    with a mark at each refresh; the similarity of the last two subspaces; the seconds that its turns took.  Below, what
    they come to in each step: refreshes, and seconds, stand-ins and checks included.

    Args:
        metrics, png: read, and written.
        title: of the figure.
    """
    records = read_metrics(metrics)
    turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        for turn in record.get("turns", ()):
            turns[turn["name"]].append({"step": record["step"], **turn})
    if not turns:
        return False
    kinds = _kinds(list(turns))
    rows = [turns[name] for names in kinds.values() for name in names]
    last = records[-1]["step"]
    height = min(11.0, max(3.0, 0.06 * len(rows) + 0.12 * len(kinds)))
    # Figure without pyplot: draws with Agg, needs no display, and leaves the process's matplotlib backend alone.
    figure = Figure(figsize=(13, height + 2.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3, height_ratios=[height, 1.3], width_ratios=[5, 5, 2.2])
    (first, second, cost), (count, seconds, corner) = axes
    if any(turn["energy"] is not None for row in rows for turn in row):
        found, name = _history(rows, "energy", last), "energy caught"
        norm = Normalize(min(np.nanmin(found), 0.99), 1)
    else:
        found, name = _history(rows, "gap", last), "gap (steps)"
        smallest, largest = np.nanmin(found), np.nanmax(found)
        norm = LogNorm(smallest, largest if largest > smallest else 2 * smallest)
    _heat_map(first, found, last, norm, name, "YlGnBu")
    at = [(turn["step"], row) for row, each in enumerate(rows) for turn in each if turn["refreshed"]]
    tall = 0.8 * 72 * height / len(rows)  # points: most of a row
    first.plot(*zip(*at, strict=True) if at else ([], []), "|", ms=min(tall, 9), mew=0.6, color="crimson")
    _heat_map(second, _history(rows, "similarity", last), last, Normalize(0, 1), "similarity", "viridis")
    cost.barh(range(len(rows)), [sum(turn["seconds"] for turn in row) for row in rows], height=1.0, color="tab:orange")
    cost.set(title="seconds of turns", ylim=(len(rows) - 0.5, -0.5))
    for axis in (first, second, cost):
        _bands(axis, kinds, labelled=axis is first)
    _by_step(count, rows, last, lambda turn: turn["refreshed"], "refreshes a step")
    count.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _by_step(seconds, rows, last, lambda turn: turn["seconds"], "seconds a step")
    corner.axis("off")
    with replacing(png) as file:
        figure.savefig(file, dpi=120, format="png")
    return True


def _kinds(names: list[str]) -> dict[str, list[str]]:
    """Names by what they are but for the layer's number, in the order of first appearance."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[re.sub(r"\d+", "*", name.removesuffix(".weight"))].append(name)
    short = [kind.split("*.", 1)[-1] for kind in kinds]
    if len(set(short)) == len(kinds):
        kinds = dict(zip(short, kinds.values(), strict=True))
    return {
        kind: sorted(each, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]) for kind, each in kinds.items()
    }


def _history(rows: list[list[dict[str, Any]]], key: str, last: int) -> NDArray[np.float64]:
    """(rows, columns): the latest value at each column's step, NaN before the first."""
    columns = np.linspace(1, last, min(last, _COLUMNS))
    history = np.full((len(rows), len(columns)), math.nan)
    for row, turns in zip(history, rows, strict=True):
        known = [(turn["step"], turn[key]) for turn in turns if turn[key] is not None]
        if known:
            steps, values = zip(*known, strict=True)
            place = np.searchsorted(steps, columns, side="right") - 1
            row[place >= 0] = np.asarray(values)[place[place >= 0]]
    return history


def _heat_map(axes: Axes, values: NDArray[np.float64], last: int, norm: Normalize, title: str, colours: str) -> None:
    axes.set(title=title, facecolor=_UNKNOWN)
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        norm=norm,
        cmap=colours,
        extent=(0.5, last + 0.5, len(values) - 0.5, -0.5),
    )
    figure = axes.figure
    assert isinstance(figure, Figure)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04)
    if isinstance(norm, LogNorm):
        found = np.unique(values[~np.isnan(values)])
        bar.set_ticks(list(found[:: math.ceil(len(found) / 8)]))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.5, last + 0.5)


def _bands(axes: Axes, kinds: dict[str, list[str]], *, labelled: bool) -> None:
    """A line between kinds, and their names beside the first panel."""
    ends = np.cumsum([len(names) for names in kinds.values()])
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white" if axes.images else "0.6", lw=1.2)
    every = math.ceil(len(kinds) / 48)
    middles = [end - (len(names) + 1) / 2 for end, names in zip(ends, kinds.values(), strict=True)]
    axes.set_yticks(middles[::every] if labelled else [], list(kinds)[::every] if labelled else [])
    axes.tick_params(axis="y", length=0)


def _by_step(axes: Axes, rows: list[list[dict[str, Any]]], last: int, amount: Any, title: str) -> None:
    """What all weights' turns come to in each step, as lines from 0; where steps share a pixel the largest shows."""
    total: dict[int, float] = defaultdict(float)
    for turns in rows:
        for turn in turns:
            total[turn["step"]] += amount(turn)
    width = max(0.6, min(3.0, 400 / last))
    # not clipped: the first step, which has all stand-ins, is the frame
    axes.vlines(list(total), 0, list(total.values()), lw=width, color="tab:orange", clip_on=False, zorder=3)
    axes.set(xlim=(0.5, last + 0.5), ylim=(0, None), xlabel="step", title=title)
    axes.grid(axis="y", alpha=0.3)
