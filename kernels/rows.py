"""``sum_rows``: what an embedding's gradient is, without a float32 buffer of the embedding's size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore_compile._ops import define


def _sum_rows(values: Tensor, mask: Tensor, indices: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    (index,) = indices
    flat, kept = index.reshape(-1).long(), mask.reshape(-1)
    sizes = values.shape[index.dim() :]
    given = values.reshape(len(flat), math.prod(sizes))
    if not bool(kept.all()):
        flat, given = flat[kept], given[kept]
    touched, place = torch.unique(torch.where(flat < 0, flat + rows, flat), return_inverse=True)
    sums = torch.zeros((len(touched), given.shape[1]), dtype=torch.float32, device=values.device)
    sums.index_add_(0, place, given.to(torch.float32))
    out = torch.zeros((rows, given.shape[1]), dtype=dtype, device=values.device)
    out.index_copy_(0, touched, sums.to(dtype))
    return out.view(rows, *sizes)


def _fake(values: Tensor, mask: Tensor, indices: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    return values.new_empty((rows, *values.shape[indices[0].dim() :]), dtype=dtype)


sum_rows = define(
    "sum_rows(Tensor values, Tensor mask, Tensor[] indices, SymInt rows, ScalarType dtype) -> Tensor", _sum_rows, _fake
)
"""Rows of a (rows, …) tensor, each the sum of the values (*, …) that a tensor of indices (*) sends there; zeros where
it sends none.  Values whose mask (*, 1, …) is False go nowhere.  Summed in float32, in the order of the values, and
rounded to ``dtype`` once; float32 exists for the rows that are sent something, alone."""
