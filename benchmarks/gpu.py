"""All figures of a GPU by one command: is it right, and if so, how fast, and how close to what the device can do.

    .venv/bin/python benchmarks/gpu.py --preset 350m --rounds 21

1. Correctness (`gpu_checks.py`): random bits bit for bit, updates and INT8 products against eager PyTorch on the same
   device.  If anything is off, it is listed, nothing is measured or written, and the exit status is 1.
2. Ceilings: bytes a second of a large copy, operations a second of large products in bfloat16, TF32 and float32, beside
   the data sheet's peaks.
3. Update of one weight: the sides of `update_step.py`, the GPU's time with a cold L2 cache and the host's time to queue
   it, by round; the write-back kernel's bytes a second beside the copy's.
4. A whole step of a preset, the sides of `train_step.py`: whether steps that are replayed as a CUDA graph end where
   launched ones do; each side alone for compile time and peak memory, with a step in which every subspace is
   refreshed; then all of them interleaved by round, with CUDA graphs and without.
5. Each generated kernel of that step: its median launch, and its floor, which is the longer of its bytes and its
   operations at the ceilings measured above.

Writes `results/gpu-<device>.csv`, one row a figure: section, what, side, value, unit, low, high.  Low and high are the
first and last decile; in section "correctness", high is what is allowed.  Exit status 2: no GPU.

`--device cpu --quick --out FILE` tries the script where there is none: tiny sizes, times of no meaning.
"""

from __future__ import annotations

import gc
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import torch
import torch._dynamo
import typer
from common import RESULTS, Rounds, cell, one_of, ratios
from gpu_checks import CASES, QUICK, findings
from gpu_measure import (
    Ceiling,
    Clock,
    Results,
    Row,
    as_measured,
    ceilings,
    chip_of,
    device_name,
    facts,
    launches,
    slug,
    watched,
    writes_back,
)
from rich.console import Console
from rich.table import Table
from torch._inductor.utils import clear_caches
from train_step import ALL, SIDES, Settings, Step, build, compile_step, rounds_of, set_due, timed
from update_step import SHAPES, sides_of

import qgalore_compile as qg
from qgalore_compile.kernels.triton.kernels import Kernel
from qgalore_compile.kernels.triton.targets import Target
from qgalore_compile.training.ahead_of_time import floor, name_of, what

OTHERS = ["inductor", "baseline", "bitsandbytes", "torchao", "galore-torch"]
QUICK_SHAPES = ((48, 256, 16),)
STEADY = 3  # steps whose peak memory is taken
FOLLOWED = 12  # steps that are compared, replayed and launched


def sides(bench: Bench) -> list[str]:
    """The sides of a whole step: with CUDA graphs where there is a GPU."""
    return [*ALL.split(","), *(["graphs"] if bench.gpu else [])]


@dataclass
class Bench:
    """What all sections share."""

    results: Results
    clock: Clock
    rounds: int
    chip: Target | None
    console: Console

    @property
    def gpu(self) -> bool:
        return self.clock.device.type == "cuda"

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


# -- 1, 2: correctness, ceilings --------------------------------------------------------------------------------------


def check(bench: Bench, *, quick: bool) -> bool:
    """Whether all checks hold."""
    wrong = 0
    with bench.console.status("correctness") as status:
        for each in findings(QUICK if quick else CASES, bench.clock.device, bench.say):
            status.update(f"correctness: {each.what}")
            row = Row("correctness", each.what, each.measure, float(each.value), "", None, float(each.limit))
            bench.results.rows.append(row)
            if not each.ok:
                wrong += 1
                bench.say(f"WRONG  {each.what}, {each.measure}: {each.value:.3g}, allowed is {each.limit:.3g}")
    bench.say(f"correctness: {len(bench.results.rows)} comparisons, {wrong} wrong")
    return not wrong


def measure_ceilings(bench: Bench, *, quick: bool) -> dict[str, Ceiling]:
    found = ceilings(bench.clock, bench.chip, bench.rounds, quick=quick)
    name = f"peak of {bench.chip.chip}" if bench.chip else "peak"
    table = Table("", "measured: median (p10-p90)", name, "share", title="Ceilings")
    for key, ceiling in found.items():
        row = bench.results.spread("ceilings", key, "measured", ceiling.values, ceiling.unit)
        cells = ["–", "–"]
        if ceiling.peak is not None:
            bench.results.add("ceilings", key, name, ceiling.peak, ceiling.unit)
            cells = [f"{ceiling.peak:.3g}", f"{row['median'] / ceiling.peak:.2f}"]
        table.add_row(f"{key}, {ceiling.unit}", cell(row, ".3g"), *cells)
    bench.console.print(table)
    return found


