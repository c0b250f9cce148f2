"""Callers in PyTorch that would put floats in the place of an INT8 weight, refused before they change the weight.

They ask for operations that are right for anybody else: a shard is a view that is read, a scatter reads a list of
tensors below every dispatch, and ``swap_tensors`` asks for nothing at all.  So what is told here is who asks, by the
frames above.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

_OWN = ("qgalore_compile.", "torch._tensor", "torch.functional")
_SHARDING = ("torch.distributed.fsdp", "torch.distributed._shard", "torch.distributed.tensor.placement_types")
_BELOW_DISPATCH = ("scatter", "all_gather")  # C++ reads or writes their lists of tensors

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
