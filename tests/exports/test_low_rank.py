"""LoRC and EoRA against NumPy's SVD in float64: no product of their rank does better, by Eckart and Young."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qgalore_compile.exports import LowRank, eora, lorc

SHAPES = [(7, 13), (13, 7), (24, 24), (1, 5)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def inputs(n: int, tokens: int, seed: int = 1) -> Tensor:
    """X (n, tokens) whose rows differ in size by decades."""
    return numbers(n, tokens, seed=seed) * torch.logspace(0, -3, n, dtype=torch.float64)[:, None]


def left_over(error: Tensor, product: LowRank, x: Tensor | None = None) -> float:
    """‖(E - B A) X‖ in NumPy, of which X is the identity where none is given."""
    difference = error.numpy() - product.left.numpy() @ product.right.numpy()
    return float(np.linalg.norm(difference if x is None else difference @ x.numpy()))


def tail(matrix: Tensor, rank: int) -> float:
    """The least that a product of the rank leaves of a matrix: the norm of its other singular values."""
    return float(np.linalg.norm(np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lorc_leaves_the_tail_of_the_singular_values(shape: tuple[int, int]) -> None:
    error = numbers(*shape)
    for rank in range(1, min(shape) + 1):
        product = lorc(error, rank)
        assert (product.left.shape, product.right.shape) == ((shape[0], rank), (rank, shape[1]))
        assert left_over(error, product) == pytest.approx(tail(error, rank), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eora_leaves_the_tail_of_the_error_on_the_inputs(shape: tuple[int, int]) -> None:
    error, x = numbers(*shape), inputs(shape[1], 50)
    for rank in range(1, min(shape) + 1):
        product = eora(error, x @ x.mT, rank)
        assert (product.left.shape, product.right.shape) == ((shape[0], rank), (rank, shape[1]))
        assert left_over(error, product, x) == pytest.approx(tail(error @ x, rank), rel=1e-9, abs=1e-9)


def test_on_the_inputs_eora_beats_lorc_and_any_other_product_tried() -> None:
    error, x, rank = numbers(12, 10), inputs(10, 40), 3
    best = eora(error, x @ x.mT, rank)
    least = left_over(error, best, x)
    assert least < 0.95 * left_over(error, lorc(error, rank), x)
    for seed in range(200):
        left = numbers(12, rank, seed=seed)
        # the best second factor of a random first one, and both factors moved a little
        fitted = LowRank(left, torch.linalg.lstsq(left, error).solution)
        moved = LowRank(best.left + 0.01 * left, best.right + 0.01 * numbers(rank, 10, seed=1000 + seed))
        assert least < left_over(error, fitted, x)
        assert least < left_over(error, moved, x)


def test_it_is_the_papers_projection_there_and_back() -> None:
    """B' A' = SVD_r(E Q √Λ), A = A' (Q √Λ)⁻¹, written out."""
    error, x, rank = numbers(9, 6), inputs(6, 30), 2
    values, vectors = np.linalg.eigh((x @ x.mT).numpy())
    there = vectors * np.sqrt(values)
    u, s, vt = np.linalg.svd(error.numpy() @ there, full_matrices=False)
    theirs = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(there)
    ours = eora(error, x @ x.mT, rank)
    np.testing.assert_allclose((ours.left @ ours.right).numpy(), theirs, rtol=1e-7, atol=1e-9)


def test_equal_inputs_in_every_direction_make_eora_lorc() -> None:
    error = numbers(8, 11)
    ours, theirs = eora(error, 3.0 * torch.eye(11, dtype=torch.float64), 4), lorc(error, 4)
    torch.testing.assert_close(ours.left @ ours.right, theirs.left @ theirs.right)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_inputs_that_miss_directions_are_no_trouble(tokens: int) -> None:
    error, x, rank = numbers(12, 20), numbers(20, tokens, seed=2), 5
    product = eora(error, x @ x.mT, rank)
    assert bool(torch.isfinite(product.right).all())
    assert left_over(error, product, x) < 1e-5 * float((error @ x).norm())
    # the rank that they leave over goes to what they cannot see of the error
    unseen = error - error @ x @ torch.linalg.pinv(x)
    assert left_over(error, product) <= tail(unseen, rank - tokens) + 1e-6


def test_a_layer_without_any_input_gets_lorc() -> None:
    error = numbers(6, 7)
    ours, theirs = eora(error, torch.zeros(7, 7, dtype=torch.float64), 2), lorc(error, 2)
    torch.testing.assert_close(ours.left @ ours.right, theirs.left @ theirs.right)


def test_factors_have_the_errors_dtype_and_are_computed_in_float64() -> None:
    error, x = numbers(30, 40).float(), inputs(40, 200).float()
    product = eora(error, x @ x.mT, 4)
    assert product.left.dtype == product.right.dtype == torch.float32
    exact = eora(error.double(), (x @ x.mT).double(), 4)
    torch.testing.assert_close(product.left @ product.right, (exact.left @ exact.right).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_that_no_product_has_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1 … 5, the least side of 5 × 8"):
        lorc(torch.ones(5, 8), rank)
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 1 … 5"):
        eora(torch.ones(5, 8), torch.eye(8), rank)


def test_moments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8 columns of an error need a second moment of 8 × 8"):
        eora(torch.ones(5, 8), torch.eye(5), 1)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        eora(torch.ones(5, 8), torch.full((8, 8), torch.nan), 1)
    with pytest.raises(ValueError, match="two dimensions"):
        lorc(torch.ones(5), 1)
