"""A gradient block by block is the gradient, and so is its norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qgalore_compile.kernels import rows
from qgalore_compile.kernels.ir.rows import Term

M, N, TOKENS = 50, 12, 9
PRODUCT, INDEXED = Term("product", (True, False)), Term("indexed")


def operands(dtype: torch.dtype = torch.float32) -> dict[Term, list[Tensor]]:
    """One token is masked, one occurs thrice, one counts from the end."""
    index = torch.tensor([[3, 49, 3], [7, -1, 3], [0, 8, 20]])
    mask = (index != 8).unsqueeze(-1)
    return {
        PRODUCT: [torch.randn(TOKENS, M).to(dtype), torch.randn(TOKENS, N).to(dtype)],
        INDEXED: [torch.randn(3, 3, N).to(dtype), mask, index],
    }


def whole(terms: list[Term], given: dict[Term, list[Tensor]]) -> Tensor:
    """In float64."""
    total = torch.zeros(M, N, dtype=torch.float64)
    for term in terms:
        if term is PRODUCT:
            left, right = given[term]
            total += left.double().t() @ right.double()
        else:
            values, mask, index = given[term]
            kept = torch.where(mask, values.double(), 0.0).view(-1, N)
            total.index_add_(0, index.reshape(-1) % M, kept)
    return total


TERMS = [[PRODUCT], [INDEXED], [PRODUCT, INDEXED], [INDEXED, PRODUCT, PRODUCT]]


@pytest.mark.parametrize("step", [1, 7, M])
@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(term.kind for term in terms))
def test_blocks_put_together_are_the_gradient(terms: list[Term], step: int) -> None:
    given = operands()
    fill = rows.filling(terms, [given[term] for term in terms], M)
    found = torch.full((M, N), float("nan"))  # whatever a block held before is gone
    for first in range(0, M, step):
        fill(found[first : first + step], first, min(first + step, M))
    torch.testing.assert_close(found.double(), whole(terms, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(term.kind for term in terms))
def test_the_norm_is_that_of_the_whole(terms: list[Term], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 7 * N * dtype.itemsize)  # several blocks, the last one short
    given = operands(dtype)
    tensors = [each for term in terms for each in given[term]]
    found = rows.squares("\n".join(map(str, terms)), tensors, M, N, dtype)
    assert (found.dtype, found.shape) == (torch.float32, ())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert float(found) == pytest.approx(float(whole(terms, given).square().sum()), rel=tolerance)


def test_the_norm_of_a_product_over_more_tokens_than_it_has_columns_is_summed_by_blocks() -> None:
    left, right = torch.randn(40, M), torch.randn(40, N)
    found = rows.squares(str(PRODUCT), [left, right], M, N, torch.float32)
    assert float(found) == pytest.approx(float((left.t() @ right).square().sum()), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("tokens", [1, TOKENS, 40])
def test_what_is_not_finite_makes_the_norm_so(tokens: int, value: float) -> None:
    """As the norm of the gradient itself, whose squares may overflow."""
    left, right = torch.randn(tokens, M), torch.randn(tokens, N)
    left[-1, 3] = value
    assert not (left.t() @ right).square().sum().isfinite()
    assert not rows.squares(str(PRODUCT), [left, right], M, N, torch.float32).isfinite()


def test_a_norm_is_never_negative() -> None:
    """Two tokens that cancel."""
    left = torch.randn(1, M).repeat(2, 1)
    right = torch.randn(1, N).repeat(2, 1)
    right[1].neg_()
    assert float(rows.squares(str(PRODUCT), [left, right], M, N, torch.float32)) >= 0
