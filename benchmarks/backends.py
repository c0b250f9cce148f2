"""Tokens per second of one training step under the backends "qgalore" and "inductor" and in eager mode.

    .venv/bin/python benchmarks/backends.py --preset tiny --rounds 21

All sides run in one process, interleaved, on equal data from equal seeds; a round is one step of each.  Compile time is
the first step's, apart, each side from an empty cache.  A round in which a subspace is refreshed counts as well: it is
part of training.  Writes `results/backends-<preset>.json` and prints a table.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch._inductor.utils import fresh_cache

from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.run import Run, compiled_graphs

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3


def machine() -> dict[str, str]:
    """What a figure depends on beside the code."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(
    preset: Annotated[str, typer.Option(help="Model and batch.")] = "tiny",
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 21,
    backends: Annotated[str, typer.Option(help="Sides, by comma.")] = "eager,inductor,qgalore",
) -> None:
    corpus = load_corpus(None)
    with fresh_cache():  # what the first compilation of a process pays, whichever side it is
        torch.compile(lambda x: x.sin() + 1)(torch.ones(100))
    runs: dict[str, Run] = {}
    report: dict[str, dict[str, float]] = {}
    for backend in backends.split(","):
        steps = rounds + WARM_UP + 1
        config = TrainConfig.from_preset(preset=preset, backend=backend, steps=steps, eval_every=10**9)
        graphs = compiled_graphs()
        runs[backend] = Run(config, corpus)
        with fresh_cache():  # each side compiles from nothing: they share kernels
            record = runs[backend].advance()
        report[backend] = {"first_step_s": record.compile_seconds or 0.0, "graphs": compiled_graphs() - graphs}
    seconds: dict[str, list[float]] = {backend: [] for backend in runs}
    for index in range(WARM_UP + rounds):
        for backend, run in runs.items():
            rate = run.advance().tokens_per_second
            if index >= WARM_UP:
                seconds[backend].append(run.config.tokens_per_step / rate)
    table = Table("backend", "ms a step: median (min-max)", "tokens/s", "× eager", "first step, s", "graphs")
    for backend, run in runs.items():
        times, row = seconds[backend], report[backend]
        row |= {
            "median_ms": statistics.median(times) * 1e3,
            "min_ms": min(times) * 1e3,
            "max_ms": max(times) * 1e3,
            "tokens_per_second": run.config.tokens_per_step / statistics.median(times),
            "speed_to_eager": statistics.median(a / b for a, b in zip(seconds["eager"], times, strict=True)),
        }
        table.add_row(
            backend,
            f"{row['median_ms']:.0f} ({row['min_ms']:.0f}-{row['max_ms']:.0f})",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed_to_eager']:.2f}",
            f"{row['first_step_s']:.1f}",
            f"{row['graphs']:.0f}",
        )
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    result = {"preset": preset, "rounds": rounds, "machine": machine(), "backends": report}
    (RESULTS / f"backends-{preset}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
