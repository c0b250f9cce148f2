"""Tokens per second of a steady training step: forward, backward, update and clearing of gradients in one graph.

    .venv/bin/python benchmarks/train_step.py --preset 60m --rounds 21

Sides, with weights and activations in bfloat16:

- "adamw": plain Llama, torch's own AdamW (moments in bfloat16, as `torch.optim.AdamW` would keep them), Inductor;
- "inductor": INT8 weights and `QGaLoreAdamW` with its defaults at the preset's rank, Inductor;
- "qgalore": the same, backend "qgalore";
- "flat": the same without `outline`, by which equal layers are compiled once;
- "graphs": "qgalore" with the option `cudagraphs`; on a GPU alone.

All run in one process, interleaved: a round is one step of each, on the same tokens, and ratios are taken within a
round.  Steady means that nothing is compiled and no subspace is refreshed.  Each side compiles from an empty cache, in
a first call without a refresh; the refresh of all layers is the second call and reported apart.  Writes
`results/train-step-<preset>.json` and prints a table.

AdamW is `torch.optim.adamw.adamw`, the function below `torch.optim.AdamW.step`: the method itself does not trace within
a step, neither as it is (its profiling wrapper breaks the graph) nor unwrapped ("pending mutation on parameter").
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import typer
from common import (
    RESULTS,
    WARM_UP,
    Batch,
    Layers,
    Out,
    Preset,
    Rounds,
    Seq,
    Sides,
    cell,
    command,
    compile_something,
    compile_whole,
    interleaved,
    machine,
    ratios,
    spread,
    training_step,
    write_result,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.optim.adamw import adamw

import qgalore_compile as qg
from qgalore_compile.subspace.scheduler import Schedule
from qgalore_compile.training.llama import Llama, LlamaConfig, find_preset, move_
from qgalore_compile.training.run import compiled_graphs

NEVER = 10**9  # as update_proj_gap: no refresh but the one that is asked for
Step = Callable[[Tensor, Tensor], Tensor]


class Side(NamedTuple):
    title: str
    quantised: bool
    backend: str
    options: dict[str, Any] | None = None


SIDES = {
    "adamw": Side("AdamW, inductor", False, "inductor"),
    "inductor": Side("QGaLoreAdamW, inductor", True, "inductor"),
    "qgalore": Side("QGaLoreAdamW, qgalore", True, "qgalore"),
    "flat": Side("QGaLoreAdamW, qgalore, not outlined", True, "qgalore", {"outline": False}),
    "graphs": Side("QGaLoreAdamW, qgalore, CUDA graphs", True, "qgalore", {"cudagraphs": True}),
}
ALL = "adamw,inductor,qgalore"


@dataclass(frozen=True)
class Settings:
    """What all sides share; `layers` None for as many as the preset has."""

    preset: str
    layers: int | None
    batch: int
    seq: int
    seed: int = 0
    device: str = "cpu"

    @property
    def model(self) -> LlamaConfig:
        config = find_preset(self.preset).model
        return dataclasses.replace(config, num_layers=self.layers or config.num_layers)

    @property
    def name(self) -> str:
        """The preset, and the number of layers where that is not the preset's: for names of files."""
        return self.preset if self.layers is None else f"{self.preset}-{self.layers}layers"

    def tokens(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of round `index`, the same for every side."""
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(self.model.vocab_size, (self.batch, self.seq + 1), generator=generator)
        words = words.to(self.device)
        return words[:, :-1].contiguous(), words[:, 1:].contiguous()


def chosen(sides: str) -> list[str]:
    """The names in `sides`, by comma."""
    names = sides.split(",")
    if unknown := [name for name in names if name not in SIDES]:
        raise typer.BadParameter(f"no side is called {unknown[0]!r}; choose from {', '.join(SIDES)}")
    return names


def build(side: Side, settings: Settings) -> tuple[Step, list[Tensor]]:
    """The side's step, not compiled yet, and the schedules of its projected weights."""
    torch.manual_seed(settings.seed)
    # not model.to(): benchmarks/live_bytes.py builds under a FakeTensorMode
    model = move_(Llama(settings.model), torch.bfloat16, settings.device)
    return (_build_qgalore if side.quantised else _build_adamw)(model, settings)


def _build_adamw(model: nn.Module, settings: Settings) -> tuple[Step, list[Tensor]]:
    parameters = list(model.parameters())
    exp_avgs = [torch.zeros_like(p) for p in parameters]
    exp_avg_sqs = [torch.zeros_like(p) for p in parameters]
    steps = [torch.zeros((), device=settings.device) for _ in parameters]
    lr = find_preset(settings.preset).adamw_lr
    # On CPUs single tensors: the foreach variant does not trace there, and a compiler has no use for it.  On a GPU
    # foreach, which Inductor makes few kernels of, with step counts that live there.
    gpu = settings.device != "cpu"
    constants: dict[str, Any] = dict(
        foreach=gpu,
        capturable=gpu,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=lr,
        weight_decay=0.0,
        eps=1e-8,
        maximize=False,
    )

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(tokens, targets)
        loss.backward()
        with torch.no_grad():
            adamw(parameters, [p.grad for p in parameters], exp_avgs, exp_avg_sqs, [], steps, **constants)
        for p in parameters:
            p.grad = None
        return loss.detach()

    return step, []


def _build_qgalore(model: nn.Module, settings: Settings) -> tuple[Step, list[Tensor]]:
    preset = find_preset(settings.preset)
    qg.quantize_(model)
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=preset.rank, update_proj_gap=NEVER), lr=preset.lr)
    return training_step(model, opt), [state["schedule"] for state in opt.state.values() if "schedule" in state]


