"""The tuned comparison: every method at its own best rates, loss against bytes.

    .venv/bin/python benchmarks/frontier.py --list
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/frontier.py --settings tiny-2k                # whatever is missing
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/frontier.py --settings tiny-2k --share 2/2    # beside it
    .venv/bin/python benchmarks/frontier.py --report

Which runs there are, `frontier_plan.py` says; rules that are no part of the optimizer are in `rules.py` and `whole.py`.
The corpus is the source of the Python standard library, as in `qgalore train`.  Forward and backward are compiled by
Inductor, once a process and model, and optimizers step eagerly, in float32; a step of ours without accumulation is
compiled as a whole.  A result is written when its run ends: stop at any time, and give the same command again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, machine, write_result
from frontier_plan import METHODS, SETTINGS, Plan, Rates, Result, RunSpec, Setting, stored_bytes
from frontier_report import write_report
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import qgalore_compile as qg
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import Corpus, load_corpus, training_batch
from qgalore_compile.training.run import evaluate, make_model
from qgalore_compile.weights import select_linears

FOLDER = RESULTS / "frontier"


def config_of(setting: Setting, seed: int) -> TrainConfig:
    """Model, data and schedule of a setting."""
    return TrainConfig.from_preset(
        setting.preset,
        optimizer="galore",
        backend="eager",
        steps=setting.steps,
        batch=setting.batch,
        seq=setting.seq,
        accumulate=setting.accumulate,
        seed=seed,
    )


def make_optimizer(model: nn.Module, spec: RunSpec) -> Optimizer:
    """The method's optimizer over all parameters; betas (0.9, 0.999), eps 1e-8 and no decay for all alike."""
    method, rates, setting = spec.method, spec.rates, spec.setting
    blocks = [linear.weight for _, linear in select_linears(model)]
    inside = {id(weight) for weight in blocks}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    pair: list[dict[str, Any]] = [{"params": blocks, "lr": rates.blocks}, {"params": others, "lr": rates.plain}]
    if method.optimizer == "adamw":
        return torch.optim.AdamW(pair, lr=rates.blocks, weight_decay=0.0, fused=True)
    if method.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(pair, lr=rates.blocks, weight_decay=0.0)
    if method.optimizer == "whole":
        from whole import Whole

        pair[0].update(method.keys)
        return Whole(pair, lr=rates.blocks, seed=spec.seed)
    pair[0]["rank"] = method.rank(setting)
    if method.optimizer == "rules":
        from rules import Rules

        pair[0].update(gap=setting.gap, **method.keys)
        return Rules(pair, lr=rates.blocks, seed=spec.seed)
    pair[0]["update_proj_gap"] = setting.gap
    if method.optimizer == "galore-torch":
        from galore_torch import GaLoreAdamW

        pair[0].update(scale=0.25, proj_type="std")
        return GaLoreAdamW(pair, lr=rates.blocks, eps=1e-8, no_deprecation_warning=True)
    pair[0].update(method.keys)
    return qg.QGaLoreAdamW(pair, lr=rates.blocks, moments=method.moments, nonfinite="skip_parameter")


