"""Which generated kernels spill registers, for storage formats in every role: compiled for GPUs that need not be there.

    .venv/bin/python benchmarks/format_spills.py --presets 60m,7b --targets sm_80,sm_90,sm_100

A combination is a weight's, a projector's and the moments' format on one preset and one chip; together they have every
format as a weight's and as a projector's, and every kind of moments.  For each the step of two layers is
traced and its kernels are compiled, tiles chosen by their machine code as on a GPU (`kernels/triton/looked_at.py`).
Takes a minute or more a combination, on one core.

Writes a line to `results/format-spills.csv` when a combination is done and leaves out those that are there, so that it
may be stopped and started again; `--again` computes them anew.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from common import RESULTS, write_whole
from rich.console import Console

from qgalore_compile.kernels.triton.ahead import CompileError
from qgalore_compile.kernels.triton.kernels import Kernel
from qgalore_compile.kernels.triton.looked_at import compiled, spills
from qgalore_compile.kernels.triton.targets import Target
from qgalore_compile.training.ahead_of_time import LAYERS, name_of, traced


class Formats(NamedTuple):
    """Of a weight, a projector and moments."""

    weight: str
    projector: str
    moments: str


FORMATS = (
    Formats("nf4/64+double", "e4m3/128", "4bit"),
    Formats("e4m3/128", "nf4/64", "e5m2/128"),
    Formats("int6/128", "int4/128+pow2", "e4m3/128+pow2"),
    Formats("e2m1/32", "e2m3/32", "4bit"),
    Formats("e3m2/32", "e3m0/32", "bfloat16"),
    Formats("int4/128+rotated", "int4/128+pow2row", "4bit"),
    Formats("e5m2/128+pow2", "nf4/64+double", "8bit"),
    Formats("e2m3/32", "e5m2/128", "32bit"),
    Formats("e3m0/32", "int6/128", "8bit"),
    Formats("int8/256", "e2m1/32", "4bit"),
    Formats("int4/128", "e3m2/32", "e2m3/32"),
    Formats("nf4/64", "int8/256", "nf4/64"),
)
PROJECTED = 7
"""Weights of a layer with a projector: each has one write-back where its update is fused."""


@dataclass(frozen=True)
class Row:
    """What became of one combination.

    Attributes:
        target, preset, weight, projector, moments: the combination.
        kernels: of a step, each counted once.
        spilling: those that keep values in memory.
        refused: those that do not compile.
        unfused: projected weights of the layers traced whose update has no write-back kernel.
        passed: tiles that were compiled and left for others, because they spill.
        registers: of a thread, the most of any kernel.
        worst: the kernel that spills most and its bytes a thread, or "".
        seconds: of tracing and compiling; less where kernels were in the cache.
    """

    target: str
    preset: str
    weight: str
    projector: str
    moments: str
    kernels: int
    spilling: int
    refused: int
    unfused: int
    passed: int
    registers: int
    worst: str
    seconds: int

    @property
    def combination(self) -> tuple[str, str, Formats]:
        return self.target, self.preset, Formats(self.weight, self.projector, self.moments)


def row(target: str, preset: str, formats: Formats) -> Row:
    """Trace and compile one combination."""
    started, chip = time.monotonic(), Target.named(target)
    torch._dynamo.reset()
    keys = {"projector_format": formats.projector, "moments": formats.moments}
    kernels = traced(preset, chip, torch.bfloat16, weight_format=formats.weight, keys=keys, look=True)
    registers, spilled, refused = [0], dict[str, int](), 0
    for kernel in kernels:
        try:
            binary = compiled(kernel, chip)
        except CompileError:
            refused += 1
            continue
        registers.append(binary.registers)
        if count := spills(binary):
            spilled[f"{name_of(kernel)} in {kernel.blocks}"] = count
    worst = max(spilled, key=lambda name: spilled[name], default="")
    return Row(
        target,
        preset,
        *formats,
        kernels=len(kernels),
        spilling=len(spilled),
        refused=refused,
        unfused=PROJECTED * LAYERS - sum(calls for kernel, calls in kernels.items() if _writes_back(kernel)),
        passed=sum(len(kernel.passed) for kernel in kernels),
        registers=max(registers),
        worst=worst and f"{worst}: {spilled[worst]}",
        seconds=round(time.monotonic() - started),
    )


def _writes_back(kernel: Kernel) -> bool:
    return name_of(kernel).endswith("write-back")


def read(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(**{each.name: int(found[each.name]) if each.type == "int" else found[each.name]  # type: ignore[arg-type]
                   for each in fields(Row)})
            for found in csv.DictReader(file)
        ]  # fmt: skip


def write(path: Path, rows: Iterable[Row]) -> None:
    """The table as a whole, so that a run that is stopped leaves a whole one."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, [each.name for each in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    write_whole(path, text.getvalue())


def missing(rows: Sequence[Row], targets: Sequence[str], presets: Sequence[str]) -> list[tuple[str, str, Formats]]:
    """Combinations without a row; those that come first have all formats and presets, on one chip or another."""
    there = {each.combination for each in rows}
    wanted = (
        (targets[(turn + place + index) % len(targets)], preset, formats)
        for turn in range(len(targets))
        for place, formats in enumerate(FORMATS)
        for index, preset in enumerate(presets)
    )
    return [each for each in wanted if each not in there]


def main(
    presets: Annotated[str, typer.Option(help="By comma.")] = "60m,7b",
    targets: Annotated[str, typer.Option(help="By comma.")] = "sm_80,sm_90,sm_100",
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS / "format-spills.csv",
    again: Annotated[bool, typer.Option(help="Compute what is there anew.")] = False,
) -> None:
    console = Console()
    rows = read(out)
    wanted = missing([] if again else rows, targets.split(","), presets.split(","))
    for target, preset, formats in wanted:
        console.print(f"{preset} on {target}: {', '.join(formats)}")
        found = row(target, preset, formats)
        rows = [*(each for each in rows if each.combination != found.combination), found]
        write(out, rows)
        console.print(f"  {found.kernels} kernels, {found.spilling} spill, {found.registers} registers")


if __name__ == "__main__":
    typer.run(main)
