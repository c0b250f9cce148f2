"""What ``copy_`` stores: to nearest, except for a small change of what is stored already, which nearest would lose.

A moving average writes a weight that lies a fraction of a step of the INT8 grid beside the old one.  Rounded to nearest
it is the old one again, at every update: after 300 updates of 1 % such an average has gone 3 % of its way.  So a group
whose values move by less than :data:`NEAR` steps of the grid (root mean square) is rounded stochastically, which keeps
the change in the mean.  At four steps and more the loss by nearest is an eighth of the change at most, and loading
other values is what ``copy_`` is for.  A grid of four bits has no room for that, since a whole group spans fifteen
steps: there a change is small below one step.  Values that are on the grid are stored as they are, whichever way they
are rounded.

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

from qgalore_compile._torch import is_fake
from qgalore_compile.formats import Stored, encode
from qgalore_compile.formats.base import Grouped
from qgalore_compile.formats.grouping import from_groups, to_groups
from qgalore_compile.formats.integers import Integers
from qgalore_compile.rng import random_bits
from qgalore_compile.weights.dequantising import REMEDY

logger = logging.getLogger("qgalore_compile")

NEAR = 4.0
"""Steps of the grid, root mean square of a group, below which a change counts as small; a sixteenth of the codes where
that is less."""

_ON_THE_GRID = 2.0**-12  # of a step; float32 arithmetic on codes up to 255 is off by 2**-15


def requantised(source: Tensor, stored: Stored, label: str | None) -> list[Tensor]:
    """The parts to store for ``source``.

    Args:
        source: (m, n), of any dtype.
        stored: what is stored now.
        label: the weight's name, which draws depend on.
    """
    form, parts, _ = stored
    value = source.to(torch.float32)
    nearest = encode(value, form)
    if value.numel() == 0 or value.is_meta or parts[0].is_meta or not isinstance(form, Grouped):
        return nearest
    old = stored.load()
    # in the source's dtype: what was read in bfloat16 and comes back has not moved
    moved = source != old.to(source.dtype) if source.is_floating_point() else value != old
    change = to_groups(value - old, form.width)
    most = near_steps(form) * _steps(form, stored._replace(parts=nearest))
    near = change.square().mean(-1) < most**2
    near &= to_groups(moved, form.width).any(-1)
    tracing = is_fake(parts[0])
    if not tracing and not bool(near.any()):
        return nearest
    value = torch.where(moved, value, old)
    # sums of bits: all that matters is that they differ from the next draw's
    seed = value.contiguous().view(torch.int32).sum(dtype=torch.int64) + parts[0].sum(dtype=torch.int64)
    if not tracing and not parts[0].is_inference():
        increment_version(parts[0])  # PyTorch does not count writes below autograd
        seed = seed + parts[0]._version
    noise = random_bits(value.shape, seed=0, step=seed, param=zlib.crc32((label or "").encode()) >> 1)
    drawn, close = (stored._replace(parts=encode(value, form, each)) for each in (noise, None))
    error = (close.load() - value).abs()
    on_grid = to_groups(error, form.width) <= _ON_THE_GRID * _steps(form, close)[..., None]
    close_codes, drawn_codes = (form.codes(each.parts, value.shape) for each in (close, drawn))
    kept = torch.where(from_groups(on_grid, value.shape[-1]), close_codes, drawn_codes)
    if not tracing:
        _tell(near_steps(form))
    small = from_groups(near[..., None].expand(change.shape), value.shape[-1])
    chosen = torch.where(small, kept, form.codes(nearest, value.shape))
    shared = [torch.where(near, one, other) if part.extent == "group" else one
              for part, one, other in zip(form.parts, drawn.parts, nearest, strict=True)]  # fmt: skip
    return form.with_codes(shared, chosen)


def near_steps(form: Grouped) -> float:
    """Steps below which a change counts as small: :data:`NEAR`, or a sixteenth of the codes."""
    return min(NEAR, 2.0**form.code_bits / 16)


def _steps(form: Grouped, stored: Stored) -> Tensor:
    """The distance of neighbours on the grid, root mean square of a group."""
    if isinstance(form, Integers) and form.scaling == "float32":
        return stored.parts[-2]
    step = stored.code_step()
    assert step is not None
    return to_groups(step.to(torch.float32), form.width).square().mean(-1).sqrt()


@functools.cache
def _tell(steps: float) -> None:
    """Say once a process and grid what becomes of an average."""
    logger.warning(
        "a quantised weight was assigned values less than %g steps of its grid beside the old ones, which are rounded "
        "stochastically, for to nearest they would be lost. If this is a moving average, it carries noise of about a "
        "step: %s", steps, REMEDY
    )  # fmt: skip
