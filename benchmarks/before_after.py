"""A whole training step of two checkouts of this project, in turns: first call, refresh, steady steps.

    .venv/bin/python benchmarks/before_after.py --before ../earlier --preset 60m --layers 4 --rounds 21

Two versions of one package do not fit one process, so each checkout has a process of its own, made with its own
environment (`.venv`) and its own `train_step.py`.  Both are built first; then a round is one step of each, and the one
that does not step waits for a line on its standard input.  Ratios are taken within a round.  Compilation is timed in
turns too, from an empty cache, in as many processes as `--compilations` says.  Writes `results/before-after.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def serve(tree: str, preset: str, layers: int) -> None:
    """Build and compile the step of this checkout, then time a step for every line that comes in."""
    sys.path.insert(0, f"{tree}/benchmarks")
    import torch
    from torch._inductor.utils import fresh_cache
    from train_step import SIDES, Settings, build, compile_step, set_due, timed

    def say(**record: Any) -> None:
        print(json.dumps(record), flush=True)

    settings = Settings(preset, layers or None, 4, 256)
    with fresh_cache():  # what the first compilation of a process pays
        torch.compile(lambda x: x.sin() + 1)(torch.ones(100))
    plain, schedules = build(SIDES["qgalore"], settings)
    step = compile_step(plain, SIDES["qgalore"])
    set_due(schedules, False)
    say(ready=True)
    sys.stdin.readline()
    with fresh_cache():
        say(first_call=timed(step, settings.tokens(0)))
    set_due(schedules, True)
    sys.stdin.readline()
    say(refresh=timed(step, settings.tokens(1)))
    for index, _ in enumerate(sys.stdin):
        say(step=timed(step, settings.tokens(2 + index)))


class Side:
    """A checkout's process."""

    def __init__(self, tree: Path, preset: str, layers: int) -> None:
        command = [f"{tree}/.venv/bin/python", __file__, "--serve", str(tree), preset, str(layers)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                record: dict[str, Any] = json.loads(line)
                return record
        raise RuntimeError(f"the process ended with {self._process.wait()}")

    def next(self) -> float:
        """Seconds of what comes next: the first call, the refresh, a step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        (seconds,) = self._read().values()
        return float(seconds)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run(before: Path, preset: str, layers: int, rounds: int, compilations: int) -> dict[str, Any]:
    # not above: a process that serves another checkout has that one's file of this name
    from common import WARM_UP, command, commit, machine, ratios, spread

    trees = {"before": before.resolve(), "after": ROOT}
    record: dict[str, Any] = {
        name: {"commit": commit(tree), "first_call": [], "refresh": []} for name, tree in trees.items()
    }
    sides: dict[str, Side] = {}
    for again in range(compilations):
        for side in sides.values():
            side.close()
        sides = {name: Side(tree, preset, layers) for name, tree in trees.items()}
        for what in ("first_call", "refresh"):
            for name in list(sides)[:: -1 if again % 2 else 1]:  # no side is always the first
                record[name][what].append(sides[name].next())
                print(name, what, f"{record[name][what][-1]:.2f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(WARM_UP + rounds):
        for name in list(sides)[:: -1 if index % 2 else 1]:
            seconds[name].append(sides[name].next())
    for name, side in sides.items():
        side.close()
        record[name]["step"] = spread(seconds[name][WARM_UP:])
    relative = spread(ratios(seconds["after"][WARM_UP:], seconds["before"][WARM_UP:]))
    settings = {"preset": preset, "layers": layers, "rounds": rounds}
    return {**settings, **record, "after ÷ before": relative, "machine": machine(), "command": command()}


def main() -> None:
    from common import parser_of, write_result

    parser = parser_of(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="folder of the other checkout, with its own .venv")
    parser.add_argument("--preset", default="60m")
    parser.add_argument("--layers", type=int, default=0, help="in place of the preset's")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--compilations", type=int, default=3)
    given = parser.parse_args()
    result = run(given.before, given.preset, given.layers, given.rounds, given.compilations)
    write_result(ROOT / "benchmarks/results/before-after.json", result, indent=1)
    for name in ("before", "after", "after ÷ before"):
        print(name, result[name])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
