"""What a parameter group may hold: its keys, their values and its parameters, refused in words that name the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qgalore_compile.optim import settings
from qgalore_compile.optim.settings import KEYS
from qgalore_compile.weights.targets import foreign
from qgalore_compile.words import listed, unknown_key

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES_ALLOWED = (
    "cannot be trained: updates are computed in float32, for parameters of float32, bfloat16, float16 and for "
    "Int8Weight; convert the model, e.g. model.to(torch.float32), before the optimizer is built, or leave it out"
)

SCHEDULERS_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr")
"""What ``torch.optim``'s schedulers write into a group for themselves."""
_OTHER_KEYS = ("params", "param_names", *SCHEDULERS_KEYS)


def check_keys(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for a key that no group knows, or that means nothing without ``rank``."""
    for key in group:
        if key in _OTHER_KEYS:
            continue
        if key not in KEYS:
            raise ValueError(f"{where}: {unknown_key(key, KEYS)}")
        if KEYS[key].projected and "rank" not in group:
            raise ValueError(
                f"{where}: {key!r} has a meaning only in a projected group; give it a rank, or drop {key!r}"
            )


def check_adam(group: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Raise ValueError for a value of Adam's keys out of its range, or a parameter that cannot be trained."""
    if len(names) != len(group["params"]):
        raise ValueError(f"{where}: {len(names)} param_names for {len(group['params'])} parameters; give one each")
    settings.check_values(group, where, projected=False)
    for name, parameter in zip(names, group["params"], strict=True):
        if why := foreign(parameter):
            raise ValueError(f"{where}: {name}: {why}")
        if parameter.dtype not in PARAMETER_DTYPES:
            raise ValueError(f"{where}: {name} of dtype {parameter.dtype} {_DTYPES_ALLOWED}")
    if names:
        check_device(group, names, where, group["params"][0].device)


def check_values(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for a value that cannot be; of parameters nothing is asked."""
    settings.check_values(group, where, projected=False)
    if "rank" in group:
        settings.check_values(group, where, projected=True)


def check_device(group: dict[str, Any], names: Sequence[str], where: str, device: torch.device) -> None:
    """Raise ValueError for a parameter on another device than ``device``, that of the optimizer's others."""
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.device != device:
            raise ValueError(
                f"{where}: {name} is on {parameter.device}, other parameters on {device}; all parameters of an "
                "optimizer must be on one device: move them, or build an optimizer for each device"
            )


def check_projection(group: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Raise ValueError for a projected group that cannot be: the message names the parameter, its shape, the remedy."""
    shapes = [f"{name} {tuple(p.shape)}" for name, p in zip(names, group["params"], strict=True)]
    where = f"{where} ({listed(shapes)})"
    settings.check_values(group, where, projected=True)
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.dim() != 2:
            raise ValueError(
                f"{where}: {name} of shape {tuple(parameter.shape)} cannot be projected, for it has {parameter.dim()} "
                "dimension(s) and not two; move it to a group without rank"
            )
        if 0 in parameter.shape:
            raise ValueError(f"{where}: {name} of shape {tuple(parameter.shape)} is empty; leave it out")


def check_max_grad_norm(value: Any) -> None:
    """Raise ValueError for what is no norm to clip to; a float32 that is 0 would stop the training."""
    if value is None:
        return
    if not settings.is_number(value) or not torch.tensor(float(value), dtype=torch.float32, device="cpu") > 0:
        raise ValueError(f"max_grad_norm must be None or a number above 0 in float32, got {value!r}")
