"""Optimizers of PyTorch and of others, loaded whole or not at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgalore_compile.optim.checkpoint import parts
from qgalore_compile.words import listed

_OF_SHAPE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
"""State of PyTorch's optimizers that has its parameter's shape."""


def load_other(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``, behind checks that it does not make.

    Raises:
        ValueError: groups of other sizes, keys or names, or state of another shape than its parameter's.  Nothing has
            changed then, nor where loading itself raises.
    """
    groups, state = parts(saved)
    own = optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
        raise ValueError(
            "the saved optimizer has other groups than this one: build it with the same, in the same order"
        )
    for position, (group, mine) in enumerate(zip(groups, own, strict=True)):
        where = f"saved parameter group {position}"
        if other := (set(group) ^ set(mine)) - {"param_names", "initial_lr"}:
            raise ValueError(f"{where} is of another optimizer than this {type(optimizer).__name__}: only one of them "
                             f"has {', '.join(sorted(map(str, other)))}")  # fmt: skip
        if "param_names" in group and group["param_names"] != mine.get("param_names", group["param_names"]):
            raise ValueError(
                f"{where} holds other parameters than this one: {listed(list(map(str, group['param_names'])))}"
            )
        for key, parameter in zip(group["params"], mine["params"], strict=True):
            _check_state(where, state.get(key, {}), parameter, type(optimizer))
    held, defaults = dict(optimizer.state), [dict(group) for group in own]
    try:
        optimizer.load_state_dict(saved)
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(held)
        optimizer.param_groups[:] = defaults
        raise


def _check_state(where: str, state: dict[str, Any], parameter: Tensor, kind: type) -> None:
    if not kind.__module__.startswith("torch.optim"):
        return  # what it keeps of a parameter may have any shape
    for name in _OF_SHAPE:
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ValueError(
                f"{where} holds {name} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}: build it with the same parameters in the same order"
            )
