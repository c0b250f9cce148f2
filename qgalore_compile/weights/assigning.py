"""What ``copy_`` stores: to nearest, except for a small change of what is stored already, which nearest would lose.

A moving average writes a weight that lies a fraction of a step of the INT8 grid beside the old one.  Rounded to nearest
it is the old one again, at every update: after 300 updates of 1 % such an average has gone 3 % of its way.  So a group
whose values move by less than :data:`NEAR` steps of the grid (root mean square) is rounded stochastically, which keeps
the change in the mean.  At four steps and more the loss by nearest is an eighth of the change at most, and loading
other values is what ``copy_`` is for.  Values that are on the grid are stored as they are, whichever way they are
rounded.

In the same place of the same program draws are the same: they follow from the source's values, what is stored, the
weight's name and, outside compiled code, how often it was written to in this way; no generator of PyTorch's is touched.
"""

from __future__ import annotations

import functools
import logging
import zlib

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qgalore_compile import formats
from qgalore_compile._torch import is_fake
from qgalore_compile.formats.grouping import from_groups, to_groups
from qgalore_compile.rng import random_bits
from qgalore_compile.weights.dequantising import REMEDY

logger = logging.getLogger("qgalore_compile")

NEAR = 4.0
"""Steps of the grid, root mean square of a group, below which a change counts as small."""

_ON_THE_GRID = 2.0**-12  # of a step; float32 arithmetic on codes up to 255 is off by 2**-15


def requantised(
    source: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, group_size: int, label: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset for ``source``.

    Args:
        source: (m, n), of any dtype.
        codes, scale, offset: what is stored; uint8 (m, n), float32 (m, groups).
        group_size: elements of a row that share a scale and an offset.
        label: the weight's name, which draws depend on.
    """
    value = source.to(torch.float32)
    nearest = formats.quantize_int8(value, group_size)
    if value.numel() == 0 or value.is_meta or codes.is_meta:
        return nearest.codes, nearest.scale, nearest.offset
    old = formats.dequantize_int8(codes, scale, offset, group_size)
    # in the source's dtype: what was read in bfloat16 and comes back has not moved
    moved = source != old.to(source.dtype) if source.is_floating_point() else value != old
    change = to_groups(value - old, group_size)
    near = change.square().mean(-1) < (NEAR * nearest.scale) ** 2
    near &= to_groups(moved, group_size).any(-1)
    tracing = is_fake(codes)
    if not tracing and not bool(near.any()):
        return nearest.codes, nearest.scale, nearest.offset
    value = torch.where(moved, value, old)
    # sums of bits: all that matters is that they differ from the next draw's
    seed = value.contiguous().view(torch.int32).sum(dtype=torch.int64) + codes.sum(dtype=torch.int64)
    if not tracing and not codes.is_inference():
        increment_version(codes)  # PyTorch does not count writes below autograd
        seed = seed + codes._version
    noise = random_bits(value.shape, seed=0, step=seed, param=zlib.crc32((label or "").encode()) >> 1)
    drawn, close = (formats.quantize_int8(value, group_size, noise=each) for each in (noise, None))
    error = (formats.dequantize_int8(*close) - value).abs()
    on_grid = to_groups(error, group_size) <= _ON_THE_GRID * close.scale[..., None]
    kept = torch.where(from_groups(on_grid, value.shape[-1]), close.codes, drawn.codes)
    if not tracing:
        _tell()
    small = from_groups(near[..., None].expand(change.shape), value.shape[-1])
    return (
        torch.where(small, kept, nearest.codes),
        torch.where(near, drawn.scale, nearest.scale),
        torch.where(near, drawn.offset, nearest.offset),
    )


@functools.cache
def _tell() -> None:
    """Say once a process what becomes of an average."""
    logger.warning(
        "an INT8 weight was assigned values less than %g steps of its grid beside the old ones, which are rounded "
        "stochastically, for to nearest they would be lost. If this is a moving average, it carries noise of about a "
        "step: %s", NEAR, REMEDY
    )  # fmt: skip
