"""Whether a run can go on from a saved state: everything is looked at before the first tensor is copied."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from qgalore_compile.optim import checkpoint
from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.optim.saved_state import REMEDY
from qgalore_compile.weights import QuantizedWeight
from qgalore_compile.words import listed


def check_saved(
    saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler
) -> None:
    """Raise ValueError unless all parts of ``saved``, a ``Run.state_dict``, fit these and can be true; changes nothing.

    Of an optimizer that is neither this project's nor PyTorch's AdamW, what its own ``load_state_dict`` asks for is all
    that is known.
    """
    check_model(saved["model"], model)
    if isinstance(optimizer, QGaLoreAdamW):
        checkpoint.check_optimizer(optimizer, saved["optimizer"])
    elif isinstance(optimizer, torch.optim.AdamW):
        _check_adamw(saved["optimizer"], optimizer)
    _check_scheduler(saved["scheduler"], scheduler, saved["step"])


def check_model(saved: dict[str, Any], model: nn.Module) -> None:
    """Raise ValueError unless ``saved`` has the model's tensors, of its shapes and dtypes, with finite scales."""
    own = model.state_dict()
    if own.keys() != saved.keys():
        missing, more = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        parts = [f"it {has} {listed(names)}" for has, names in (("lacks", missing), ("has", more)) if names]
        raise ValueError(f"the saved model is another one than this run's: {'; '.join(parts)}")
    for name, tensor in own.items():
        if (looks := _looks(tensor)) != (found := _looks(saved[name])):
            raise ValueError(f"the saved model is another one than this run's: its {name} is {found}, not {looks}")
        if isinstance(tensor, QuantizedWeight):
            for part in [part.name for part in tensor.format.parts if part.memory == "f32"]:
                values: Tensor = getattr(saved[name], part)
                size = part in ("scale", "absmax")
                if not bool(torch.isfinite(values).all()) or (size and bool((values < 0).any())):
                    raise ValueError(f"{name}: the saved {part} holds NaN, Inf or what is below 0; {REMEDY}")


def _looks(value: object) -> str:
    """Type, shape, dtype and storage of a tensor as text, the parts of a quantised weight included."""
    if isinstance(value, QuantizedWeight):
        return f"{value.format} {tuple(value.shape)} {value.dtype} ({' '.join(map(_looks, value.parts))})"
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return f"a {type(value).__name__}"


def _check_adamw(saved: dict[str, Any], optimizer: torch.optim.AdamW) -> None:
    groups, state = checkpoint.parts(saved)
    own = optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
        raise ValueError("the saved optimizer has other groups than this run's")
    for position, (group, mine) in enumerate(zip(groups, own, strict=True)):
        if group.keys() != mine.keys():
            raise ValueError(f"saved parameter group {position} has other keys than this run's: {sorted(group)}")
        for key in ("lr", "eps", "weight_decay", "initial_lr"):
            if not _is_rate(group[key]):
                raise ValueError(f"saved parameter group {position}: {key} is {group[key]!r}; {REMEDY}")
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_is_rate(b) and b < 1 for b in betas):
            raise ValueError(f"saved parameter group {position}: betas are {betas!r}; {REMEDY}")
        for parameter, key in zip(mine["params"], group["params"], strict=True):
            _check_moments(key, state.get(key, {}), parameter)
    if more := state.keys() - {key for group in groups for key in group["params"]}:
        raise ValueError(f"the saved optimizer has state of what is no parameter: {listed(sorted(map(str, more)))}")


def _check_moments(key: object, saved: dict[str, Any], parameter: Tensor) -> None:
    where = f"the saved optimizer's state of parameter {key}"
    if not saved:
        return
    if saved.keys() != {"step", "exp_avg", "exp_avg_sq"} or not all(isinstance(v, Tensor) for v in saved.values()):
        raise ValueError(f"{where} has {sorted(map(str, saved))}, not step, exp_avg and exp_avg_sq")
    for name in ("exp_avg", "exp_avg_sq"):
        value: Tensor = saved[name]
        if value.shape != parameter.shape or value.dtype != parameter.dtype:
            raise ValueError(f"{where}: {name} is {_looks(value)}, and the parameter {_looks(parameter)}")
        if not bool(torch.isfinite(value).all()) or (name == "exp_avg_sq" and bool((value < 0).any())):
            raise ValueError(f"{where}: {name} holds NaN, Inf or what is below 0; {REMEDY}")
    if saved["step"].numel() != 1 or not (float(saved["step"]) >= 0 and float(saved["step"]).is_integer()):
        raise ValueError(f"{where}: step is {saved['step']!r}, which is no count; {REMEDY}")


def _check_scheduler(saved: dict[str, Any], scheduler: LRScheduler, step: int) -> None:
    own = scheduler.state_dict()
    if own.keys() != saved.keys():
        raise ValueError(f"the saved schedule of the learning rate has {sorted(saved)}, this run's {sorted(own)}")
    if saved["last_epoch"] != step:
        raise ValueError(f"the saved schedule of the learning rate is at {saved['last_epoch']!r}, the run at {step}")
    for key in ("base_lrs", "_last_lr"):
        rates = saved[key]
        if not isinstance(rates, list) or len(rates) != len(own[key]) or not all(map(_is_rate, rates)):
            raise ValueError(f"the saved schedule of the learning rate has {key} {rates!r}; {REMEDY}")
    if not isinstance(saved["_step_count"], int):
        raise ValueError(f"the saved schedule of the learning rate has _step_count {saved['_step_count']!r}; {REMEDY}")


def _is_rate(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and 0 <= float(value) < math.inf
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