def compile_step(step: Step, side: Side) -> Step:
    return compile_whole(step, side.backend, side.options)


def set_due(schedules: list[Tensor], due: bool) -> None:
    """Whether the next step refreshes every subspace."""
    for schedule in schedules:
        state = Schedule.from_tensor(schedule)
        turn = state.clock if due else NEVER
        schedule.copy_(dataclasses.replace(state, slot=-1, next=turn).to_tensor())  # no slot: all in one step


def timed(step: Step, tokens: tuple[Tensor, Tensor]) -> float:
    """Seconds of one call, up to its loss."""
    started = time.perf_counter()
    loss = step(*tokens).item()
    seconds = time.perf_counter() - started
    if not loss < float("inf"):
        raise RuntimeError(f"the loss is {loss}: times of such steps mean nothing")
    return seconds


def first_calls(side: Side, settings: Settings) -> tuple[Step, list[Tensor], dict[str, Any]]:
    """The side's compiled step, its schedules, and what its first two calls took: one compiles, one refreshes."""
    plain, schedules = build(side, settings)
    step = compile_step(plain, side)
    set_due(schedules, False)
    graphs = compiled_graphs()
    with fresh_cache():  # each side compiles from nothing: they share kernels
        first = timed(step, settings.tokens(0))
    set_due(schedules, True)
    second = timed(step, settings.tokens(1))
    print(f"{side.title}: first call {first:.1f} s, second {second:.2f} s", flush=True)
    row = {"title": side.title, "graphs": compiled_graphs() - graphs, "first_call_s": first, "second_call_s": second}
    return step, schedules, row


def rounds_of(steps: dict[str, Step], settings: Settings, rounds: int, first: int = 0) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round's tokens are those of ``first`` plus its number."""

    def measure(step: Step, index: int) -> float:
        return timed(step, settings.tokens(first + index))

    return interleaved({name: partial(measure, step) for name, step in steps.items()}, rounds)


def described(settings: Settings) -> dict[str, Any]:
    """The settings in a result."""
    return {**dataclasses.asdict(settings), "model": dataclasses.asdict(settings.model), "dtype": "bfloat16"}


def main(
    preset: Preset = "60m",
    layers: Layers = None,
    batch: Batch = 4,
    seq: Seq = 256,
    rounds: Rounds = 21,
    sides: Sides = ALL,
    out: Out = RESULTS,
) -> None:
    settings = Settings(preset, layers, batch, seq)
    compile_something()
    steps: dict[str, Step] = {}
    schedules: dict[str, list[Tensor]] = {}
    report: dict[str, dict[str, Any]] = {}
    for name in chosen(sides):
        steps[name], schedules[name], report[name] = first_calls(SIDES[name], settings)
    graphs = compiled_graphs()
    seconds = rounds_of(steps, settings, rounds, first=2)
    refreshes = {Schedule.from_tensor(each).refreshes for side in schedules.values() for each in side}
    if refreshes - {1} or compiled_graphs() != graphs:
        raise RuntimeError("a timed step refreshed a subspace or compiled a graph: these are no steady steps")

    table = Table("side", "ms a step: median (p10-p90)", "tokens/s", "ms ÷ qgalore's", "compile, s", "graphs")
    for name, row in report.items():
        row["ms"] = spread([1e3 * value for value in seconds[name]])
        median_s = row["ms"]["median"] / 1e3
        row["tokens_per_second"] = batch * seq / median_s
        row["compile_s"] = row["first_call_s"] - median_s
        row["refresh_s"] = max(0.0, row["second_call_s"] - median_s) if schedules[name] else None
        ratio = "–"
        if "qgalore" in seconds:
            row["time_to_qgalore"] = spread(ratios(seconds[name], seconds["qgalore"]))
            ratio = cell(row["time_to_qgalore"], ".3f")
        rate = f"{row['tokens_per_second']:,.0f}"
        table.add_row(name, cell(row["ms"], ".1f"), rate, ratio, f"{row['compile_s']:.1f}", str(row["graphs"]))
    Console().print(table)
    rank = find_preset(preset).rank
    result = {
        "settings": described(settings) | {"rank": rank, "rounds": rounds, "warm_up": WARM_UP},
        "machine": machine(),
        "command": command(),
        "sides": report,
    }
    write_result(out / f"train-step-{settings.name}.json", result)


if __name__ == "__main__":
    typer.run(main)
