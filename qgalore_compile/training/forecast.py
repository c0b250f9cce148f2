"""What a run will hold, told before it starts, and a run stopped that cannot go well."""

from __future__ import annotations

import torch

from qgalore_compile.planning import MemoryPlan, plan
from qgalore_compile.planning.cards import amount, written
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.llama import Llama
from qgalore_compile.training.machine import memory_of


def forecast(config: TrainConfig, *, compare: bool = False) -> MemoryPlan:
    """The plan of a run with the optimizer "qgalore" or "galore", compiled by "qgalore".

    Args:
        config: of the run.
        compare: other ways of training, too.
    """
    with torch.device("meta"):
        model = Llama(config.model).to(getattr(torch, config.dtype))
    quantised = config.optimizer == "qgalore"
    keys = config.projection
    return plan(
        model,
        batch=config.batch,
        seq=config.seq,
        rank=keys.pop("rank"),
        weight_format=(config.weight_format or "int8/256") if quantised else None,
        moments=config.moments or ("8bit" if quantised else "32bit"),
        nonfinite=config.nonfinite,
        max_grad_norm=config.max_grad_norm,
        accumulate=config.accumulate,
        device="cpu" if torch.device(config.device).type == "cpu" else "cuda",
        budget=config.budget,
        compare=compare,
        quant=quantised,
        **keys,
    )


def check_forecast(config: TrainConfig, device: torch.device) -> str | None:
    """A line for people on what the run will hold; None where nothing is known of its kind.

    Raises:
        ValueError: that is above the run's budget or, in tensors alone, above what the machine has.
    """
    if config.optimizer == "adamw" or config.backend != "qgalore":
        return None
    found = forecast(config)
    needs = (
        f"this run is to hold {written(found.peak)} of tensors, and some {written(found.forecast.process)} beside them"
    )
    if config.budget is not None and not found.fits:
        raise ValueError(
            f"{needs}, more than --budget {config.budget}, {written(amount(config.budget))}: qgalore plan --preset "
            f"{config.preset} --batch {config.batch} --seq {config.seq} --budget {config.budget} says what to change"
        )
    if found.peak > memory_of(device):
        raise ValueError(f"{needs}; {device} has {written(memory_of(device))}: make --batch or --seq smaller")
    between = written(found.forecast.resident)
    return f"memory   {written(found.peak)} of tensors at most, {between} between steps (forecast)"
