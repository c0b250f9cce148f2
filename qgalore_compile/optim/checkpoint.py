"""Loading an optimizer's state: checked as a whole before anything changes, and copied into the tensors that exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from qgalore_compile.optim.groups import names_of
from qgalore_compile.optim.hyper_parameters import Group
from qgalore_compile.optim.saved_state import check_group, check_state
from qgalore_compile.subspace.moments import MomentFormats

OLD_SECOND_MOMENT = "exp_avg_sq_absmax"


@contextmanager
def undo_on_error(items: list[Any]) -> Iterator[None]:
    """Take back what was appended to ``items`` if the block raises."""
    length = len(items)
    try:
        yield
    except BaseException:
        del items[length:]
        raise


def load_optimizer(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Copy ``state_dict`` into ``optimizer``.

    Not Optimizer.load_state_dict, which converts every state tensor to its parameter's dtype (8-bit codes would become
    floats) and replaces the tensors that a compiled step has already bound.

    Raises:
        ValueError: groups, names of state, shapes or values that cannot be; the message names the parameter.  Nothing
            has changed then.
    """
    copies = check_optimizer(optimizer, state_dict)
    with torch.no_grad():
        for own, saved in copies:
            own.copy_(saved)
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        cast(Group, group).load(
            {key: value for key, value in saved_group.items() if key not in ("params", "param_names")}
        )


def check_optimizer(optimizer: Optimizer, state_dict: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Whether all of ``state_dict`` can be loaded; changes nothing.

    Returns:
        (own tensor, saved tensor) of all state, for copying.

    Raises:
        ValueError: as for :func:`load_optimizer`.
    """
    saved_groups, saved_state = parts(state_dict)
    own_groups = optimizer.param_groups
    _check_second_moments(own_groups, saved_groups, saved_state)
    sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (own_groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"the saved optimizer has groups of {saved_sizes} parameters, this one of {sizes}; "
            "build it with the same groups in the same order"
        )
    copies: list[tuple[Tensor, Tensor]] = []
    for position, (group, saved_group) in enumerate(zip(own_groups, saved_groups, strict=True)):
        names = names_of(group, position)
        for name, parameter, key in zip(names, group["params"], saved_group["params"], strict=True):
            copies += _pairs(name, tuple(parameter.shape), optimizer.state[parameter], saved_state.get(key, {}))
        # a schedule of another version may have this one's length, if its queue has another
        check_group(group, saved_group, position)
        for name, key in zip(names, saved_group["params"], strict=True):
            check_state(name, saved_state.get(key, {}))
    return copies


def parts(state_dict: Any) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Tensor]]]:
    """Groups and state of an optimizer's state dict; ValueError for what has not the form of one."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    state = state_dict.get("state") if isinstance(state_dict, dict) else None
    if (
        not isinstance(groups, (list, tuple))
        or not all(isinstance(group, dict) and isinstance(group.get("params"), (list, tuple)) for group in groups)
        or not isinstance(state, dict)
        or not all(isinstance(each, dict) for each in state.values())
    ):
        raise ValueError(
            "this is no state_dict of an optimizer: it must be a dict with a list of groups under 'param_groups', each "
            "with its 'params', and a dict of dicts under 'state'"
        )
    return list(groups), state


def _check_second_moments(
    own_groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]], saved_state: dict[Any, dict[str, Tensor]]
) -> None:
    """Raise ValueError for 8-bit moments that hold v, not √v.  Before all else: it is a matter of the whole file."""
    own = MomentFormats.parse("8bit").names[-1]
    for position, group in enumerate(saved_groups):
        for place, key in enumerate(group["params"]):
            if OLD_SECOND_MOMENT in saved_state.get(key, {}):
                names = names_of(own_groups[position], position) if position < len(own_groups) else []
                name = names[place] if place < len(names) else f"parameter {place} of group {position}"
                raise ValueError(
                    f"{name}: the saved 8-bit moments hold v itself ({OLD_SECOND_MOMENT}), as earlier versions "
                    f"stored it; this one stores √v ({own}). They cannot be converted, for where v was "
                    "rounded to 0 its size is lost: load the model's weights alone and begin with fresh moments, or "
                    "end the run with the version that wrote it"
                )


def _pairs(
    name: str, shape: tuple[int, ...], own: dict[str, Tensor], saved: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """(own tensor, saved tensor) of one parameter's state."""
    if own.keys() != saved.keys():
        raise ValueError(
            f"{name} of shape {shape}: the saved state has {sorted(saved)}, this optimizer needs {sorted(own)}; "
            "build it with the same rank, quant and moments as the saved one"
        )
    for key, tensor in own.items():
        if not isinstance(saved[key], Tensor):
            raise ValueError(f"{name} of shape {shape}: the saved {key} is a {type(saved[key]).__name__}, no tensor")
        if key == "step" and _is_exact_count(saved[key]):
            continue
        if tensor.shape != saved[key].shape or tensor.dtype != saved[key].dtype:
            raise ValueError(
                f"{name} of shape {shape}: the saved {key} is {saved[key].dtype} {tuple(saved[key].shape)}, this "
                f"optimizer needs {tensor.dtype} {tuple(tensor.shape)}; build it with the settings of the saved one"
            )
    return [(tensor, saved[key]) for key, tensor in own.items()]


def _is_exact_count(saved: Tensor) -> bool:
    """Whether it is a count as 0.1 kept it, in float32, which stops at 2²⁴."""
    return saved.dtype == torch.float32 and saved.shape == () and float(saved) < 2**24
