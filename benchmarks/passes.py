"""How long the passes take, as the model gets deeper, and what share of a compilation that is.

    .venv/bin/python benchmarks/passes.py --layers 2,8,32

For each depth the step of `tiny` is traced and passed without code generation (`qg.explain`), so the figures are
the passes' own; linear means that milliseconds a layer stay the same.  With `--compile N` the step with N layers is
also compiled for real, from an empty cache, for the passes' share of the whole.  Writes `results/passes-tiny.json`.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, machine, seconds_of, training_step, write_result
from rich.console import Console
from rich.table import Table
from torch._inductor.utils import fresh_cache

import qgalore_compile as qg
from qgalore_compile.training.llama import Llama, find_preset


def build(layers: int) -> Any:
    """A whole training step of `tiny` with another depth, and its arguments."""
    preset = find_preset("tiny")
    torch.manual_seed(0)
    model = qg.quantize_(Llama(replace(preset.model, num_layers=layers)))
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=preset.rank))
    batch = torch.randint(0, 256, (preset.batch, preset.seq))
    return training_step(model, opt), (batch, batch)


def main(
    layers: Annotated[str, typer.Option(help="Depths, by comma.")] = "2,8,32",
    repeats: Annotated[int, typer.Option(help="Traces a depth; the median counts.")] = 3,
    compile_layers: Annotated[int, typer.Option("--compile", help="Depth to compile for real; 0 for none.")] = 2,
) -> None:
    milliseconds: dict[int, dict[str, float]] = {}
    nodes: dict[int, int] = {}
    for depth in map(int, layers.split(",")):
        runs = []
        for _ in range(repeats):
            step, args = build(depth)
            report = qg.explain(step, *args)
            runs.append({each["name"]: each["milliseconds"] for each in report.passes})
            nodes[depth] = report.passes[0]["nodes_before"]
        milliseconds[depth] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    share = None
    if compile_layers:
        step, args = build(compile_layers)
        compiled = torch.compile(step, backend="qgalore", fullgraph=True, options={"strict": True})
        with fresh_cache():
            seconds = seconds_of(lambda: compiled(*args))
        passes = sum(each["milliseconds"] for each in qg.report(compiled).passes) / 1e3
        share = {"layers": compile_layers, "first_step_s": seconds, "passes_s": passes, "share": passes / seconds}
    table = Table("pass", *(f"{depth} layers, ms" for depth in milliseconds), "ms a layer, deepest / shallowest")
    first, last = min(milliseconds), max(milliseconds)
    totals = {depth: sum(times.values()) for depth, times in milliseconds.items()}
    for name in [*milliseconds[first], "all"]:
        row = {depth: totals[depth] if name == "all" else milliseconds[depth][name] for depth in milliseconds}
        ratio = (row[last] / last) / (row[first] / first)
        table.add_row(name, *(f"{row[depth]:.0f}" for depth in row), f"{ratio:.2f}")
    Console().print(table)
    Console().print({"nodes": nodes, "compile": share})
    result = {
        "milliseconds": milliseconds,
        "all": totals,
        "nodes": nodes,
        "compile": share,
        "repeats": repeats,
        "command": f"benchmarks/passes.py --layers {layers} --repeats {repeats} --compile {compile_layers}",
        "machine": machine(),
    }
    write_result(RESULTS / "passes-tiny.json", result)


if __name__ == "__main__":
    typer.run(main)
