"""The projector: sides, shapes, to and fro; how much two subspaces agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subspace_support import as_matrix, seeds, shapes
from torch import Tensor

from qgalore_compile.subspace.finder import leading_subspace
from qgalore_compile.subspace.projection import (
    official_similarity,
    project,
    project_back,
    projector_shape,
    side_of,
    subspace_similarity,
)

# -- sides ------------------------------------------------------------------------------------------------------------


@given(shapes, st.integers(1, 50))
def test_the_smaller_side_is_projected_and_a_square_on_the_right(shape: tuple[int, int], rank: int) -> None:
    m, n = shape
    rank = min(rank, m, n)
    grad = torch.randn(shape)
    projector = torch.randn(projector_shape(shape, rank))
    side = side_of(shape)
    assert side == ("right" if m >= n else "left")
    low = project(grad, projector, side)
    assert low.shape == ((m, rank) if side == "right" else (rank, n))
    assert low.numel() == rank * max(m, n)
    assert project_back(low, projector, side).shape == shape


@given(shapes, st.integers(1, 50), seeds)
def test_projecting_down_and_up_is_the_orthogonal_projection(shape: tuple[int, int], rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    grad = torch.randn(shape)
    rank = min(rank, *shape)
    projector = leading_subspace([grad], rank, side_of(shape), method="svd")
    side = side_of(shape)
    up = project_back(project(grad, projector, side), projector, side).double().numpy()
    g, p = grad.double().numpy(), as_matrix(projector, shape)
    np.testing.assert_allclose(up, g @ p if side == "right" else p @ g, atol=2e-5 * np.abs(g).max())


# -- similarity -------------------------------------------------------------------------------------------------------


def random_subspace(d: int, rank: int, side: str) -> Tensor:
    basis, _ = torch.linalg.qr(torch.randn(d, rank))
    return basis if side == "left" else basis.t()


sides = st.sampled_from(["left", "right"])


@given(st.integers(2, 60), st.integers(1, 60), seeds, sides)
def test_subspace_similarity_is_blind_to_signs_order_and_rotation(d: int, rank: int, seed: int, side: str) -> None:
    torch.manual_seed(seed)
    rank = min(rank, d)
    old, new = random_subspace(d, rank, side), random_subspace(d, rank, side)
    base = subspace_similarity(old, new, side)
    rotation, _ = torch.linalg.qr(torch.randn(rank, rank))
    signs = torch.diag(torch.randint(0, 2, (rank,)) * 2.0 - 1)
    shuffled = torch.eye(rank)[torch.randperm(rank)]
    for change in (rotation, signs, shuffled):
        moved = new @ change if side == "left" else change @ new
        assert subspace_similarity(old, moved, side) == pytest.approx(base, abs=1e-5)
        assert subspace_similarity(moved, new, side) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 8, 128, 250, 255])
@pytest.mark.parametrize("side", ["left", "right"])
def test_unrelated_subspaces_score_about_zero_at_every_rank(rank: int, side: str) -> None:
    scores = [
        subspace_similarity(random_subspace(256, rank, side), random_subspace(256, rank, side), side) for _ in range(10)
    ]
    assert sum(scores) / 10 < 0.05
    assert all(0 <= score <= 1 for score in scores)


def test_a_half_shared_subspace_lies_half_way() -> None:
    identity = torch.eye(40)
    old, new = identity[:8], torch.cat([identity[:4], identity[20:24]])
    # four of eight principal cosines are 1: c = 1/2, and r/d = 1/5
    assert subspace_similarity(old, new, "right") == pytest.approx((0.5 - 0.2) / 0.8)
    assert subspace_similarity(old.t(), new.t(), "left") == pytest.approx((0.5 - 0.2) / 0.8)
    assert subspace_similarity(identity[:8], identity[20:28], "right") == 0.0  # clipped from below


def test_the_whole_space_is_always_similar() -> None:
    assert subspace_similarity(torch.eye(7), random_subspace(7, 7, "left"), "left") == 1.0
    assert subspace_similarity(torch.ones(1, 1), -torch.ones(1, 1), "right") == 1.0


def test_official_similarity_is_the_signed_cosine_of_the_first_vectors() -> None:
    identity = torch.eye(6)
    old = identity[:2]
    tilted = torch.stack([0.6 * identity[0] + 0.8 * identity[3], identity[1]])
    for factor in (1.0, -1.0):
        assert official_similarity(old, factor * tilted, "right") == pytest.approx(0.6 * factor)
        assert official_similarity(old.t(), factor * tilted.t(), "left") == pytest.approx(0.6 * factor)
    assert official_similarity(old, identity[[1, 0]], "right") == pytest.approx(0.0)
