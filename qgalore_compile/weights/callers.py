"""Callers in PyTorch that would put floats in the place of an INT8 weight, refused before they change the weight.

They ask for operations that are right for anybody else: a shard is a view that is read, a scatter reads a list of
tensors below every dispatch, and ``swap_tensors`` asks for nothing at all.  So what is told here is who asks, by the
frames above.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

_OWN = ("qgalore_compile.", "torch._tensor", "torch.functional")
_SHARDING = ("torch.distributed.fsdp", "torch.distributed._shard", "torch.distributed.tensor.placement_types")
_BELOW_DISPATCH = ("scatter", "all_gather")  # C++ reads or writes their lists of tensors

_REMOVERS = {  # functions that compute a weight from an INT8 one and leave the result in its place
    ("remove_parametrizations", "torch.nn.utils.parametrize"): "a float parameter",
    ("remove", "torch.nn.utils.weight_norm"): "a float parameter",
    ("remove", "torch.nn.utils.spectral_norm"): "a float parameter",
    ("remove", "torch.nn.utils.prune"): "INT8 again, which has no exact code for the zeros",
}
_FRAMES = 32  # how far up a remover is looked for; a parametrisation's forward is ten frames below

FLOAT_FIRST = "make the model float first: qgalore_compile.dequantize_(model), and quantize_ it again afterwards"
WHOLE = (
    "keep it whole: replicate the model (torch.nn.parallel.DistributedDataParallel), leave the weight out "
    "(ignored_params, ignored_states), or make it float first: qgalore_compile.dequantize_(model)"
)


def _name(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name


def _asking() -> FrameType | None:
    """The frame that asked for an operation: the first that is neither ours nor PyTorch's way to it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _name(frame).startswith(_OWN):
        frame = frame.f_back
    return frame


def refuse_shards(viewed: Any) -> None:
    """Raise if a view is asked for by what cuts parameters into shards, which would be floats.

    Args:
        viewed: the weight.

    Raises:
        NotImplementedError: FSDP, a DTensor's shard or the like asks.
    """
    frame = _asking()
    if frame is not None and _name(frame).startswith(_SHARDING):
        raise NotImplementedError(
            f"{_name(frame)} would cut {viewed!r} into shards (FSDP, fully_shard, tensor parallel), which would be "
            f"floats: INT8 groups and projectors are those of whole weights; {WHOLE}"
        )


def refuse_lists(tensor: Any, writable: bool) -> None:
    """Raise if a collective of c10d is about to take a list of tensors past every dispatch, where there are no floats.

    Args:
        tensor: one of the list.
        writable: whether c10d may copy into it.

    Raises:
        NotImplementedError: scatter or the like asks.
    """
    frame = _asking()
    while frame is not None and frame.f_code.co_name == "<listcomp>":
        frame = frame.f_back
    if frame is None or _name(frame) != "torch.distributed.distributed_c10d":
        return
    name = frame.f_code.co_name
    if name in _BELOW_DISPATCH and not (name == "all_gather" and writable):
        raise NotImplementedError(
            f"the collective {name} is not supported with {tensor!r}, which has no floats in memory; "
            "torch.distributed.broadcast(weight.detach(), src) is; or take weight.dequantize() and send floats"
        )


def refuse_removal(weight: Callable[[], Any]) -> None:
    """Raise if a parametrisation or a pruning is being removed and its result would take the weight's place.

    Args:
        weight: finds what the result is computed from.

    Raises:
        NotImplementedError: it is; the module is as it was.
    """
    frame = _asking()
    for _ in range(_FRAMES):
        if frame is None:
            return
        name = frame.f_code.co_name
        if name.startswith("remove"):
            outcome = _REMOVERS.get((name, _name(frame)))
            if outcome is not None:
                alone = " or leave_parametrized=False" if name == "remove_parametrizations" else ""
                raise NotImplementedError(
                    f"{_name(frame)} would leave what it computed from {weight()!r} as {outcome}; {FLOAT_FIRST}{alone}"
                )
        frame = frame.f_back


def refuse_swap(weight: Any) -> None:
    """Raise if ``torch.utils.swap_tensors`` is about to put another kind of tensor into the weight.

    It changes the class of the very object that modules and optimizers hold.  Parametrisations with a right inverse
    use it, and modules under ``torch.__future__.set_swap_module_params_on_conversion``.

    Args:
        weight: what is asked for its use count, as ``swap_tensors`` asks both of its arguments first.

    Raises:
        TypeError: it is the first argument, and the second is no INT8 weight.  Both are as they were.
    """
    frame = _asking()
    if frame is None or (frame.f_code.co_name, _name(frame)) != ("check_use_count", "torch.utils"):
        return
    outer = frame.f_back
    given = outer.f_locals if outer is not None else {}
    if given.get("t1") is weight and not isinstance(given.get("t2"), type(weight)):
        raise TypeError(
            f"torch.utils.swap_tensors would put a {type(given.get('t2')).__name__} of floats into {weight!r}, which "
            "would no longer be INT8. To assign values use weight.copy_(float_tensor), which quantises. If it is a "
            f"parametrisation with a right inverse (orthogonal) that asks, register it before quantize_, or "
            f"{FLOAT_FIRST}"
        )
