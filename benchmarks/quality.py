"""The study of quality: losses of Q-GaLore beside AdamW's and GaLore's on real text, and what each part is worth.

    .venv/bin/python benchmarks/quality.py --list
    .venv/bin/python benchmarks/quality.py                       # whatever is missing, about three hours on two cores
    .venv/bin/python benchmarks/quality.py --only 'tiny-*' --budget-minutes 60
    .venv/bin/python benchmarks/quality.py --report

The corpus is the source of the Python standard library, as in `qgalore train`; all cases see the same batches of it and
are judged by the same held-out bytes.  What is run, and in which order, `quality_plan.py` says; `quality_run.py` is one
run.  Each is a process of its own, with a result of its own under `results/quality/`.  Ctrl-C, or the end of the
budget, loses nothing but the run in progress, which goes on from its checkpoint: give the same command again.
Compiled code is kept beside the checkpoints, in `runs/quality/`, so that runs of one case compile once.

`--report` reads the results alone and writes tables and figures beside them; a full pass ends with it.  `--quick` tries
every piece out on a model of no size, eagerly, into a folder that it throws away; its numbers mean nothing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import quality_run
import typer
from quality_plan import NANO, Plan, Planned, RunSpec
from quality_report import write_report
from quality_run import FOLDER, WORK
from rich.console import Console
from rich.table import Table

from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.llama import PRESETS

HERE = Path(__file__).parent
INTERRUPTED = 130
Execute = Callable[[RunSpec], int]


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Every result in the folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-lr*-seed*.json"))]


def run_apart(spec: RunSpec, folder: Path, work: Path, threads: int) -> int:
    """The run in a process of its own; its exit status.  What it prints goes to a log in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    cache = str((work / "inductor").resolve())  # torch has put its own choice into this process's environment
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(threads)}
    options = {"scale": spec.scale.name, "case": spec.case.name, "lr": f"{spec.lr:g}", "seed": str(spec.seed)}
    options |= {"folder": str(folder), "work": str(work)}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(HERE / "quality_run.py"), *words]
    with (work / f"{spec.name}.log").open("w") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode


def carry_out(
    load: Callable[[], Plan], execute: Execute, console: Console, *, only: str = "*", budget: float | None = None
) -> list[str]:
    """Run what is pending, planning anew after each run, for a search's results decide what comes next.

    Args:
        load: the plan of the results there are.
        execute: one run; its exit status.
        console: for a line a run.
        only: pattern of the names of runs; others wait.
        budget: minutes; no run is begun that is expected to end later.

    Returns:
        Names of runs that failed; the others go on without them.
    """
    began, failed = time.monotonic(), list[str]()
    while True:
        plan = load()
        pending = [each.spec for each in plan if each.pending and fnmatch(each.spec.name, only)]
        pending = [spec for spec in pending if spec.name not in failed]
        left = math.inf if budget is None else budget - (time.monotonic() - began) / 60
        fitting = [spec for spec in pending if plan.minutes(spec) <= left]
        if not fitting:
            if pending:
                console.print(f"{len(pending)} run(s) left for another time: the budget is used up")
            return failed
        spec, started = fitting[0], time.monotonic()
        status = execute(spec)
        minutes = (time.monotonic() - started) / 60
        said = f"exit status {status}, see its log"
        if status == 0:
            result = load().result(spec)
            assert result is not None  # status 0: it was written
            said = f"{result['val_loss'] or float('nan'):.4f} nats per byte"
        else:
            failed.append(spec.name)
        console.print(f"{spec.name}: {said}; {minutes:.1f} min; {len(pending) - 1} known run(s) left", highlight=False)


def show(plan: Plan, console: Console, only: str = "*") -> None:
    """The plan as a table, with what is done and how many minutes the rest is expected to take."""
    table = Table("stage", "run", "state", "min", title="runs in order; lrbest: the search has yet to find the rate")
    left, compiled = 0.0, set[tuple[str, str]]()
    for each in plan:
        if not fnmatch(each.spec.name, only):
            continue
        minutes = ""
        if each.result is None and each.skipped is None:
            place = (each.spec.scale.name, each.spec.case.name)
            expected = plan.minutes(each.spec, warm=place in compiled)
            compiled.add(place)
            left, minutes = left + expected, f"{expected:.1f}"
        table.add_row(each.stage, each.spec.name, _state(each), minutes)
    console.print(table)
    console.print(f"left: about {left:.0f} minutes ({left / 60:.1f} h), if no search goes beyond its three rates")


def _state(each: Planned) -> str:
    if each.skipped is not None:
        return f"left out: {each.skipped}"
    if each.result is None:
        return "to do"
    loss = each.result["val_loss"]
    return "diverged" if loss is None else f"{loss:.4f}"


def try_out(console: Console, only: str) -> int:
    """The plan in this process, but for one run apart, and the report, in a folder of its own; the exit status."""
    PRESETS.setdefault("nano", NANO)
    corpus = load_corpus()
    with tempfile.TemporaryDirectory() as name:
        folder, work = Path(name, "results"), Path(name, "work")

        def plan() -> Plan:
            return Plan(load_results(folder), ["quick"])

        def execute(spec: RunSpec) -> int:
            if not folder.exists():
                return run_apart(spec, folder, work, 1)
            quality_run.train(spec, corpus, folder=folder, work=work)
            return 0

        failed = carry_out(plan, execute, console, only=only)
        for path in write_report(plan(), folder):
            console.print(f"{path.name}: {path.stat().st_size:,} bytes", highlight=False)
    return int(bool(failed))


def main(
    show_plan: Annotated[bool, typer.Option("--list", help="Show the plan and its minutes, and run nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write tables and figures, and run nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Try every piece out; keeps nothing.")] = False,
    only: Annotated[str, typer.Option(help="Pattern of the names of runs, as in --list.")] = "*",
    budget_minutes: Annotated[float | None, typer.Option(help="Begin no run that would end later.")] = None,
    scales: Annotated[str, typer.Option(help="By comma.")] = "tiny,35m",
    threads: Annotated[int, typer.Option(help="Of each run.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = FOLDER,
) -> None:
    """Exit status: 0, 1 a run failed, 130 stopped by Ctrl-C."""
    console = Console(width=None if sys.stdout.isatty() else 140)

    def plan() -> Plan:
        return Plan(load_results(out), scales.split(","))

    if quick:
        raise typer.Exit(try_out(console, only))
    if show_plan:
        show(plan(), console, only)
        return
    failed = []
    if not report:
        try:
            execute = partial(run_apart, folder=out, work=WORK, threads=threads)
            failed = carry_out(plan, execute, console, only=only, budget=budget_minutes)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
            raise typer.Exit(INTERRUPTED) from None
    for path in write_report(plan(), out):
        console.print(str(path), highlight=False)
    raise typer.Exit(int(bool(failed)))


if __name__ == "__main__":
    typer.run(main)
