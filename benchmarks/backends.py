"""Tokens per second of one training step under the backends "qgalore" and "inductor" and in eager mode.

    .venv/bin/python benchmarks/backends.py --preset tiny --rounds 21

All sides run in one process, interleaved, on equal data from equal seeds; a round is one step of each.  Compile time is
the first step's, apart, each side from an empty cache.  A round in which a subspace is refreshed counts as well: it is
part of training.  Writes `results/backends-<preset>.json` and prints a table.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from common import RESULTS, WARM_UP, Sides, cell, compile_something, interleaved, machine, ratios, spread, write_result
from rich.console import Console
from rich.table import Table
from torch._inductor.utils import fresh_cache

from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.run import Run, compiled_graphs


def main(
    preset: Annotated[str, typer.Option(help="Model and batch.")] = "tiny",
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 21,
    backends: Sides = "eager,inductor,qgalore",
) -> None:
    corpus = load_corpus(None)
    compile_something()
    runs: dict[str, Run] = {}
    report: dict[str, dict[str, float]] = {}
    for backend in backends.split(","):
        steps = 1 + WARM_UP + rounds
        config = TrainConfig.from_preset(preset=preset, backend=backend, steps=steps, eval_every=10**9)
        graphs = compiled_graphs()
        runs[backend] = Run(config, corpus)
        with fresh_cache():  # each side compiles from nothing: they share kernels
            record = runs[backend].advance()
        report[backend] = {"first_step_s": record.compile_seconds or 0.0, "graphs": compiled_graphs() - graphs}

    def seconds_of_step(run: Run) -> float:
        return run.config.tokens_per_step / run.advance().tokens_per_second

    sides = {backend: lambda _, run=run: seconds_of_step(run) for backend, run in runs.items()}
    seconds = interleaved(sides, rounds)
    table = Table("backend", "ms a step: median (min-max)", "tokens/s", "× eager", "first step, s", "graphs")
    for backend, run in runs.items():
        times, row = spread(seconds[backend]), report[backend]
        row |= {f"{key}_ms": times[key] * 1e3 for key in ("median", "min", "max")}
        row["tokens_per_second"] = run.config.tokens_per_step / times["median"]
        row["speed_to_eager"] = spread(ratios(seconds["eager"], seconds[backend]))["median"]
        table.add_row(
            backend,
            cell({key: value * 1e3 for key, value in times.items()}, ".0f", "min", "max"),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed_to_eager']:.2f}",
            f"{row['first_step_s']:.1f}",
            f"{row['graphs']:.0f}",
        )
    Console().print(table)
    result: dict[str, Any] = {"preset": preset, "rounds": rounds, "machine": machine(), "backends": report}
    write_result(RESULTS / f"backends-{preset}.json", result)


if __name__ == "__main__":
    typer.run(main)
