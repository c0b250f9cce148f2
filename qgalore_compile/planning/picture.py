"""The picture of a plan: every side at its peak, and this project's over a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from qgalore_compile.files import replacing

if TYPE_CHECKING:
    from qgalore_compile.planning.forecast import MemoryPlan


def draw(plan: MemoryPlan, path: Path) -> None:
    """Draw it as PNG or SVG, by the file's name.

    Raises:
        ValueError: the name ends otherwise.
    """
    from qgalore_compile.planning.forecast import CATEGORIES

    form = path.suffix.removeprefix(".").lower()
    if form not in ("png", "svg"):
        raise ValueError(f"{path}: a plot is a .png or a .svg")
    sides = (plan.forecast, *plan.others)
    figure = Figure(figsize=(11, 3 + 0.32 * len(sides)), layout="constrained")
    bars, curve = figure.subplots(2, 1, height_ratios=[max(1.0, 0.2 * len(sides)), 1.0])
    names = [side.name for side in sides][::-1]
    left = [0.0] * len(sides)
    for index, category in enumerate((*CATEGORIES, "process")):
        sizes = [side.by_category[category] / 1e9 for side in sides][::-1]
        colour = "0.8" if category == "process" else f"C{index}"
        bars.barh(names, sizes, left=left, color=colour, label=category)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    if plan.budget is not None:
        bars.axvline(plan.budget / 1e9, color="crimson", lw=1)
    bars.set(xlabel="GB at the peak of a step", title=f"{plan.batch} × {plan.seq} tokens, {plan.device}")
    bars.legend(fontsize=7, ncols=2)
    forecast = plan.forecast
    steady = [moment for moment in forecast.moments if not moment.refresh]
    kinds = [name for name in CATEGORIES if forecast.held[name] or any(m.bytes[name] for m in steady)]
    rows = [[(forecast.held[name] + moment.bytes[name]) / 1e9 for moment in steady] for name in kinds]
    colours = [f"C{CATEGORIES.index(name)}" for name in kinds]
    curve.stackplot(range(len(steady)), rows, colors=colours, step="post")
    curve.set(xlim=(0, len(steady) - 1), ylim=(0, None), xlabel="calls of a step without a refresh", ylabel="GB")
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format=form)
