"""Tables and the picture of what `formats.py` measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from qgalore_compile.formats import Format
from qgalore_compile.subspace.moments import SHORT

Result = dict[str, Any]

DEFAULTS = {"weight": "int8/256", "projector": "int4/256+planar", "moments": "8bit"}
TITLES = {"weight": "as weights", "projector": "as projectors", "moments": "as moments"}
_TICKS = (-0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.2, 1)
_BLUE, _ORANGE, _GREY = "#2a6f97", "#c2571a", "#9a9a9a"


def bits(text: str) -> float:
    """Bits an element of a format's text, or of what `moments` may say."""
    text = text.split()[0]
    return Format.parse(SHORT.get(text, text)).bits


def losses(result: Result, role: str, steps: int | None = None) -> dict[str, float]:
    """Losses of the runs with seed 0 of `tiny` that have another format in that role, by its text."""
    runs = [run for run in result["runs"].values() if run["role"] == role and run["preset"] == "tiny"]
    steps = steps or min((run["steps"] for run in runs), default=0)
    found = {run["text"]: run["val_loss"] for run in runs if run["steps"] == steps and run["seed"] == 0}
    return dict(sorted(found.items(), key=lambda item: (-bits(item[0]), item[1])))


def defaults(result: Result) -> list[float]:
    """Losses of the default formats by seed, from 0."""
    runs = [run for run in result["runs"].values() if run["role"] == "default"]
    return [run["val_loss"] for run in sorted(runs, key=lambda run: run["seed"])]


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(result: Result) -> dict[str, str]:
    """Markdown by what it is of: errors, losses by role, moments of four bits beside those of eight."""
    return {
        "errors": _errors(result) if result["errors"] else "",
        "spread": ", ".join(f"{loss:.3f}" for loss in defaults(result)),
        **{role: _losses(result, role) for role in TITLES},
        "four": _moments(result),
    }


def fill(page: Path, result: Result) -> None:
    """Put every table into its place on the page, between ``<!-- name -->`` and ``<!-- / -->``."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables(result).items():
        before, found, rest = text.partition(f"<!-- {name} -->")
        end = rest.index("<!-- / -->") if found else 0
        space = "\n\n" if "|" in table else ""
        text = f"{before}{found}{space}{table}{space}{rest[end:]}"
    page.write_text(text, encoding="utf-8")


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _errors(result: Result) -> str:
    rows = result["errors"]["rows"]
    kinds = list(next(iter(rows.values())))[1:]
    cells = [
        [f"`{text}`", f"{row['bits']:.2f}", *(f"{100 * row[kind]:.2f}" if kind in row else "–" for kind in kinds)]
        for text, row in rows.items()
    ]
    return _markdown(["format", "bits", *kinds], cells)


def _losses(result: Result, role: str) -> str:
    base = next(iter(defaults(result)), math.nan)
    rows = [
        [f"`{text}`", f"{bits(text):.2f}", f"{loss:.3f}", f"{loss - base:+.3f}"]
        for text, loss in losses(result, role).items()
    ]
    default = DEFAULTS[role]
    rows.insert(0, [f"`{default}` (default)", f"{bits(default):.2f}", f"{base:.3f}", "0"])
    return _markdown([TITLES[role], "bits", "loss", "more than the default"], rows)


def _moments(result: Result) -> str:
    """Sides that trained for the same steps on the same batches."""
    sides: dict[tuple[str, int, int], dict[str, float]] = {}
    for run in result["runs"].values():
        if run["role"] == "moments" and (run["preset"] != "tiny" or run["steps"] > 100):
            sides.setdefault((run["preset"], run["steps"], run["seed"]), {})[run["text"]] = run["val_loss"]
    rows = []
    for (preset, steps, seed), found in sorted(sides.items(), key=lambda side: (side[0][0] != "tiny", side[0])):
        if "8bit" in found:
            more = (
                f"{found[text] - found['8bit']:+.4f}" if text in found else "–" for text in ("4bit", "4bit nearest")
            )
            rows.append([f"`{preset}`", str(steps), str(seed), f"{found['8bit']:.4f}", *more])
    return _markdown(["preset", "steps", "seed", "8 bits", "4 bits more", "4 bits, to nearest, more"], rows)


# -- the picture -------------------------------------------------------------------------------------------------------


def draw(result: Result, path: Path) -> None:
    """Losses above the default's, a panel a role, beside the range of the default over seeds."""
    base = defaults(result)[0]
    band = [loss - base for loss in defaults(result)]
    found = {role: losses(result, role) for role in TITLES}
    figure = Figure(figsize=(13, 0.27 * max(map(len, found.values())) + 1.8), layout="constrained")
    for axes, (role, each) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        _panel(axes, role, {text: loss - base for text, loss in each.items()}, (min(band), max(band)))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", fontsize=9, frameon=False)
    figure.supxlabel("final loss above that of the default formats, nats a byte", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, role: str, more: dict[str, float], band: tuple[float, float]) -> None:
    texts = list(more)
    axes.axvspan(*band, color=_GREY, alpha=0.25, linewidth=0, label="default formats, three seeds")
    axes.axvline(0.0, color=_GREY, linewidth=1)
    for place, text in enumerate(texts):
        color = _ORANGE if bits(text) < 6 else _BLUE
        axes.plot([0, more[text]], [place, place], color=color, linewidth=1.2, alpha=0.6)
        axes.plot([more[text]], [place], "o", color=color, markersize=5.5)
    axes.set_yticks(range(len(texts)), [f"{text}  {bits(text):.4g} bits" for text in texts], fontsize=8.5)
    axes.set_ylim(len(texts) - 0.4, -0.6)
    axes.set_xscale("symlog", linthresh=0.05, linscale=1.5)
    axes.set_xlim(min([-0.06, *more.values()]) * 1.1, max([0.06, *more.values()]) * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{TITLES[role]} (default {DEFAULTS[role]})", fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
