"""Attacks on the files of `qgalore train`: damaged checkpoints, killed processes, two runs in one folder.

    python benchmarks/run_attacks.py --corruptions 2000 --kills 40

Runs of two tiny blocks, eager, so that each takes seconds. Prints what was tried and what came of it, and exits with 1
if anything was loaded wrong, ended in a traceback, changed a model after an error, lost a line or resumed inexactly.

- Corruptions: one damaged copy of a checkpoint after another is loaded into a live run, whose whole state is compared
  before and after; every twentieth is tried with the command, too, which must say a line and leave every file alone.
- Kills: SIGKILL and SIGTERM at random times of a run, a quarter of them while the metrics are being rewritten; then the
  run is continued to its end and compared with one that nothing disturbed, metrics and state, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import run_attacks_corruptions
import torch
from common import parser_of
from run_attacks_corruptions import corruptions
from run_attacks_runs import STEPS, arguments_of, command, config_of, ended, outcome, start

from qgalore_compile.training.checkpoint_file import load_checkpoint
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.telemetry import read_metrics

FAILURES = {
    "kills": ("LINES LOST", "METRICS DIFFER", "STATE DIFFERS", "DOES NOT GO ON", "ANOTHER STATUS", "LEFT BEHIND"),
    "two runs in one folder": ("SECOND RUN NOT REFUSED", "FIRST RUN DISTURBED"),
    "corruptions": run_attacks_corruptions.FAILURES,
}


# -- kills -----------------------------------------------------------------------------------------------------------


def kills(folder: Path, count: int, rewriting: int, seed: int = 0) -> Counter[str]:
    """Kill `count` runs, `rewriting` of them while metrics are rewritten, and continue each; what came of them."""
    draw, found = random.Random(seed), Counter[str]()
    whole = config_of(folder, "whole", steps=STEPS)
    started = time.perf_counter()
    status, said = command(arguments_of(whole))
    seconds = time.perf_counter() - started
    assert status in (0, 1), said
    reference = outcome(whole)
    print(f"an undisturbed run of {STEPS} steps takes {seconds:.1f} s", flush=True)
    half = config_of(folder, "half", steps=STEPS // 2)
    assert command(arguments_of(half))[0] in (0, 1)
    said_by = folder / "said"
    while found["killed"] < count:
        again = found["killed while metrics are rewritten"] < rewriting
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        config = config_of(folder, "killed", steps=STEPS)
        shutil.rmtree(config.out, ignore_errors=True)
        if again:
            number = signal.SIGKILL
            child = _start_rewriting(half, config, said_by)
            if child is None:
                found["came too late for the rewriting"] += 1
                continue
            time.sleep(draw.random() * 0.02)
        else:
            child = start(arguments_of(config), said_by)
            # by steps, not by the clock alone: on a busy machine a run ends long before the time that one took
            _wait_for_lines(Path(config.out, "metrics.jsonl"), draw.randrange(STEPS), child)
            time.sleep(draw.random() * 2 * seconds / STEPS)
        os.kill(_pid(child), number)
        status, partial = ended(child), _partial(config)
        if again and not any(name.startswith(".metrics") for name in partial):
            found["came too late for the rewriting"] += 1
            continue
        if status in (0, 1):
            found["came too late"] += 1
            continue
        found["killed"] += 1
        found[f"by {number.name}, status {status}"] += 1
        found["killed while metrics are rewritten"] += again
        found["killed while a file was half written"] += bool(partial)
        if number == signal.SIGTERM and status != 143:
            found["ANOTHER STATUS"] += 1
            print(said_by.read_text(), file=sys.stderr)
        found += _continued(config, _of_two_halves(folder, half) if again else reference)
    return +found


def _start_rewriting(half: TrainConfig, config: TrainConfig, said_by: Path) -> BaseProcess | None:
    """A run that goes on from `half` and is rewriting its metrics; None if that was not seen before it ended."""
    _with_long_lines(Path(half.out), Path(config.out))
    # the settings of the whole run, so that the rest of it is the same
    child = start([*arguments_of(config, resume=True), "--steps", str(STEPS)], said_by)
    if _wait_for_rewriting(Path(config.out), child):
        return child
    ended(child)
    return None


def _partial(config: TrainConfig) -> list[str]:
    """Names of half written files in the run's folder."""
    return [name for name in os.listdir(config.out) if ".partial" in name] if Path(config.out).exists() else []


