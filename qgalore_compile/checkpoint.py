"""Loading an optimizer's state: checked as a whole before anything changes, and copied into the tensors that exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qgalore_compile.groups import names_of


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
        ValueError: groups, names of state or shapes differ; the message names the parameter.  Nothing has changed then.
    """
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    own_groups = optimizer.param_groups
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
        # schedules of another version may have this one's length, if its queue has another
        if saved_group.get("queue_size") != group.get("queue_size"):
            raise ValueError(
                f"{names[0]}: the saved schedule has queue_size={saved_group.get('queue_size')}, this optimizer's "
                f"{group.get('queue_size')}; build it with the settings of the saved one"
            )
    if "global" in saved_state and "global" in optimizer.state:
        copies += _pairs("global", (), optimizer.state["global"], saved_state["global"])  # type: ignore[index]
    with torch.no_grad():
        for own, saved in copies:
            own.copy_(saved)
    for group, saved_group in zip(own_groups, saved_groups, strict=True):
        for key, value in saved_group.items():
            if key in ("params", "param_names"):
                continue
            if isinstance(group.get(key), Tensor):
                group[key].fill_(float(value))
            else:
                group[key] = value


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
        if tensor.shape != saved[key].shape or tensor.dtype != saved[key].dtype:
            raise ValueError(
                f"{name} of shape {shape}: the saved {key} is {saved[key].dtype} {tuple(saved[key].shape)}, this "
                f"optimizer needs {tensor.dtype} {tuple(tensor.shape)}; build it with the settings of the saved one"
            )
    return [(tensor, saved[key]) for key, tensor in own.items()]
