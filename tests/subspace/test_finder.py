"""The subspace found in a gradient or in its factors, by every method; subspaces are compared as PPᵀ."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subspace_support import as_matrix, assert_orthonormal, captured, seeds, shapes, with_spectrum
from torch import Tensor

from qgalore_compile.subspace import finder as subspaces
from qgalore_compile.subspace.finder import METHODS, Gradient, full_gradient, leading_subspace
from qgalore_compile.subspace.projection import official_similarity, project, project_back, projector_shape, side_of

few = settings(max_examples=settings().max_examples // 2)


def subspace(
    factors: list[Tensor], rank: int, shape: tuple[int, int], method: str = "svd", seed: int = 0, **options: Any
) -> Tensor:
    """By a method; "power" starts from a random old projector."""
    old = random_projector(shape, rank) if method == "power" else None
    low = None if old is None else project(full_gradient(factors), old, side_of(shape))
    return leading_subspace(factors, rank, side_of(shape), method=method, low=low, seed=seed, **options)


def random_projector(shape: tuple[int, int], rank: int) -> Tensor:
    """An orthonormal one, always the same."""
    wide = torch.randn(min(shape), rank, generator=torch.Generator().manual_seed(5))
    columns, _ = torch.linalg.qr(wide)
    return columns.t() if side_of(shape) == "right" else columns


def decaying(shape: tuple[int, int]) -> Tensor:
    return with_spectrum(shape, 0.8 ** torch.arange(min(shape), dtype=torch.float64))


# -- the exact subspace -----------------------------------------------------------------------------------------------


@given(shapes, st.integers(1, 60), seeds, st.sampled_from([1e-30, 1e-10, 1.0, 1e15, 1e30]))
def test_svd_finds_the_subspace_of_numpy_s_at_every_scale(
    shape: tuple[int, int], rank: int, seed: int, scale: float
) -> None:
    torch.manual_seed(seed)
    rank = min(rank, *shape)
    # 0.8 from one singular value to the next: a subspace is defined up to rounding / gap
    values = torch.maximum(0.8 ** torch.arange(min(shape), dtype=torch.float64), torch.tensor(1e-3))
    values[rank:] *= 0.5
    grad = with_spectrum(shape, values) * scale
    projector = subspace([grad], rank, shape)
    assert projector.dtype == torch.float32
    assert projector.shape == projector_shape(shape, rank)
    assert_orthonormal(projector, shape)
    exact = oracle.projection_matrix(grad.numpy(), rank)
    np.testing.assert_allclose(as_matrix(projector, shape), exact, atol=2e-3)


@pytest.mark.parametrize("shape", [(300, 700), (431, 123), (1, 1), (1, 300), (300, 1), (6, 42)])
def test_svd_captures_the_exact_energy(shape: tuple[int, int]) -> None:
    grad = torch.randn(shape)
    rank = max(1, min(shape) // 3)
    values = np.linalg.svd(grad.double().numpy(), compute_uv=False)
    assert captured(grad, subspace([grad], rank, shape)) == pytest.approx((values[:rank] ** 2).sum(), rel=1e-5)


@given(shapes, st.integers(1, 50), seeds, st.sampled_from(METHODS))
def test_signs_are_canonical(shape: tuple[int, int], rank: int, seed: int, method: str) -> None:
    """The entry of largest magnitude of each vector is positive, so G and -G have one projector."""
    torch.manual_seed(seed)
    rank = min(rank, *shape)
    grad = torch.randn(shape)
    projector = subspace([grad], rank, shape, method)
    vectors = projector if side_of(shape) == "right" else projector.t()
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(subspace([-grad], rank, shape, method), projector, rtol=0, atol=1e-3)


@given(shapes, st.integers(1, 50), st.sampled_from(METHODS))
def test_a_zero_gradient_has_an_orthonormal_projector(shape: tuple[int, int], rank: int, method: str) -> None:
    rank = min(rank, *shape)
    projector = subspace([torch.zeros(shape)], rank, shape, method)
    assert_orthonormal(projector, shape)
    torch.testing.assert_close(subspace([torch.zeros(shape)], rank, shape, method), projector, rtol=0, atol=0)
    if rank < min(shape):  # random directions, not LAPACK's unit vectors
        assert not torch.equal(subspace([torch.zeros(shape)], rank, shape, method, seed=1), projector)


@given(shapes, st.integers(1, 10), st.integers(2, 50), seeds, st.sampled_from(METHODS))
def test_a_rank_deficient_gradient_is_kept_whole_and_its_completion_is_orthonormal(
    shape: tuple[int, int], true_rank: int, rank: int, seed: int, method: str
) -> None:
    torch.manual_seed(seed)
    rank = min(rank, *shape)
    true_rank = min(true_rank, rank)
    grad = torch.randn(shape[0], true_rank) @ torch.randn(true_rank, shape[1])
    projector = subspace([grad], rank, shape, method)
    assert_orthonormal(projector, shape)
    assert captured(grad, projector) == pytest.approx(float(grad.double().square().sum()), rel=1e-5)
    assert torch.equal(subspace([grad], rank, shape, method), projector)


# -- randomized -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 700), (431, 123), (300, 300)])
@pytest.mark.parametrize(
    ("decay", "iterations", "share"), [(0.5, 1, 0.93), (1.0, 1, 0.99), (0.5, 2, 0.98), (1.0, 2, 0.98)]
)
def test_randomized_captures_nearly_the_exact_energy(
    shape: tuple[int, int], decay: float, iterations: int, share: float
) -> None:
    grad = with_spectrum(shape, torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay)
    exact = captured(grad, subspace([grad], 32, shape))
    projector = subspace([grad], 32, shape, "randomized", power_iterations=iterations)
    assert_orthonormal(projector, shape)
    assert share * exact < captured(grad, projector) <= exact * (1 + 1e-6)


def test_randomized_is_exact_where_the_sketch_spans_the_smaller_side() -> None:
    grad = decaying((60, 30))
    torch.testing.assert_close(subspace([grad], 14, (60, 30), "randomized"), subspace([grad], 14, (60, 30)))


def test_randomized_depends_on_seed_step_and_parameter_and_on_nothing_else() -> None:
    grad = torch.randn(90, 120)

    def found(**where: int) -> Tensor:
        return leading_subspace([grad], 8, "left", method="randomized", **where)

    base = found(seed=1, step=2, param=3)
    torch.randn(7)
    assert torch.equal(found(seed=1, step=2, param=3), base)
    for other in (found(seed=2, step=2, param=3), found(seed=1, step=3, param=3), found(seed=1, step=2, param=4)):
        assert not torch.equal(other, base)


def test_svd_of_a_full_rank_gradient_depends_on_no_seed() -> None:
    grad = torch.randn(30, 40)
    assert torch.equal(subspace([grad], 8, (30, 40), seed=0), subspace([grad], 8, (30, 40), seed=1))


# -- power ------------------------------------------------------------------------------------------------------------


def drifting(shape: tuple[int, int], step: int) -> Tensor:
    """A gradient whose subspace turns a little from step to step."""
    generator = torch.Generator().manual_seed(3)
    (u, v), (a, b) = (
        [torch.linalg.qr(torch.randn(size, 40, generator=generator))[0] for size in shape] for _ in range(2)
    )
    turn = 0.1 * step
    return ((u + turn * a) * torch.arange(1, 41) ** -0.5) @ (v + turn * b).t()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (123, 431)])
def test_power_follows_a_drifting_subspace_within_3_per_cent_of_the_exact_energy(shape: tuple[int, int]) -> None:
    side = side_of(shape)
    projector = subspace([drifting(shape, 0)], 16, shape)
    for step in range(1, 6):
        grad = drifting(shape, step)
        projector = leading_subspace([grad], 16, side, method="power", low=project(grad, projector, side))
        assert_orthonormal(projector, shape)
        exact = captured(grad, subspace([grad], 16, shape))
        assert 0.97 * exact < captured(grad, projector) <= exact * (1 + 1e-6)


@given(shapes, st.integers(1, 30), seeds, st.sampled_from([1e-30, 1e-10, 1.0, 1e15, 1e30]))
def test_power_spans_a_times_a_transposed_times_the_old_projector_at_every_scale(
    shape: tuple[int, int], rank: int, seed: int, scale: float
) -> None:
    torch.manual_seed(seed)
    rank, side = min(rank, *shape), side_of(shape)
    grad = with_spectrum(shape, 0.9 ** torch.arange(min(shape), dtype=torch.float64))
    old = random_projector(shape, rank)
    a, p = (grad.double(), old.double()) if side == "left" else (grad.t().double(), old.t().double())
    exact, sizes = torch.linalg.qr(a @ (a.t() @ p))
    projector = leading_subspace([grad * scale], rank, side, method="power", low=project(grad * scale, old, side))
    assert_orthonormal(projector, shape)
    known = sizes.diagonal().abs()
    if float(known.min() / known.max()) > 1e-3:
        np.testing.assert_allclose(as_matrix(projector, shape), (exact @ exact.t()).numpy(), atol=2e-3)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_power_finds_singular_vectors_in_order_only_where_they_are_asked_for(shape: tuple[int, int]) -> None:
    grad, side = decaying(shape), side_of(shape)
    first = subspace([grad], 8, shape)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    mixed = turn @ first if side == "right" else first @ turn
    low = project(grad, mixed, side)
    ordered, basis = (
        leading_subspace([grad], 8, side, method="power", low=low, ordered=ordered) for ordered in (True, False)
    )
    torch.testing.assert_close(ordered, first, rtol=0, atol=1e-3)
    np.testing.assert_allclose(as_matrix(basis, shape), as_matrix(first, shape), atol=1e-3)
    assert official_similarity(first, ordered, side) == pytest.approx(1.0, abs=1e-5)
    assert not torch.allclose(basis, first, atol=0.1)


def test_power_without_an_old_projector_is_the_range_finder() -> None:
    grad = torch.randn(90, 120)
    found, finder = (leading_subspace([grad], 8, "left", method=method, seed=4) for method in ("power", "randomized"))
    assert torch.equal(found, finder)


def test_more_power_iterations_hold_more_energy() -> None:
    grad = with_spectrum((300, 400), torch.arange(1, 301, dtype=torch.float64) ** -0.5)
    held = [
        captured(grad, leading_subspace([grad], 32, "left", method="randomized", power_iterations=count))
        for count in (1, 2, 4)
    ]
    assert held == sorted(held)
    assert held[0] > 0.9 * captured(grad, subspace([grad], 32, (300, 400)))


# -- factors ----------------------------------------------------------------------------------------------------------


def random_factors(shape: tuple[int, int], tokens: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    m, n = shape
    return [factor.to(dtype) for t in tokens for factor in (torch.randn(t, m), torch.randn(t, n))]


@given(
    shapes, st.lists(st.integers(1, 9), min_size=1, max_size=3), seeds, st.sampled_from([torch.float32, torch.bfloat16])
)
def test_the_full_gradient_is_the_sum_over_micro_batches(
    shape: tuple[int, int], tokens: list[int], seed: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    factors = random_factors(shape, tokens, dtype)
    exact = sum(y.double().t() @ x.double() for y, x in zip(factors[::2], factors[1::2], strict=True))
    grad = full_gradient(factors)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), exact, rtol=0, atol=1e-4)
    assert torch.equal(full_gradient([grad.to(dtype)]), grad.to(dtype).float())


@given(
    shapes,
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(1, 60),
    seeds,
    st.sampled_from(["svd", "randomized"]),
)
def test_factors_have_the_subspace_of_their_product(
    shape: tuple[int, int], tokens: list[int], rank: int, seed: int, method: str
) -> None:
    """Fewer tokens than the rank or more: the same subspace as G's, and never less of its energy."""
    torch.manual_seed(seed)
    rank = min(rank, *shape)
    factors = random_factors(shape, tokens)
    grad = full_gradient(factors)
    projector = subspace(factors, rank, shape, method)
    assert_orthonormal(projector, shape)
    exact = captured(grad, subspace([grad], rank, shape))
    assert captured(grad, projector) == pytest.approx(exact, rel=1e-4 if method == "svd" else 0.05)
    assert torch.equal(subspace(factors, rank, shape, method), projector)


