"""Seconds from the first call of a training step to its loss: with an empty cache, and in a second process.

    .venv/bin/python benchmarks/compile_time.py --preset 60m

Each measurement is a process of its own.  The first one of a side has an empty cache of compiled code; the second one
finds what the first has left there, as the next run of a user's program does.  Its share of the first counts the step
itself and all that no cache saves: tracing, the passes' analysis where Inductor asks for its key, loading.  Sides as in
`train_step.py`.  Writes `results/compile-time-<preset>.json`.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from common import RESULTS, Batch, Layers, Preset, Seq, Sides, last_line, machine, write_result
from rich.console import Console
from rich.table import Table
from train_step import SIDES, Settings, build, chosen, compile_step, set_due, timed


def first_call(side: str, settings: Settings) -> float:
    """Seconds of the first call in this process, without a refresh."""
    plain, schedules = build(SIDES[side], settings)
    step = compile_step(plain, SIDES[side])
    set_due(schedules, False)
    return timed(step, settings.tokens(0))


def main(
    preset: Preset = "60m",
    layers: Layers = None,
    batch: Batch = 4,
    seq: Seq = 256,
    sides: Sides = "inductor,qgalore",
    rounds: Annotated[int, typer.Option(help="Pairs of processes a side, interleaved.", min=1)] = 1,
    one: Annotated[str, typer.Option(help="Print the seconds of this side's first call, and nothing else.")] = "",
) -> None:
    settings = Settings(preset, layers, batch, seq)
    if one:
        print(first_call(one, settings))
        return
    arguments = ["--preset", preset, "--batch", str(batch), "--seq", str(seq)]
    arguments += ["--layers", str(layers)] if layers else []
    found: dict[str, list[dict[str, float]]] = {side: [] for side in chosen(sides)}
    for _ in range(rounds):
        for side, pairs in found.items():
            with TemporaryDirectory() as folder:
                cold, warm = (float(last_line(__file__, [*arguments, "--one", side], folder)) for _ in range(2))
            pairs.append({"cold_s": cold, "warm_s": warm, "share": warm / cold})
            print(f"{SIDES[side].title}: {cold:.1f} s, then {warm:.1f} s ({warm / cold:.2f})", flush=True)
    table = Table("side", "empty cache, s", "second process, s", "share")
    for side, pairs in found.items():
        forms = {"cold_s": ".1f", "warm_s": ".1f", "share": ".2f"}
        columns = [" ".join(f"{pair[key]:{form}}" for pair in pairs) for key, form in forms.items()]
        table.add_row(SIDES[side].title, *columns)
    Console().print(table)
    result = {"machine": machine(), "settings": {"preset": preset, "batch": batch, "seq": seq}, "sides": found}
    write_result(RESULTS / f"compile-time-{settings.name}.json", result)


if __name__ == "__main__":
    typer.run(main)
