"""Groups along the last dimension, the last of which may be short."""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore_compile._ops import define


def check_float(x: Tensor) -> None:
    """Raise TypeError for a tensor that is not floating point."""
    if not x.is_floating_point():
        raise TypeError(f"only floating-point tensors can be quantised, got {x.dtype}; convert it with .float() first")


def check_grouped(x: Tensor, group_size: int) -> None:
    """Raise ValueError for a tensor without a row, or a group without an element; TypeError as above."""
    check_float(x)
    if x.dim() == 0:
        raise ValueError("a 0-d tensor has no row to group; pass x.reshape(1)")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")


def to_groups(x: Tensor, group_size: int) -> Tensor:
    """(..., n) → (..., groups, width).  A short last group is filled up with its last element: same min, same max."""
    *leading, n = x.shape
    width = max(1, min(group_size, n))
    groups = -(-n // width)
    missing = groups * width - n
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*leading, missing)], dim=-1)
    return x.reshape(*leading, groups, width)


def from_groups(x: Tensor, n: int) -> Tensor:
    """The inverse of :func:`to_groups`: (..., groups, width) → (..., n)."""
    *leading, groups, width = x.shape
    flat = x.reshape(*leading, groups * width)
    return flat if groups * width == n else _drop_tail_op(flat, n)


# An op, not a slice: Inductor (torch 2.13) would compute a row of n elements with the scale of element j at j // width,
# split the loop into n // width runs of width (CppScheduling.try_loop_split, for widths above 8), and never compute
# the short group: weights of (512, 1376) in groups of 256 held garbage in their last 96 columns.
_drop_tail_op = define(
    "drop_tail(Tensor x, SymInt n) -> Tensor",
    lambda x, n: x[..., :n].contiguous(),
    lambda x, n: x.new_empty((*x.shape[:-1], n)),
)