# -- 3: one weight ----------------------------------------------------------------------------------------------------


def measure_updates(bench: Bench, shapes: tuple[tuple[int, int, int], ...], copy: float) -> None:
    """Every side's update of one weight, by shape; `copy` is the copies' bytes a second."""
    table = Table("weight, rank", "side", "ms: median (p10-p90)", "host, ms", "÷ gemms", "÷ qgalore", title="Updates")
    for m, n, rank in shapes:
        subject = f"{m}x{n} rank {rank}"
        with watched() as kernels:
            sides = sides_of(m, n, rank, OTHERS, str(bench.clock.device))
        if "baseline" not in sides:
            bench.say(f"{subject}: baseline is left out, whose groups of 256 do not divide a row")
        times = bench.clock.rounds(sides, bench.rounds)
        for name, (device, host) in times.items():
            cells = [cell(bench.results.spread("update", subject, name, device, "ms"), ".3f")]
            cells.append(f"{bench.results.spread('update', subject, name, host, 'host ms')['median']:.3f}")
            for other in ("gemms", "qgalore"):
                relative = ratios(device, times[other].device)
                cells.append(cell(bench.results.spread("update", subject, name, relative, f"÷ {other}"), ".2f"))
            table.add_row(subject, name, *cells)
        if bench.gpu:
            _write_back(bench, subject, kernels, launches(sides["qgalore"], bench.rounds, bench.clock.flush), copy)
        del sides
        _free()
    bench.console.print(table)
    if not bench.gpu:
        bench.say("left out on a CPU: the write-back kernel's bytes a second")


def _write_back(
    bench: Bench, subject: str, kernels: dict[str, Kernel], times: dict[str, list[float]], copy: float
) -> None:
    assert bench.chip is not None  # or no kernel would have been made
    for name, kernel in kernels.items():
        if not writes_back(kernel) or name not in times:
            continue
        least = floor(kernel, bench.chip).least
        rates = [1e6 * least / micros for micros in times[name]]
        found = bench.results.spread("update", subject, "write-back kernel", rates, "bytes/s")
        share = found["median"] / copy
        bench.results.add("update", subject, "write-back kernel", share, "÷ copy")
        bench.say(f"{subject}: the write-back kernel moves {found['median']:.3g} bytes/s, {share:.2f} of a copy's")


# -- 4, 5: the whole step, its kernels --------------------------------------------------------------------------------


def measure_steps(bench: Bench, settings: Settings, measured: dict[str, Ceiling]) -> None:
    """Replayed steps beside launched ones, each side alone, then all of them by round."""
    if bench.gpu:
        _follow(bench, settings)
        _free()
    else:
        bench.say("left out on a CPU: CUDA graphs")
    with tempfile.TemporaryDirectory() as folder:
        for name in sides(bench):
            try:
                with caches_in(Path(folder, name)):
                    _alone(bench, settings, name, measured)
            except torch.OutOfMemoryError as error:
                bench.say(f"{name}, {settings.name}: {str(error).splitlines()[0]}")
                bench.results.add("step", settings.name, name, "out of memory")
            _free()
            bench.results.write()
        try:
            _interleaved(bench, settings, Path(folder))
        except torch.OutOfMemoryError as error:
            bench.say(f"no times by round, all sides do not fit at once: {str(error).splitlines()[0]}")
    _free()


