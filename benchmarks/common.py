"""What the benchmarks share: options, the machine, timing by round, results' files.

A figure is measured as README.md says: all sides by round, warm-up rounds dropped, ratios taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._inductor.utils import fresh_cache
from torch.optim import Optimizer

from qgalore_compile.files import replacing

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
"""Rounds that are run before those that count."""

Side = TypeVar("Side")
Value = TypeVar("Value")

# -- options ----------------------------------------------------------------------------------------------------------

Preset = Annotated[str, typer.Option(help="Model and rank.")]
Layers = Annotated[int | None, typer.Option(help="Layers, in place of the preset's.")]
Batch = Annotated[int, typer.Option(help="Sequences of a step.")]
Seq = Annotated[int, typer.Option(help="Tokens of a sequence.")]
Rounds = Annotated[int, typer.Option(help="Timed rounds.", min=2)]
Sides = Annotated[str, typer.Option(help="Sides, by comma.")]
Out = Annotated[Path, typer.Option(help="Folder of the result.")]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that a script's docstring describes, by its first line."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])


def one_of(device: str) -> torch.device | None:
    """The device of that name ("cuda" for the first GPU), or None where there is no such GPU."""
    chosen = torch.device("cuda:0" if device == "cuda" else device)
    missing = chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()
    return None if missing else chosen


# -- what a figure depends on -----------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What a figure depends on beside the code: CPU and threads, versions, commit, date."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def commit(tree: Path | None = None) -> str:
    """The short hash that a checkout stands at, by default the current folder's; empty where there is none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False).stdout.strip()


def command() -> str:
    """The command line that this process was started with, from the repository's root."""
    return shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def process_bytes(name: str) -> int:
    """A figure of /proc/self/status, in bytes: VmRSS is what is resident, VmHWM what was at most."""
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let VmHWM start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


# -- steps ------------------------------------------------------------------------------------------------------------


def compile_something() -> None:
    """What the first compilation of a process pays, whichever side it is."""
    with fresh_cache():
        torch.compile(lambda x: x.sin() + 1)(torch.ones(100))


def training_step(model: Callable[..., Tensor], opt: Optimizer) -> Callable[..., Tensor]:
    """Forward, backward, update, clearing of gradients; its arguments are the model's, which returns the loss."""

    def step(*batch: Tensor) -> Tensor:
        loss: Tensor = model(*batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step


def compile_whole(
    step: Callable[..., Tensor], backend: str, options: Mapping[str, Any] | None = None
) -> Callable[..., Tensor]:
    """A step whose backward is in its graph, under any backend."""
    compiled = torch.compile(step, backend=backend, fullgraph=True, options=None if options is None else dict(options))
    if backend == "qgalore":
        return compiled

    def patched(*batch: Tensor) -> Tensor:
        # Without it Dynamo breaks the graph at backward().  Backend "qgalore" brings it along, and Inductor does not.
        with dynamo_config.patch(trace_autograd_ops=True):
            return compiled(*batch)

    return patched


def last_line(script: str, arguments: Sequence[str], cache: str | Path) -> str:
    """The last line that a script prints, in a process of its own with that folder as its cache of compiled code."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


# -- time -------------------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of the wall clock that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(
    sides: Mapping[Side, Callable[[int], Value]], rounds: int, warm_up: int = WARM_UP
) -> dict[Side, list[Value]]:
    """What each side measures in each round, so that a drift of the machine hits every side.

    Args:
        sides: called once a round with the round's number, from 0; each returns its measurement.
        rounds: that count.
        warm_up: rounds before them, whose measurements are dropped.
    """
    found: dict[Side, list[Value]] = {side: [] for side in sides}
    for index in range(warm_up + rounds):
        for side, measure in sides.items():
            found[side].append(measure(index))
    return {side: values[warm_up:] for side, values in found.items()}


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Value by other, round by round."""
    return [value / other for value, other in zip(values, others, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, first and last decile, smallest and largest."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    ends = {"p10": deciles[0], "p90": deciles[-1], "min": min(values), "max": max(values)}
    return {"median": statistics.median(values), **ends}


def cell(row: dict[str, float], form: str, low: str = "p10", high: str = "p90") -> str:
    """A spread in a table: median (first decile-last decile), each in the format ``form``."""
    return f"{row['median']:{form}} ({row[low]:{form}}-{row[high]:{form}})"


# -- results ----------------------------------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it holds either what it did or all of ``text``, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def write_result(path: Path, result: Mapping[str, Any], indent: int = 2) -> None:
    """Write a result as JSON, its folder made where it is missing."""
    write_whole(path, json.dumps(result, indent=indent) + "\n")
