"""Live bytes over the program that Inductor generates for a steady training step, counted and not measured.

    .venv/bin/python benchmarks/live_bytes.py --preset 60m --plot live-bytes.png
    .venv/bin/python benchmarks/live_bytes.py --preset 350m --fake --sides inductor,qgalore

The sides are those of `train_step.py`.  The generated Python module is taken where Inductor would load it and run on
fake tensors, without its kernels (`generated_program.py`).  Live are the storages that the program made and still
holds.  What exists before the step (weights, optimizer state, tokens) is "resident" and apart.  What an op allocates
inside (a refresh, Philox' words, a library's packing) is not seen.

Without `--fake` the step is compiled and run as well.  Torch's profiler records the CPU allocator over one steady step:
the peak between ops, which has to equal the counted one, and the peak inside an op, with the op's name.  With `--fake`
no weight exists, no C++ is compiled and nothing is executed.  Writes `results/live-bytes-<preset>.json`;
`--trace FOLDER` keeps each generated program and its curve, call by call.  Sides may run one at a time: `--also FILE`
takes the others from an earlier result.
"""

from __future__ import annotations

import dataclasses
import json
import re
from bisect import bisect_right
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from common import RESULTS, Batch, Layers, Out, Preset, Seq, Sides, command, machine, write_whole
from generated_program import Ledger, Point, Program, walk
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch._subclasses import FakeTensorMode
from train_step import ALL, SIDES, Settings, Side, Step, build, chosen, compile_step, described, set_due

SAMPLES = 400  # of a curve in the JSON file


class Generated(BaseException):
    """Ends a compilation once the program is known.  No Exception: Dynamo would wrap it."""


def generate(side: Side, settings: Settings, fake: bool) -> tuple[Program, dict[str, Any] | None]:
    """The side's program and, unless `fake`, what :func:`measure` says of a step run for real."""
    programs: list[Program] = []
    load = GraphLowering._compile_to_module_lines

    def keep(graph: GraphLowering, code: Any) -> Any:
        programs.append(Program(code.value, list(graph.example_inputs or ()), dict(graph.constants)))
        if fake:
            raise Generated
        return load(graph, code)

    torch._dynamo.reset()
    measured = None
    with ExitStack() as stack:
        with ExitStack() as building:
            if fake:
                building.enter_context(FakeTensorMode())
            plain, schedules = build(side, settings)
            tokens = [torch.zeros_like(each) for each in settings.tokens(0)]
        if not fake:
            set_due(schedules, False)
        stack.enter_context(fresh_cache())  # from a cached graph nothing is generated
        stack.enter_context(mock.patch.object(GraphLowering, "_compile_to_module_lines", keep))
        stack.enter_context(suppress(Generated))
        step = compile_step(plain, side)
        step(*tokens)
        measured = measure(step, tokens)
    (program,) = programs
    return program, measured


def measure(step: Step, tokens: list[torch.Tensor]) -> dict[str, Any]:
    """The most bytes that the CPU allocator held above the start of a step, between ops and inside one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(*tokens)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    ops: list[Any] = []  # outermost ones; "::" leaves out the profiler's ranges around the whole step
    for event in events:
        if "::" in event.name() and not (ops and event.start_ns() < ops[-1].end_ns()):
            ops.append(event)
    starts = [op.start_ns() for op in ops]
    live = between = inside = 0
    inside_op, place = None, -1
    for event in events:
        if event.name() != "[memory]":
            continue
        before, place = place, bisect_right(starts, event.start_ns()) - 1
        if place < 0 or event.start_ns() > ops[place].end_ns():
            place = -1
        if place != before:
            between = max(between, live)
        live += event.nbytes()
        if place < 0:
            between = max(between, live)
        elif live > inside:
            inside, inside_op = live, ops[place].name()
    return {"between_ops": between, "inside_op": inside, "inside_op_name": inside_op}


def sampled(points: list[Point], count: int = SAMPLES) -> list[int]:
    """The largest live bytes in each of `count` equal parts of the program, so that the peak stays what it is."""
    parts = min(count, len(points))
    bounds = [len(points) * index // parts for index in range(parts + 1)]
    return [max(point.live for point in points[a:b]) for a, b in pairwise(bounds)]


def plot(report: dict[str, dict[str, Any]], title: str, file: Path) -> None:
    """The curves of all sides over the fraction of each program's calls."""
    axes = (figure := Figure(figsize=(9, 4.5), layout="constrained")).subplots()
    for side in report.values():
        peak, resident, curve = side["peak_bytes"] / 2**20, side["resident_bytes"] / 2**20, side["curve"]
        label = f"{side['title']}: at most {peak:,.0f} MiB above {resident:,.0f} resident"
        places = [index / len(curve) for index in range(len(curve))]
        axes.plot(places, [live / 2**20 for live in curve], label=label)
    axes.set(xlabel="fraction of the program's calls", ylabel="live, MiB", xlim=(0, 1), ylim=(0, None), title=title)
    axes.legend()
    figure.savefig(file, dpi=150)


