"""Where the first step's seconds go, stage by stage, at several depths.

    .venv/bin/python benchmarks/depth.py                                 # 2 to 32 layers
    .venv/bin/python benchmarks/depth.py --depths 2,8 --sides adamw,qgalore --before ../earlier

The model and the step are those of `deep_model.py`, in float32.  Sides:

- "adamw": the model compiled by Inductor, ``torch.optim.AdamW`` outside;
- "inductor": the whole Q-GaLore step under plain Inductor;
- "qgalore": the same under this package, with the options' defaults;
- "before": that again, with this package as an earlier checkout has it (`--before FOLDER`, where `passes` and
  `kernels` are linked into `qgalore_compile`).

Each measurement is a process of its own with an empty cache.  Stages follow from the times that PyTorch keeps of a
compilation: tracing is Dynamo's, "autograd" AOTAutograd's with all up to Inductor, "passes" this package's, "inductor"
what is left of Inductor, "compilers" waiting for C++ and loading it, "step" the step itself with what Dynamo does
behind a compilation.  Writes `results/depth.json` and `depth.png`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from common import RESULTS, Out, last_line, machine, write_result
from deep_model import BATCH, SEQ, make_step
from matplotlib.figure import Figure
from torch._dynamo.utils import compilation_time_metrics

SIDES = ("adamw", "inductor", "before", "qgalore")
STAGES = ("tracing", "autograd", "passes", "inductor", "compilers", "step")
COLOURS = ("#4c78a8", "#72b7b2", "#54a24b", "#e45756", "#b279a2", "#9d9da1")
MOST = 8
"""Layers up to which the step is compiled by plain Inductor, which takes minutes for more."""


def stages(seconds: float, kept: Mapping[str, list[float]]) -> dict[str, float]:
    """A first step's seconds by stage.

    Args:
        seconds: that it took.
        kept: ``compilation_time_metrics`` behind it.
    """
    of = {name: sum(kept.get(name, ())) for name in (
        "_compile.compile_inner", "OutputGraph.call_user_compiler", "backward._backward_impl", "compile_fx_inner",
        "pass.post_grad_passes.post_grad_custom_post_pass", "PyCodeCache.load_by_key_path",
    )}  # fmt: skip
    whole, handed, backward, inductor, passes, loading = of.values()
    found = {
        "tracing": whole - handed,
        "autograd": handed + backward - inductor,
        "passes": passes,
        "inductor": inductor - passes - loading,
        "compilers": loading,
    }
    return {**found, "step": seconds - sum(found.values())}


def measure(side: str, layers: int) -> dict[str, float]:
    """In this process."""
    step = make_step(side, layers, torch.float32)
    tokens = torch.randint(49_152, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    step(tokens)
    return stages(time.perf_counter() - started, compilation_time_metrics)


def draw(found: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Bars: a group for each depth, one for each side in it, its stages on top of each other."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.subplots()
    depths = sorted({int(depth) for rows in found.values() for depth in rows})
    width = 0.8 / len(found)
    for place, (side, rows) in enumerate(found.items()):
        for depth, row in rows.items():
            left, bottom = depths.index(int(depth)) + (place - (len(found) - 1) / 2) * width, 0.0
            for stage, colour in zip(STAGES, COLOURS, strict=True):
                axis.bar(left, row[stage], 0.9 * width, bottom=bottom, color=colour)
                bottom += row[stage]
            axis.text(left, bottom, f"{side}\n{bottom:.0f} s", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(depths)), [f"{depth} layers" for depth in depths])
    axis.set_ylabel("first step, seconds")
    axis.margins(y=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [axis.bar(0, 0, color=colour, label=stage) for stage, colour in zip(STAGES, COLOURS, strict=True)]
    axis.legend(handles=handles[::-1], frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


def main(
    depths: Annotated[str, typer.Option(help="By comma.")] = "2,8,16,24,32",
    sides: Annotated[str, typer.Option(help="By comma.")] = "adamw,inductor,qgalore",
    before: Annotated[Path | None, typer.Option(help="A checkout of an earlier revision.")] = None,
    out: Out = RESULTS,
    one: Annotated[str, typer.Option(help="Measure this side here at the one depth, and print it.")] = "",
) -> None:
    if one:
        print(json.dumps(measure(one, int(depths))))
        return
    chosen = [*sides.split(","), *(["before"] if before else [])]
    found: dict[str, dict[str, Any]] = {side: {} for side in SIDES if side in chosen}
    for depth in depths.split(","):
        for side, rows in found.items():
            if side == "inductor" and int(depth) > MOST:
                continue
            with TemporaryDirectory() as cache, mock.patch.dict(os.environ):
                if side == "before":
                    os.environ["PYTHONPATH"] = str(before)
                rows[depth] = json.loads(last_line(__file__, ["--depths", depth, "--one", side], cache))
            row = {stage: round(value, 1) for stage, value in rows[depth].items()}
            print(depth, side, round(sum(rows[depth].values()), 1), row, flush=True)
            write_result(out / "depth.json", {"machine": machine(), "dtype": "float32", "sides": found})
    draw(found, out / "depth.png")


if __name__ == "__main__":
    typer.run(main)
