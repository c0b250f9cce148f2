"""Gradients of an embedding and a head, without a buffer of their size.

An embedding's is zero but for the rows that a batch names; a head's is a product over the batch's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qgalore_compile._ops import define
from qgalore_compile.kernels.ir.rows import Term, shared

BLOCK_BYTES = 1 << 21
"""Of a gradient that exists at a time: it stays in the second-level cache until it has been read."""


def _summed(values: Tensor, mask: Tensor, index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(rows that are sent something, ascending; the sum of what each is sent, float32)."""
    flat, kept = index.reshape(-1).long(), mask.reshape(-1)
    given = values.reshape(len(flat), math.prod(values.shape[index.dim() :]))
    if not bool(kept.all()):
        flat, given = flat[kept], given[kept]
    touched, place = torch.unique(torch.where(flat < 0, flat + rows, flat), return_inverse=True)
    sums = torch.zeros((len(touched), given.shape[1]), dtype=torch.float32, device=values.device)
    sums.index_add_(0, place, given.to(torch.float32))
    return touched, sums


def _sum_rows(values: Tensor, mask: Tensor, indices: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    (index,) = indices
    touched, sums = _summed(values, mask, index, rows)
    out = torch.zeros((rows, sums.shape[1]), dtype=dtype, device=values.device)
    out.index_copy_(0, touched, sums.to(dtype))
    return out.view(rows, *values.shape[index.dim() :])


def _fake(values: Tensor, mask: Tensor, indices: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    return values.new_empty((rows, *values.shape[indices[0].dim() :]), dtype=dtype)


sum_rows = define(
    "sum_rows(Tensor values, Tensor mask, Tensor[] indices, SymInt rows, ScalarType dtype) -> Tensor", _sum_rows, _fake
)
"""Rows of a (rows, …) tensor, each the sum of the values (*, …) that a tensor of indices (*) sends there; zeros where
it sends none.  Values whose mask (*, 1, …) is False go nowhere.  Summed in float32, in the order of the values, and
rounded to ``dtype`` once; float32 exists for the rows that are sent something, alone."""


# -- by blocks of rows ------------------------------------------------------------------------------------------------

Fill = Callable[[Tensor, int, int], None]
"""Write rows ``first`` to ``last`` of a gradient into a block (last − first, columns)."""


def filling(terms: Sequence[Term], operands: Sequence[Sequence[Tensor]], rows: int) -> Fill:
    """What writes a gradient of those terms block by block; what all blocks need is computed here.

    Args:
        terms: the summands.
        operands: the tensors of each.
        rows: of the gradient.
    """
    makers = [_product(*term.matrices(tensors)) if term.kind == "product" else _indexed(rows, *tensors)
              for term, tensors in zip(terms, operands, strict=True)]  # fmt: skip

    def fill(block: Tensor, first: int, last: int) -> None:
        for index, each in enumerate(makers):
            each(block, first, last, index > 0)

    return fill


def _product(left: Tensor, right: Tensor) -> Callable[[Tensor, int, int, bool], None]:
    def fill(block: Tensor, first: int, last: int, add: bool) -> None:
        if add:
            torch.addmm(block, left[first:last], right, out=block)
        else:
            torch.mm(left[first:last], right, out=block)

    return fill


def _indexed(rows: int, values: Tensor, mask: Tensor, index: Tensor) -> Callable[[Tensor, int, int, bool], None]:
    touched, sums = _summed(values, mask, index, rows)

    def fill(block: Tensor, first: int, last: int, add: bool) -> None:
        if not add:
            block.zero_()
        begin, end = (int(each) for each in torch.searchsorted(touched, torch.tensor([first, last])))
        if begin < end:
            block.index_add_(0, touched[begin:end] - first, sums[begin:end].to(block.dtype))

    return fill


def _squares(terms: str, operands: Sequence[Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    parts = [Term.parse(line) for line in terms.splitlines()]
    given, _ = shared(parts, operands)
    if len(parts) == 1 and parts[0].kind == "product" and dtype == torch.float32:
        left, right = parts[0].matrices(given[0])
        if left.shape[1] <= min(rows, columns):
            # ‖A B‖² = ⟨AᵀA, B Bᵀ⟩: 2 k² (m + n) operations instead of 2 k m n
            return torch.dot((left.t() @ left).view(-1), (right @ right.t()).view(-1)).clamp(min=0)
    fill, total = filling(parts, given, rows), torch.zeros((), dtype=torch.float64)
    step = max(1, BLOCK_BYTES // (columns * dtype.itemsize))
    block = torch.empty((min(step, rows), columns), dtype=dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        fill(block[: last - first], first, last)
        total += block[: last - first].float().square().sum()
    return total.float()


def _squares_fake(terms: str, operands: Sequence[Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return operands[0].new_empty((), dtype=torch.float32)


squares = define(
    "squares(str terms, Tensor[] operands, int rows, int columns, ScalarType dtype) -> Tensor", _squares, _squares_fake
)
"""‖G‖² of a gradient (rows, columns) of type ``dtype`` that is given by its terms, a line each: 0-d float32."""