@few
@given(st.sampled_from([(40, 30), (30, 40), (53, 53)]), st.integers(1, 9), seeds, st.booleans())
def test_with_fewer_tokens_than_the_rank_the_known_directions_are_exact(
    shape: tuple[int, int], tokens: int, seed: int, split: bool
) -> None:
    torch.manual_seed(seed)
    factors = random_factors(shape, [tokens, 2] if split else [tokens])
    count = tokens + 2 * split
    grad = full_gradient(factors)
    projector = subspace(factors, 20, shape)
    known = projector[:count] if side_of(shape) == "right" else projector[:, :count]
    np.testing.assert_allclose(as_matrix(known, shape), oracle.projection_matrix(grad.numpy(), count), atol=1e-4)
    torch.testing.assert_close(
        project_back(project(grad, projector, side_of(shape)), projector, side_of(shape)), grad, rtol=0, atol=1e-4
    )


@few
@given(st.sampled_from([(40, 30), (30, 40), (53, 53)]), st.integers(1, 15), seeds)
def test_the_completion_is_the_same_with_and_without_g(shape: tuple[int, int], tokens: int, seed: int) -> None:
    """Every direction, and not only those of G: no path leaves what LAPACK happens to find in rounding."""
    torch.manual_seed(seed)
    factors = random_factors(shape, [tokens])
    found = [
        leading_subspace(which, 20, side_of(shape), method=method, seed=3, step=2, param=1)
        for which in (factors, [full_gradient(factors)])
        for method in ("svd", "randomized")
    ]
    for other in found[1:]:
        np.testing.assert_allclose(as_matrix(other, shape), as_matrix(found[0], shape), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(90, 300), (300, 90)])
