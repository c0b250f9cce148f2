"""Where an optimizer's tensors are and what they hold, checked before a step changes any of them.

A model that is moved, or a loop that moves or casts "all state", leaves tensors behind that no step can take: a
schedule on a GPU, codes made floats.  Nothing here reads a tensor's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qgalore_compile.optim.checks import PARAMETER_DTYPES
from qgalore_compile.optim.groups import names_of
from qgalore_compile.optim.hyper_parameters import Group

_CPU = torch.device("cpu")
_BUILD_ANEW = (
    "move or convert the model before the optimizer is built; to go on from here, build a new optimizer over the model "
    "as it is now, and let it load this one's state_dict() as it was before"
)


class PlacementError(RuntimeError):
    """A parameter or its state is not where, or not what, the optimizer made it; raised before anything changes."""


def dtype_of(name: str, formats: dict[str, torch.dtype]) -> torch.dtype:
    """What the tensor ``name`` of a parameter's state holds, given that of parts of formats by name."""
    if name == "step" or name == "skipped_steps":
        return torch.int64
    if name == "schedule":
        return torch.float64
    return formats.get(name, torch.float32)


def check_placement(groups: Sequence[dict[str, Any]], state: dict[Any, dict[str, Tensor]]) -> None:
    """Raise PlacementError unless every parameter that has a gradient, and its state, are as the optimizer made them.

    Args:
        groups: the optimizer's.
        state: the optimizer's.
    """
    device: torch.device | None = None
    # Every parameter is read before any state: those that Dynamo meets first as keys of the state's dict it takes by
    # identity, their gradients too, and would compile anew in every step.
    with_gradient = [[p.grad is not None for p in group["params"]] for group in groups]
    for position, group in enumerate(groups):
        if not isinstance(group, Group):
            raise PlacementError(
                f"group {position} of param_groups is a {type(group).__name__} that was put there by hand; use "
                "add_param_group, or assign a whole list to param_groups"
            )
        for index, p in enumerate(group["params"]):
            if not with_gradient[position][index]:
                continue
            if p.dtype not in PARAMETER_DTYPES:
                raise PlacementError(
                    f"{names_of(group, position)[index]} is {p.dtype} now, which cannot be trained: updates are "
                    f"computed in float32, for parameters of float32, bfloat16 and float16; {_BUILD_ANEW}"
                )
            own = state[p]
            if "step" not in own:
                raise PlacementError(
                    f"{names_of(group, position)[index]} has no state: it was put into its group after the optimizer "
                    "was built; use add_param_group"
                )
            formats = group.formats
            parts = formats.dtypes if formats.moments_of(group, p) is formats.moments else formats.small.dtypes
            problem = _problem(own, parts, p.device)
            if problem is not None:
                raise PlacementError(f"{names_of(group, position)[index]}: {problem}; {_BUILD_ANEW}")
            device = p.device if device is None else device
            if p.device != device:
                raise PlacementError(
                    f"{names_of(group, position)[index]} is on {p.device}, parameters before it on {device}; all must "
                    f"be on one device: {_BUILD_ANEW}"
                )


def _problem(state: dict[str, Tensor], formats: dict[str, torch.dtype], device: torch.device) -> str | None:
    """What is not as it was made, in words."""
    for name, tensor in state.items():
        dtype, right = dtype_of(name, formats), _CPU if name == "schedule" else device
        if tensor.dtype != dtype or tensor.device != right:
            return f"its {name} is {tensor.dtype} on {tensor.device} and must be {dtype} on {right}"
    return None
