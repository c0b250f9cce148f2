"""Eager operations whose results are off by their rounding, and those that have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qgalore_compile.reports.perturbed import AMPLITUDE, Perturbed, Products

EPS = torch.finfo(torch.float32).eps


def test_a_product_is_off_by_its_rounding_and_not_more() -> None:
    a, b = torch.rand(40, 30) + 0.5, torch.rand(30, 20) + 0.5
    with Perturbed(0):
        found = a @ b
    off = (found / (a @ b) - 1).abs()
    assert 0 < off.max() <= 2.5 * AMPLITUDE[torch.float32] * EPS
    assert off.mean() > EPS


def test_where_terms_cancel_the_error_is_that_of_the_terms() -> None:
    x = torch.tensor([[1.0, -1.0]]) * 0.7
    with Perturbed(0):
        found = (x @ torch.ones(2, 1)).item()
    assert 0 < abs(found) < 20 * EPS


def test_a_sum_of_zeros_stays_zero() -> None:
    with Perturbed(0):
        assert (torch.zeros(3, 4) @ torch.randn(4, 2)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_element_by_element_operation_is_off_in_its_own_dtype(dtype: torch.dtype) -> None:
    x = torch.rand(1000).to(dtype) + 0.3
    with Perturbed(0):
        found = x.exp()
    off = (found.double() / x.exp().double() - 1).abs().max()
    assert 0 < off <= (AMPLITUDE[dtype] + 1) * torch.finfo(dtype).eps


def test_products_may_have_the_rounding_of_a_narrower_dtype() -> None:
    a = torch.rand(30, 30)
    with Perturbed(0, torch.bfloat16):
        found, same = a @ a, a.exp()
    assert (found / (a @ a) - 1).abs().max() > 1e-3
    assert (same / a.exp() - 1).abs().max() < 1e-5


def test_what_computes_nothing_is_exact() -> None:
    x = torch.randn(6, 8)
    with Perturbed(0):
        found = [x.t(), x.relu(), x.clamp(-1, 1), x[2:], -x, x.reshape(8, 6), x.max(), torch.where(x > 0, x, 0.0)]
    exact = [x.t(), x.relu(), x.clamp(-1, 1), x[2:], -x, x.reshape(8, 6), x.max(), torch.where(x > 0, x, 0.0)]
    assert all(map(torch.equal, found, exact))


def test_counts_and_masks_are_exact() -> None:
    tokens = torch.randint(0, 9, (20,))
    with Perturbed(0):
        count = (tokens > 3).sum()
        whole = torch.ones(7).sum() + torch.arange(4).float().sum()
        assert not torch.equal(torch.rand(7).sum(), torch.rand(7).sum())
    assert count == (tokens > 3).sum()
    assert whole == 13


def test_one_seed_makes_the_same_errors_and_another_others() -> None:
    a = torch.randn(5, 5)

    def run(seed: int) -> torch.Tensor:
        with Perturbed(seed):
            return (a @ a).tanh()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_torchs_own_generator_goes_on_as_without() -> None:
    torch.manual_seed(0)
    plain = nn.functional.dropout(torch.ones(50))
    torch.manual_seed(0)
    with Perturbed(3):
        torch.ones(4, 4) @ torch.rand(4, 4, generator=torch.Generator())
        assert torch.equal(nn.functional.dropout(torch.ones(50)).bool(), plain.bool())


def test_gradients_are_off_too() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    (x @ x.t()).square().mean().backward()
    exact = x.grad
    x.grad = None
    with Perturbed(0):
        (x @ x.t()).square().mean().backward()
    assert x.grad is not None
    assert not torch.equal(x.grad, exact)
    torch.testing.assert_close(x.grad, exact, rtol=1e-4, atol=1e-5)


def test_dtypes_of_products_are_seen_under_autocast_too() -> None:
    linear = nn.Linear(4, 4)
    with Products() as watch:
        linear(torch.ones(2, 4))
        assert watch.dtypes == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            linear(torch.ones(2, 4))
    assert watch.dtypes == {torch.float32, torch.bfloat16}
