"""Whether what a file says of an optimizer can be true: its settings, its schedules and its numbers.

Shapes and dtypes that fit say nothing of values.  A scale of NaN, a gap of -3 or a beta of 2 would be loaded without a
word and spoil the next update, so :mod:`qgalore_compile.optim.checkpoint` asks here before it copies anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qgalore_compile.optim import checks, groups, layout, settings
from qgalore_compile.optim.settings import KEYS
from qgalore_compile.subspace.scheduler import EXACT, FIXED, LEAST, Schedule

REMEDY = "it is damaged, or was changed by hand: load one that is whole"

_LAYOUT = settings.fixed("state", "schedule")
"""Keys that say how state is stored: a saved one that differs would be read as something else."""

_FARTHEST = 2**31
"""Calls from now to a turn; a later one never comes."""


def check_group(own: dict[str, Any], saved: dict[str, Any], position: int) -> None:
    """Raise ValueError unless ``saved``, a group of a state dict, may take the place of ``own``."""
    names = groups.names_of(own, position)
    where = f"saved parameter group {position}"
    for name, key in KEYS.items():
        problem = key.problem(saved[name]) if name in saved else None
        if problem is not None:
            raise ValueError(f"{where}: {name} {problem}; {REMEDY}")
    if "initial_lr" in saved and not _is_number(saved["initial_lr"]):
        raise ValueError(f"{where}: initial_lr must be a number, got {saved['initial_lr']!r}; {REMEDY}")
    order, saved_order = own.get("param_names"), saved.get("param_names")
    if order is not None and saved_order is not None and order != saved_order and set(order) == set(saved_order):
        raise ValueError(
            f"{where}: its parameters are this optimizer's in another order, beginning with {saved_order[0]!r} in "
            f"place of {order[0]!r}; build the groups in the order of the saved ones"
        )
    settings = {key: value for key, value in saved.items() if key != "param_names"}
    merged = {**own, **settings, "params": own["params"]}
    checks.check_keys(merged, where)
    checks.check_adam(merged, names, where)
    if "rank" in own:
        checks.check_projection(merged, names, where)
    for name in _LAYOUT:
        here, there = own.get(name), merged.get(name)
        if there != here:
            raise ValueError(
                f"{names[0]}: the saved {KEYS[name].fixed} has {name}={there!r}, this optimizer's {here!r}; "
                "build it with the settings of the saved one"
            )
    for name, parameter in zip(names, own["params"], strict=True):
        if "rank" in own and layout.rank_of(merged, parameter) != layout.rank_of(own, parameter):
            raise ValueError(
                f"{name} of shape {tuple(parameter.shape)}: the saved state has rank={merged['rank']}, this "
                f"optimizer's {own['rank']}; build it with the settings of the saved one"
            )


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_state(name: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError unless every number of one parameter's saved state is one that training can have written."""
    for key, tensor in state.items():
        problem = _schedule(tensor) if key == "schedule" else _values(key, tensor)
        if problem is not None:
            raise ValueError(f"{name}: the saved {key} {problem}; {REMEDY}")


def _values(key: str, tensor: Tensor) -> str | None:
    if key == "grad_norm":  # of a step that a gradient stopped, it is not finite
        return None
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        return "holds NaN or Inf"
    counts = key == "step" or key.endswith(("_absmax", "_scale", "_sq", "_steps"))
    if counts and tensor.numel() and bool((tensor < 0).any()):
        return f"holds {tensor.min().item():g}, which must not be negative"
    if key == "step" and not float(tensor).is_integer():
        return f"is {float(tensor)}, which is no count"
    return None


def _schedule(tensor: Tensor) -> str | None:
    """What cannot be in a schedule, of the layout that ``scheduler.py`` describes; None if all can."""
    numbers: list[float] = tensor.tolist()
    counts = numbers[:EXACT]
    if not all(math.isfinite(count) and count.is_integer() for count in counts):
        return f"counts {_shown(counts)}, which must be whole numbers"
    for (name, least), count in zip(LEAST.items(), counts, strict=True):
        if not least <= count < 2**53:
            return f"has {name} {count:g}, which must be at least {least}"
    now = Schedule.from_tensor(tensor)
    if now.last > now.clock or max(now.refreshes, now.checks) > now.clock + 1:
        return f"tells of turns after its clock: clock {now.clock}, last {now.last}, refreshes {now.refreshes}"
    if now.next - now.clock > _FARTHEST:
        return f"has its next turn at {now.next}, at clock {now.clock}: it would never come"
    if (now.refreshes == 0) != (now.last == -1):
        return f"has refreshes {now.refreshes} and the last of them at {now.last}"
    if any(math.isinf(value) for value in numbers[EXACT:]):
        return "holds an infinite energy or similarity"
    if any(energy < 0 for energy in numbers[EXACT:FIXED]):
        return f"holds a negative energy, {_shown(numbers[EXACT:FIXED])}"
    return None


def _shown(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