def test_where_the_factors_are_cheaper_g_is_never_formed(
    method: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = random_factors(shape, [12])
    grad = full_gradient(factors)
    by_gradient = subspace([grad], 8, shape, method)
    low = project(grad, random_projector(shape, 8), side_of(shape))
    monkeypatch.setattr(subspaces, "full_gradient", refuse)
    gradient = Gradient(factors)
    found = leading_subspace(gradient, 8, side_of(shape), method=method, low=low)
    np.testing.assert_allclose(as_matrix(found, shape), as_matrix(by_gradient, shape), atol=1e-3)
    low = gradient.project(lambda dtype: found.to(dtype), side_of(shape))
    torch.testing.assert_close(low, project(grad, found, side_of(shape)), rtol=0, atol=1e-3)


def refuse(factors: object) -> None:
    raise AssertionError("G was formed")


@pytest.mark.parametrize("method", METHODS)
def test_with_fewer_tokens_than_the_rank_g_is_never_formed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspaces, "full_gradient", refuse)
    subspace(random_factors((40, 30), [9, 10]), 20, (40, 30), method)


def test_repeated_tokens_leave_directions_to_the_completion() -> None:
    grad_outputs, inputs = torch.randn(1, 30).expand(6, 30), torch.randn(1, 20).expand(6, 20)
    projector = subspace([grad_outputs, inputs], 8, (30, 20))
    assert_orthonormal(projector, (30, 20))
    torch.testing.assert_close(projector[0].abs(), inputs[0].abs() / inputs[0].norm())
