"""What a steady step calls from Python, and how long it takes outside of kernels and products.

    .venv/bin/python benchmarks/launches.py                         # tiny, and SmolLM2-135M's sizes with 4 layers
    .venv/bin/python benchmarks/launches.py --models tiny,60m,deep-30

*Calls* are those that Python makes of functions of its own and of C's during one step, as ``sys.setprofile`` sees them.
*Time outside* is the processor's time of a step whose kernels, products and library functions are replayed: they return
what they returned in the step before, and do nothing.  What is left is Python, dispatch, views and memory, on warm
caches.  Both hold on a machine that has other work.

The steps are those of `train_step.py` (presets) and `deep_model.py` ("deep-30": 30 layers), in which nothing is due.
Writes `results/launches.json`; before and after a change is one file of each revision.
"""

from __future__ import annotations

import gc
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from common import RESULTS, WARM_UP, Out, Rounds, cell, machine, spread, training_step, write_result
from deep_model import BATCH, SEQ, make_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.codecache import PyCodeCache
from train_step import NEVER, SIDES, Settings, build, compile_step, set_due

import qgalore_compile as qg
from qgalore_compile.kernels.cpp import launch as cpu

Run = Callable[[int], Any]
KINDS = ("kernels", "products", "library")
"""What is replayed: generated kernels, Inductor's and ours; matrix products; attention, sorting and the like."""


# -- steps ------------------------------------------------------------------------------------------------------------


def make(model: str, float32: bool) -> tuple[Run, list[Tensor]]:
    """A model's compiled step, which takes the number of its tokens, and the schedules of its projected weights."""
    if model.startswith("deep-"):
        return _deep(int(model.removeprefix("deep-")), float32)
    settings = Settings(model, None, 4, 256)
    plain, schedules = build(SIDES["qgalore"], settings)
    step = compile_step(plain, SIDES["qgalore"])
    return lambda index: step(*settings.tokens(index)).item(), schedules


def _deep(layers: int, float32: bool) -> tuple[Run, list[Tensor]]:
    model = make_model(layers, torch.float32 if float32 else torch.bfloat16)
    qg.quantize_(model)
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=144, update_proj_gap=NEVER), lr=1e-4)
    step = torch.compile(
        training_step(lambda tokens: model(input_ids=tokens, labels=tokens).loss, opt),
        backend="qgalore",
        fullgraph=True,
    )

    def run(index: int) -> float:
        tokens = torch.randint(49_152, (BATCH, SEQ), generator=torch.Generator().manual_seed(index))
        return float(step(tokens))

    return run, [state["schedule"] for state in opt.state.values() if "schedule" in state]


# -- in place of kernels and products ---------------------------------------------------------------------------------


class Replay:
    """Stands in for functions: a first step records what each call returns, further ones return it and do nothing."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.calls: Counter[str] = Counter()
        self._next: Iterator[Any] | None = None
        self._inside = False

    def of(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The stand-in of a function."""

        def recording(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a library's function that calls another
                return call(*args, **kwargs)
            if self._next is not None:
                return next(self._next)
            self._inside = True
            try:
                result = call(*args, **kwargs)
            finally:
                self._inside = False
            self.results.append(result)
            self.calls[kind] += 1
            return result

        return recording

    def rewind(self) -> None:
        """Before each step that does nothing."""
        self._next = iter(self.results)


class _Replaying:
    """An object whose attributes, called, are replayed."""

    def __init__(self, of: Any, replay: Replay, kind: str) -> None:
        self._of, self._replay, self._kind = of, replay, kind

    def __getattr__(self, name: str) -> Any:
        found = self._replay.of(self._kind, getattr(self._of, name))
        setattr(self, name, found)
        return found


@contextmanager
def replaying(replay: Replay) -> Iterator[None]:
    """Replay every kernel, product and function of the library that compiled steps call."""
    with _undone() as put:
        for module in PyCodeCache.modules:
            for name, held in list(vars(module).items()):
                if name.startswith("cpp_fused"):
                    put(vars(module).__setitem__, name, held, replay.of("kernels", held))
                elif name == "extern_kernels":
                    put(vars(module).__setitem__, name, held, _Replaying(held, replay, "products"))
        for kernel in (each for each in gc.get_objects() if type(each) is cpu.Kernel):
            put(vars(kernel).__setitem__, "_run", kernel._run, replay.of("kernels", kernel._run))
        put(partial(setattr, torch), "mm", torch.mm, replay.of("products", torch.mm))
        for packet, name in _library():
            held = getattr(packet, name)
            put(partial(setattr, packet), name, held, replay.of("library", held))
        yield


@contextmanager
def _undone() -> Iterator[Callable[..., None]]:
    done: list[tuple[Callable[[str, Any], None], str, Any]] = []

    def put(write: Callable[[str, Any], None], name: str, old: Any, new: Any) -> None:
        done.append((write, name, old))
        write(name, new)

    try:
        yield put
    finally:
        for write, name, old in reversed(done):
            write(name, old)


def _library() -> list[tuple[Any, str]]:
    """(packet, overload) of the operators in generated code that are neither ours nor views."""
    found = set()
    for module in PyCodeCache.modules:
        with open(module.__file__) as file:
            found |= set(re.findall(r"torch\.ops\.(aten|qgalore)\.(\w+)\.(\w+)\(", file.read()))
    kept = [each for each in found if each[0] == "aten" or each[1] == "sum_rows"]
    return [(getattr(getattr(torch.ops, space), name), overload) for space, name, overload in kept]


# -- counting ---------------------------------------------------------------------------------------------------------


def calls_of(run: Callable[[], Any]) -> dict[str, Any]:
    """What Python calls while ``run`` runs: how many functions of its own, how many of C's, and which of these most."""
    python, c = Counter[str](), Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            python[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            c[getattr(argument, "__qualname__", str(argument))] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {
        "python": python.total(),
        "c": c.total(),
        "most_python": dict(python.most_common(12)),
        "most_c": dict(c.most_common(12)),
    }


def measure(model: str, rounds: int, float32: bool) -> dict[str, Any]:
    """Of one model."""
    run, schedules = make(model, float32)
    set_due(schedules, False)
    run(0)
    set_due(schedules, True)
    run(1)
    for index in range(3):
        run(index)
    counted = calls_of(lambda: run(2))
    replay = Replay()
    with replaying(replay):
        run(2)
        outside = []
        for _ in range(WARM_UP + rounds):
            replay.rewind()
            started = time.process_time()
            run(2)
            outside.append(1e3 * (time.process_time() - started))
    return {
        "projected": len(schedules),
        "calls": counted,
        "replayed": dict(replay.calls),
        "outside_ms": spread(outside[WARM_UP:]),
    }


def main(
    models: Annotated[str, typer.Option(help="Presets, or deep-<layers>, by comma.")] = "tiny,deep-4",
    rounds: Rounds = 200,
    float32: Annotated[bool, typer.Option(help="Weights of the deep models in float32.")] = False,
    out: Out = RESULTS,
) -> None:
    found = {}
    table = Table("model", "calls: Python's", "C's", "kernels", "products", "library", "ms outside: median (p10-p90)")
    for model in models.split(","):
        row = found[model] = measure(model, rounds, float32)
        counts = (row["calls"]["python"], row["calls"]["c"], *(row["replayed"][kind] for kind in KINDS))
        table.add_row(model, *map(str, counts), cell(row["outside_ms"], ".2f"))
        torch._dynamo.reset()
    Console().print(table)
    write_result(out / "launches.json", {"machine": machine(), "float32": float32, "models": found})


if __name__ == "__main__":
    typer.run(main)