def counted(ledger: Ledger, measured: dict[str, Any] | None, top: int) -> dict[str, Any]:
    """What a result says of a side: its peak, the ``top`` largest buffers there, its curve, and what was measured."""
    place = ledger.peak_place
    return {
        "resident_bytes": sum(ledger.resident.values()),
        "peak_bytes": ledger.peak,
        "peak_point": {**ledger.points[place]._asdict(), "fraction": place / len(ledger.points)},
        "measured_bytes": measured,
        "measured_to_counted": measured and measured["between_ops"] / ledger.peak,
        "calls": len(ledger.points),
        "at_peak": [dataclasses.asdict(buffer) for buffer in ledger.at_peak[:top]],
        "at_peak_others": [len(ledger.at_peak[top:]), sum(buffer.bytes for buffer in ledger.at_peak[top:])],
        "curve": sampled(ledger.points),
    }


def show(title: str, row: dict[str, Any], ledger: Ledger, top: int) -> None:
    """The buffers at the peak as a table, and the peak itself, counted and measured."""
    table = Table("buffer", "shape", "dtype", "MiB", "written by", title=f"{title}: live at the peak")
    for buffer in ledger.at_peak[:top]:
        table.add_row(buffer.name, str(buffer.shape), buffer.dtype, f"{buffer.bytes / 2**20:.2f}", buffer.writer)
    Console().print(table)
    place, resident = ledger.peak_place, row["resident_bytes"] / 2**20
    print(f"{title}: peak {ledger.peak / 2**20:,.2f} MiB above {resident:,.2f} MiB resident")
    print(f"  at call {place} of {len(ledger.points)}: {ledger.points[place].op}")
    if measured := row["measured_bytes"]:
        ratio = row["measured_to_counted"]
        print(f"  measured between ops {measured['between_ops'] / 2**20:,.2f} MiB, {ratio:.4f} × counted;")
        print(f"  inside {measured['inside_op_name']} {measured['inside_op'] / 2**20:,.2f} MiB", flush=True)


def keep_trace(program: Program, points: list[Point], folder: Path, name: str) -> None:
    """A side's program, and its curve call by call, as files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(program.source)
    rows = (f"{point.line}\t{point.live}\t{point.op}" for point in points)
    (folder / f"{name}.tsv").write_text("\n".join(["line\tlive_bytes\top", *rows]) + "\n")


def main(
    preset: Preset = "60m",
    layers: Layers = None,
    batch: Batch = 4,
    seq: Seq = 256,
    fake: Annotated[bool, typer.Option("--fake", help="No weights, no C++, nothing executed or measured.")] = False,
    sides: Sides = ALL,
    top: Annotated[int, typer.Option(help="Buffers of each peak to report.")] = 20,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the curves into this PNG file.")] = None,
    also: Annotated[list[Path], typer.Option(help="Earlier results of other sides, to be kept beside these.")] = [],  # noqa: B006
    trace: Annotated[Path | None, typer.Option(help="Keep programs and whole curves in this folder.")] = None,
    out: Out = RESULTS,
) -> None:
    settings = Settings(preset, layers, batch, seq)
    report: dict[str, dict[str, Any]] = {}
    for name in chosen(sides):
        title = SIDES[name].title
        program, measured = generate(SIDES[name], settings, fake)
        ledger = walk(program)
        row = {"title": title, **counted(ledger, measured, top), "command": command(), "machine": machine()}
        report[name] = row
        show(title, row, ledger, top)
        if trace:
            keep_trace(program, ledger.points, trace, name)
    for file in also:
        report = {**json.loads(file.read_text())["sides"], **report}
    report = {name: report[name] for name in SIDES if name in report}
    if picture:
        plot(report, f"{settings.name}, {batch} × {seq} tokens, bfloat16, steady step", picture)
    result = {"settings": {**described(settings), "fake": fake}, "sides": report}
    text = re.sub(r"\[[\s\d,]+\]", lambda found: " ".join(found[0].split()), json.dumps(result, indent=2))
    write_whole(out / f"live-bytes-{settings.name}.json", text + "\n")


if __name__ == "__main__":
    typer.run(main)
