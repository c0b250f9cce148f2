"""Tokens per second of a steady training step: forward, backward, update and clearing of gradients in one graph.

    .venv/bin/python benchmarks/train_step.py --preset 60m --rounds 21

Three sides, with weights and activations in bfloat16:

- "adamw": plain Llama, torch's own AdamW (moments in bfloat16, as `torch.optim.AdamW` would keep them), Inductor;
- "inductor": INT8 weights and `QGaLoreAdamW` with its defaults at the preset's rank, Inductor;
- "qgalore": the same, backend "qgalore".

All run in one process, interleaved: a round is one step of each, on the same tokens, and ratios are taken within a
round.  Steady means that nothing is compiled and no subspace is refreshed.  Each side compiles from an empty cache, in
a first call without a refresh; the refresh of all layers is the second call and reported apart.  Writes
`results/train-step-<preset>.json` and prints a table.

AdamW is `torch.optim.adamw.adamw`, the function below `torch.optim.AdamW.step`: the method itself does not trace within
a step, neither as it is (its profiling wrapper breaks the graph) nor unwrapped ("pending mutation on parameter").
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch._dynamo
import typer
from backends import RESULTS, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.optim.adamw import adamw

import qgalore_compile as qg
from qgalore_compile.subspace.scheduler import Schedule
from qgalore_compile.training.llama import Llama, LlamaConfig, find_preset, move_
from qgalore_compile.training.run import compiled_graphs

WARM_UP = 3
NEVER = 10**9  # as update_proj_gap: no refresh but the one that is asked for
Step = Callable[[Tensor, Tensor], Tensor]


class Side(NamedTuple):
    title: str
    quantised: bool
    backend: str


SIDES = {
    "adamw": Side("AdamW, inductor", False, "inductor"),
    "inductor": Side("QGaLoreAdamW, inductor", True, "inductor"),
    "qgalore": Side("QGaLoreAdamW, qgalore", True, "qgalore"),
}


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

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(tokens, targets)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step, [state["schedule"] for state in opt.state.values() if "schedule" in state]


def compile_step(step: Step, side: Side) -> Step:
    # Backend "qgalore" brings it along; Inductor does not, and Dynamo would break the graph at backward().
    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(step, backend=side.backend, fullgraph=True)


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


def spread(values: list[float]) -> dict[str, float]:
    """Median, first and last decile, smallest and largest."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    ends = {"p10": deciles[0], "p90": deciles[-1], "min": min(values), "max": max(values)}
    return {"median": statistics.median(values), **ends}


def main(
    preset: Annotated[str, typer.Option(help="Model and rank.")] = "60m",
    layers: Annotated[int | None, typer.Option(help="Layers, in place of the preset's.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 4,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=2)] = 21,
    sides: Annotated[str, typer.Option(help="Sides, by comma.")] = ",".join(SIDES),
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = RESULTS,
) -> None:
    settings = Settings(preset, layers, batch, seq)
    names = chosen(sides)
    with fresh_cache():  # what the first compilation of a process pays, whichever side it is
        torch.compile(lambda x: x.sin() + 1)(torch.ones(100))
    steps: dict[str, Step] = {}
    schedules: dict[str, list[Tensor]] = {}
    report: dict[str, dict[str, Any]] = {}
    for name in names:
        plain, schedules[name] = build(SIDES[name], settings)
        steps[name] = compile_step(plain, SIDES[name])
        set_due(schedules[name], False)
        graphs = compiled_graphs()
        with fresh_cache():  # each side compiles from nothing: they share kernels
            first = timed(steps[name], settings.tokens(0))
        set_due(schedules[name], True)
        second = timed(steps[name], settings.tokens(1))
        report[name] = {"title": SIDES[name].title, "graphs": compiled_graphs() - graphs}
        report[name] |= {"first_call_s": first, "second_call_s": second}
        print(f"{SIDES[name].title}: first call {first:.1f} s, second {second:.2f} s", flush=True)
    all_schedules = [schedule for name in names for schedule in schedules[name]]
    graphs = compiled_graphs()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(WARM_UP + rounds):
        tokens = settings.tokens(2 + index)
        for name in names:
            seconds[name].append(timed(steps[name], tokens))
    seconds = {name: values[WARM_UP:] for name, values in seconds.items()}
    if any(Schedule.from_tensor(each).refreshes != 1 for each in all_schedules) or compiled_graphs() != graphs:
        raise RuntimeError("a timed step refreshed a subspace or compiled a graph: these are no steady steps")

    table = Table("side", "ms a step: median (p10-p90)", "tokens/s", "ms ÷ qgalore's", "compile, s", "graphs")
    for name in names:
        row = report[name]
        row["ms"] = spread([1e3 * value for value in seconds[name]])
        median_s = row["ms"]["median"] / 1e3
        row["tokens_per_second"] = batch * seq / median_s
        row["compile_s"] = row["first_call_s"] - median_s
        row["refresh_s"] = max(0.0, row["second_call_s"] - median_s) if schedules[name] else None
        ratio = "–"
        if "qgalore" in names:
            row["time_to_qgalore"] = spread([a / c for a, c in zip(seconds[name], seconds["qgalore"], strict=True)])
            ratio = "{median:.3f} ({p10:.3f}-{p90:.3f})".format(**row["time_to_qgalore"])
        times = "{median:.1f} ({p10:.1f}-{p90:.1f})".format(**row["ms"])
        rate = f"{row['tokens_per_second']:,.0f}"
        table.add_row(name, times, rate, ratio, f"{row['compile_s']:.1f}", str(row["graphs"]))
    Console().print(table)
    described = {**dataclasses.asdict(settings), "model": dataclasses.asdict(settings.model), "dtype": "bfloat16"}
    result = {
        "settings": described | {"rank": find_preset(preset).rank, "rounds": rounds, "warm_up": WARM_UP},
        "machine": machine(),
        "command": shlex.join(["benchmarks/train_step.py", *sys.argv[1:]]),
        "sides": report,
    }
    out.mkdir(exist_ok=True, parents=True)
    (out / f"train-step-{settings.name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