def _follow(bench: Bench, settings: Settings) -> None:
    """Losses of the same steps, launched and replayed, with a refresh of all subspaces half way.

    Told, and no error: what a kernel adds up atomically differs from run to run."""
    losses = {}
    for name in ("qgalore", "graphs"):
        plain, schedules = build(SIDES[name], settings)
        step = compile_step(plain, SIDES[name])
        losses[name] = []
        for index in range(FOLLOWED):
            set_due(schedules, index in (0, FOLLOWED // 2))
            losses[name].append(step(*settings.tokens(index)).item())
    told = qg.report(step).compilations[-1].cuda_graphs
    bench.say(str(told))
    apart = [abs(a - b) for a, b in zip(losses["qgalore"], losses["graphs"], strict=True)]
    bench.results.add("step", f"{settings.name}: replayed losses that equal launched ones", "graphs", apart.count(0.0))
    bench.results.add("step", f"{settings.name}: a replayed loss is off by at most", "graphs", max(apart), "nats")
    bench.results.add("step", f"{settings.name}: steps replayed", "graphs", told.replays if told else 0)
    bench.say(
        f"of {FOLLOWED} steps {apart.count(0.0)} losses are equal, launched and replayed; at most {max(apart):.3g} off"
    )


def _alone(bench: Bench, settings: Settings, name: str, measured: dict[str, Ceiling]) -> None:
    """Compile time, peak memory and a refresh of one side; of "qgalore" its kernels too."""

    def add(what: str, value: float, unit: str) -> None:
        bench.results.add("step", f"{settings.name}: {what}", name, value, unit)
        bench.say(f"{SIDES[name].title}: {what} {value:.4g} {unit}")

    before = torch.cuda.memory_allocated() if bench.gpu else 0
    plain, schedules = build(SIDES[name], settings)
    step = compile_step(plain, SIDES[name])
    set_due(schedules, False)
    with watched() as kernels:
        first = timed(step, settings.tokens(0))
    steady = median(timed(step, settings.tokens(1 + index)) for index in range(STEADY))
    add("compile time", first - steady, "s")
    if bench.gpu:
        add("resident memory", (torch.cuda.memory_allocated() - before) / 2**20, "MiB")
        torch.cuda.reset_peak_memory_stats()
        for index in range(STEADY):
            timed(step, settings.tokens(1 + index))
        add("peak memory", (torch.cuda.max_memory_allocated() - before) / 2**20, "MiB")
        torch.cuda.reset_peak_memory_stats()
    if schedules:
        set_due(schedules, True)
        add("step that refreshes all subspaces", timed(step, settings.tokens(1)), "s")
        if bench.gpu:
            add("reserved memory", torch.cuda.memory_reserved() / 2**20, "MiB")
            add("peak memory with a refresh", (torch.cuda.max_memory_allocated() - before) / 2**20, "MiB")
    if not bench.gpu:
        bench.say("left out on a CPU: memory, kernels")
    elif name == "qgalore":
        tokens = settings.tokens(1)
        _kernels(bench, settings, kernels, launches(lambda: step(*tokens), STEADY), measured)


def _kernels(
    bench: Bench,
    settings: Settings,
    kernels: dict[str, Kernel],
    times: dict[str, list[float]],
    measured: dict[str, Ceiling],
) -> None:
    """Each generated kernel's launches beside their floor, and what all other kernels take together."""
    assert bench.chip is not None  # or no kernel would have been made
    chip = as_measured(bench.chip, measured)
    table = Table(
        "kernel",
        "what",
        "launches a step",
        "µs: median (p10-p90)",
        "floor, µs",
        "÷ floor",
        "ms a step",
        title=f"Generated kernels of a step of {settings.name}",
    )
    for name, kernel in kernels.items():
        if not (found := times.pop(name, [])):
            bench.say(f"{name} is not in the profile")
            continue
        subject = f"{settings.name}: {name} {name_of(kernel)}, {what(kernel)}"
        row = bench.results.spread("kernels", subject, "qgalore", found, "µs")
        count, total = len(found) / STEADY, sum(found) / STEADY / 1e3
        bench.results.add("kernels", subject, "qgalore", count, "launches a step")
        bench.results.add("kernels", subject, "qgalore", total, "ms a step")
        bound = floor(kernel, chip)
        bench.results.add("kernels", subject, f"floor by {bound.limit}", 1e6 * bound.seconds, "µs")
        cells = [f"{1e6 * bound.seconds:.1f} ({bound.limit})", f"{row['median'] / 1e6 / bound.seconds:.2f}"]
        table.add_row(name_of(kernel), what(kernel), f"{count:g}", cell(row, ".1f"), *cells, f"{total:.3f}")
    bench.console.print(table)
    rest = sum(map(sum, times.values())) / STEADY / 1e3
    bench.results.add("kernels", f"{settings.name}: all other kernels", "qgalore", rest, "ms a step")
    bench.say(f"all other kernels, libraries' and Inductor's: {rest:.3f} ms a step; the longest:")
    for name, found in sorted(times.items(), key=lambda item: -sum(item[1]))[:10]:
        bench.results.add("kernels", f"{settings.name}: {name}", "qgalore", sum(found) / STEADY / 1e3, "ms a step")
        bench.say(f"  {sum(found) / STEADY / 1e3:.3f} ms, {len(found) / STEADY:g} launches: {name}")


def _interleaved(bench: Bench, settings: Settings, folder: Path) -> None:
    """Wall-clock time of a step, up to its loss, of all sides by round."""
    steps: dict[str, Step] = {}
    for name in sides(bench):
        plain, schedules = build(SIDES[name], settings)
        steps[name] = compile_step(plain, SIDES[name])
        set_due(schedules, False)
        with caches_in(folder / name), watched():  # filled by the side alone, under equal settings
            timed(steps[name], settings.tokens(0))
    seconds = rounds_of(steps, settings, bench.rounds)
    table = Table(
        "side", "ms a step: median (p10-p90)", "tokens/s", "ms ÷ qgalore's", title=f"Steps of {settings.name}"
    )
    for name, values in seconds.items():
        row = bench.results.spread("step", settings.name, name, [1e3 * each for each in values], "ms")
        rates = [settings.batch * settings.seq / each for each in values]
        rate = bench.results.spread("step", settings.name, name, rates, "tokens/s")
        relative = ratios(values, seconds["qgalore"])
        ratio = bench.results.spread("step", settings.name, name, relative, "÷ qgalore")
        table.add_row(SIDES[name].title, cell(row, ".2f"), f"{rate['median']:,.0f}", cell(ratio, ".3f"))
    bench.console.print(table)


@contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """Let Inductor and Triton keep in a folder what they compile: empty at first, and warm when it is used again."""
    names = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    with mock.patch.dict(os.environ, names):
        clear_caches()
        yield
    clear_caches()


def _free() -> None:
    """Let go of what was compiled, and of the tensors it holds."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _shapes(text: str, quick: bool) -> tuple[tuple[int, int, int], ...]:
    """ "512x1376x128,…" as (m, n, rank)."""
    if not text:
        return QUICK_SHAPES if quick else SHAPES
    try:
        found: Any = tuple(tuple(map(int, each.split("x"))) for each in text.split(","))
    except ValueError:
        found = ((),)
    if any(len(each) != 3 for each in found):
        raise typer.BadParameter(f"a shape is rows x columns x rank, as in 512x1376x128; got {text!r}")
    return found  # type: ignore[no-any-return]


def main(
    shapes: Annotated[str, typer.Option(help="Weights as ROWSxCOLUMNSxRANK, by comma. [default: four]")] = "",
    preset: Annotated[str, typer.Option(help="Of the whole step. [default: 350m; with --quick tiny]")] = "",
    batch: Annotated[int, typer.Option(help="Sequences of a step. [default: 16; with --quick 2]")] = 0,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence. [default: 256; with --quick 32]")] = 0,
    rounds: Rounds = 21,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, …, or cpu to try the script.")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, one layer: does everything run?")] = False,
    out: Annotated[Path | None, typer.Option(help="The CSV file. [default: results/gpu-<device>.csv]")] = None,
) -> None:
    """Exit status: 0 measured, 1 a result is wrong and nothing is measured, 2 no such device or a wrong option."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise typer.BadParameter(f"a device is cuda, cuda:1, … or cpu, got {device!r}")
    if (chosen := one_of(device)) is None:
        typer.echo(f"there is no device {device!r}: this benchmark is for GPUs; to try it without one:", err=True)
        typer.echo("--device cpu --quick --out FILE", err=True)
        raise typer.Exit(2)
    weights = _shapes(shapes, quick)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        out = out or RESULTS / f"gpu-{slug(device_name(chosen))}.csv"
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    bench = Bench(Results(out), Clock(chosen), rounds, chip_of(chosen), console)
    if not check(bench, quick=quick):
        raise typer.Exit(1)
    for name, value in facts(chosen).items():
        bench.results.add("machine", name, "", value)
        bench.say(f"{name}: {value}")
    measured = measure_ceilings(bench, quick=quick)
    bench.results.write()
    measure_updates(bench, weights, median(measured["copy"].values))
    bench.results.write()
    settings = Settings(
        preset or ("tiny" if quick else "350m"),
        1 if quick else None,
        batch or (2 if quick else 16),
        seq or (32 if quick else 256),
        device=str(chosen),
    )
    measure_steps(bench, settings, measured)
    bench.results.write()
    console.print(f"written to {out}" if out else "nothing is written on a CPU without --out")


if __name__ == "__main__":
    typer.run(main)