def _continued(config: TrainConfig, expected: tuple[list[Any], str]) -> Counter[str]:
    """What a killed run has lost, and what comes of it when it goes on to its end, where `expected` should come."""
    found = Counter({"LINES LOST": _lost_lines(config)})
    has_checkpoint = Path(config.out, "checkpoint.pt").exists()
    found["before the first checkpoint"] += not has_checkpoint
    more = ["--steps", str(STEPS)] if has_checkpoint else []
    status, said = command([*arguments_of(config, resume=has_checkpoint), *more])
    if status not in (0, 1):
        found["DOES NOT GO ON"] += 1
        print(said, file=sys.stderr)
        return found
    metrics, state = outcome(config)
    found["METRICS DIFFER"] += metrics != expected[0]
    found["STATE DIFFERS"] += state != expected[1]
    found["resumed exactly"] += (metrics, state) == expected
    found["LEFT BEHIND"] += bool(_partial(config))
    return found


def _with_long_lines(half: Path, folder: Path) -> None:
    """The run in `half`, its lines padded so that rewriting them takes a while."""
    shutil.copytree(half, folder)
    path = folder / "metrics.jsonl"
    padded = [json.dumps({**json.loads(line), "note": "x" * 2_000_000}) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{line}\n" for line in padded))


_halves: dict[Path, tuple[list[Any], str]] = {}


def _of_two_halves(folder: Path, half: TrainConfig) -> tuple[list[Any], str]:
    """What the half run comes to when it goes on undisturbed: its learning rate fell earlier than the whole one's."""
    if folder not in _halves:
        config = config_of(folder, "halves", steps=STEPS)
        shutil.copytree(half.out, config.out)
        assert command([*arguments_of(config, resume=True), "--steps", str(STEPS)])[0] in (0, 1)
        _halves[folder] = outcome(config)
    return _halves[folder]


def _pid(child: BaseProcess) -> int:
    assert child.pid is not None  # it has been started
    return child.pid


def _wait_for_lines(path: Path, count: int, child: BaseProcess) -> None:
    while child.is_alive():
        if not count or (path.exists() and path.read_bytes().count(b"\n") >= count):
            return
        time.sleep(0.001)


def _wait_for_rewriting(folder: Path, child: BaseProcess) -> bool:
    """Whether the new metrics' file was seen before the child ended."""
    while child.is_alive():
        if any(name.startswith(".metrics") for name in os.listdir(folder)):
            return True
        time.sleep(0.0005)
    return False


def _lost_lines(config: TrainConfig) -> int:
    """Steps up to the checkpoint's of which no line tells, now that the process is dead."""
    path = Path(config.out, "checkpoint.pt")
    if not path.exists():
        return 0
    last = load_checkpoint(path)["step"]
    have = {record["step"] for record in read_metrics(Path(config.out, "metrics.jsonl"))}
    return len(set(range(1, last + 1)) - have)


def two_runs(folder: Path) -> Counter[str]:
    """A second run in the folder of one that is running, five times."""
    found: Counter[str] = Counter()
    config = config_of(folder, "one", steps=STEPS)
    child = start(arguments_of(config), folder / "first")
    while not Path(config.out, "checkpoint.pt").exists():
        time.sleep(0.01)
    os.kill(_pid(child), signal.SIGSTOP)  # so that it is there for as long as that takes
    for resume in (True, False) * 2 + (True,):
        status, said = command(arguments_of(config, resume=resume))
        right = status == 2 and f"is in use: process {child.pid} on " in said
        found["second runs refused, naming the first" if right else "SECOND RUN NOT REFUSED"] += 1
    os.kill(_pid(child), signal.SIGCONT)
    found["FIRST RUN DISTURBED"] += ended(child) not in (0, 1) or len(outcome(config)[0]) != STEPS
    return +found


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--corruptions", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        attacks: list[tuple[str, Callable[[], Counter[str]]]] = [
            ("kills", lambda: kills(Path(folder), given.kills, given.kills // 4, given.seed)),
            ("two runs in one folder", lambda: two_runs(Path(folder))),
            ("corruptions", lambda: corruptions(Path(folder), given.corruptions, given.seed)),
        ]
        for name, attack in attacks:
            print(f"\n{name}", flush=True)
            found = attack()
            for what in [*(what for what in found if what not in FAILURES[name]), *FAILURES[name]]:
                print(f"  {found[what]:6,d}  {what}", flush=True)
            failed = failed or any(found[what] for what in FAILURES[name])
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
