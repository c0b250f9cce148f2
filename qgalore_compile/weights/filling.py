"""Values for parameters on the meta device, one at a time: what is quantised never exists in float as a whole model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qgalore_compile.weights.tensor import NO_INT8_FORM, QuantizedWeight, has_int8_form, like

BLOCK = 1 << 20
"""Elements that are quantised at a time: in float32, what quantising takes beside the weight is 15 (INT8) to 80 (NF4)
times as many bytes."""


def empty(place: Tensor, device: torch.device | str) -> Tensor:
    """Memory without values for a tensor on the meta device; of a quantised weight what it is stored in."""
    if isinstance(place, QuantizedWeight):
        return like(place, lambda part: torch.empty_like(part, device=device))
    return torch.empty_like(place, device=device)


def blocks(place: Tensor) -> Iterator[slice]:
    """Rows to fill at a time: all where the format keeps more than a row together, or there are no rows."""
    whole = isinstance(place, QuantizedWeight) and any(part.shape[:1] != place.shape[:1] for part in place.parts)
    if whole or place.dim() < 2 or place.numel() <= BLOCK:
        yield slice(None)
        return
    step = max(1, BLOCK // (place.numel() // place.shape[0]))
    for first in range(0, place.shape[0], step):
        yield slice(first, first + step)


@torch.no_grad()
def fill_(place: Tensor, rows: slice, value: Tensor, name: str) -> None:
    """Store values in some rows of a tensor; a quantised weight as :func:`~qgalore_compile.quantize_` stores a float
    one of its dtype, bit for bit.

    Args:
        place: overwritten.
        rows: one of its :func:`blocks`.
        value: of those rows' shape, of any dtype, anywhere.
        name: for messages.

    Raises:
        ValueError: the values have no INT8 form.
    """
    if not isinstance(place, QuantizedWeight):
        _rows(place, rows).copy_(value)
        return
    value = value.to(place.device, place.dtype)
    if not has_int8_form(value):
        raise ValueError(f"{name} of shape {tuple(place.shape)} {NO_INT8_FORM}")
    found = QuantizedWeight.from_float(value, place.format)
    for own, part in zip(place.parts, found.parts, strict=True):
        _rows(own, rows).copy_(part)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor if rows == slice(None) else tensor[rows]