class Trainer:
    """One model, compiled once, that is trained again and again from its first weights."""

    def __init__(self, setting: Setting, corpus: Corpus) -> None:
        self.setting, self.corpus = setting, corpus
        self.model = make_model(config_of(setting, 0))
        self._loss = torch.compile(_loss_of(self.model, setting))

    def run(self, spec: RunSpec) -> Result:
        """Train, evaluate, and say what came of it."""
        started, setting = time.perf_counter(), self.setting
        config = config_of(setting, spec.seed)
        quantised = spec.method.optimizer == "ours"
        model = make_model(config)
        if quantised:
            qg.quantize_(model)  # INT8 weights: another model, which steps eagerly
        else:
            self.model.load_state_dict(model.state_dict())
            self.model.zero_grad()
            model = self.model
        loss = _loss_of(model, setting) if quantised else self._loss
        optimizer = make_optimizer(model, spec)
        scheduler = LambdaLR(optimizer, config.learning_rate_factor)
        whole = _whole_step(loss, optimizer) if quantised and setting.accumulate == 1 else None
        for step in range(setting.steps):
            for inputs, targets in self._batches(spec.seed, step):
                if whole is not None:
                    each = whole(inputs, targets)
                else:
                    each = loss(inputs, targets) / setting.accumulate
                    each.backward()
            if not math.isfinite(float(each.detach())):
                break
            if whole is None:
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
        found = evaluate(model, self.corpus.validation, replace(config, eval_tokens=setting.final_tokens))
        shapes = [(linear.weight.shape[0], linear.weight.shape[1]) for _, linear in select_linears(model)]
        plain = sum(p.numel() for p in model.parameters()) - sum(m * n for m, n in shapes)
        return {
            "setting": setting.name,
            "method": spec.method.name,
            "rates": list(spec.rates),
            "seed": spec.seed,
            "steps": setting.steps,
            "tokens": setting.tokens,
            "val_loss": found if math.isfinite(found) else None,
            "bytes": stored_bytes(spec.method, setting, shapes, plain),
            "seconds": round(time.perf_counter() - started, 1),
            "machine": machine(),
        }

    def _batches(self, seed: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        setting = self.setting
        inputs, targets = training_batch(
            self.corpus.train, seed=seed, step=step, batch=setting.accumulate * setting.batch, seq=setting.seq
        )
        yield from zip(inputs.split(setting.batch), targets.split(setting.batch), strict=True)


def _loss_of(model: nn.Module, setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
    """The forward pass, in the setting's dtype."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
            found: Tensor = model(inputs, targets)
        return found

    return loss


def _whole_step(
    forward: Callable[[Tensor, Tensor], Tensor], optimizer: Optimizer
) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of ours as users compile it."""
    torch._dynamo.reset()

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = forward(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return torch.compile(step, backend="qgalore")


# -- the study ---------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Result]:
    """Every result, by the name of its run."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        for result in json.loads(path.read_text()):
            rates = Rates(*result["rates"])
            spec = RunSpec(SETTINGS[result["setting"]], METHODS[result["method"]], rates, result["seed"])
            results[spec.name] = result
    return results


def keep(folder: Path, result: Result) -> None:
    """Put a result into the file of its setting and method, in order of rates and seeds."""
    path = folder / f"{result['setting']}-{result['method']}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    key = (result["rates"], result["seed"])
    rows = [row for row in rows if (row["rates"], row["seed"]) != key] + [result]
    write_result(path, sorted(rows, key=lambda row: (row["rates"], row["seed"])), indent=1)


def main(
    settings: Annotated[str, typer.Option(help="By comma.")] = "tiny-2k,tiny-32k",
    methods: Annotated[str, typer.Option(help="By comma; those of a process beside this one are not its own.")] = "",
    show: Annotated[bool, typer.Option("--list", help="Show what is to come, and run nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write tables and pictures, and run nothing.")] = False,
    rates: Annotated[str, typer.Option(help="Of those methods alone, as 0.001-0.02, by comma.")] = "",
    seeds: Annotated[str, typer.Option(help="Those of --rates, by comma.")] = "0",
    share: Annotated[str, typer.Option(help="Which part of the methods is this process's: 1/2, 2/2.")] = "1/1",
    minutes: Annotated[float, typer.Option(help="Begin no run after so many.")] = math.inf,
) -> None:
    """Run what is missing."""
    console, began = Console(), time.monotonic()
    part, parts = map(int, share.split("/"))
    names = methods.split(",") if methods else list(METHODS)
    mine = names[part - 1 :: parts]
    trainers: dict[str, Trainer] = {}
    corpus = load_corpus()
    while not report:
        plan = Plan(read(FOLDER), settings.split(","), mine)
        pairs = [Rates(*map(float, pair.split("-"))) for pair in rates.split(",") if pair]
        pending = plan.at(pairs, [int(seed) for seed in seeds.split(",")]) if pairs else list(plan)
        if show:
            for spec in pending:
                console.print(spec.name, highlight=False)
        if show or not pending or time.monotonic() - began > 60 * minutes:
            return
        spec = pending[0]
        if spec.setting.name not in trainers:
            trainers[spec.setting.name] = Trainer(spec.setting, corpus)
        result = trainers[spec.setting.name].run(spec)
        keep(FOLDER, result)
        console.print(f"{spec.name}: {result['val_loss']}; {result['seconds']} s", highlight=False)
    for path in write_report(Plan(read(FOLDER), settings.split(","), list(METHODS)), FOLDER):
        console.print(str(path), highlight=False)


if __name__ == "__main__":
    typer.run(main)
