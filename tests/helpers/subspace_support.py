"""Gradients' shapes, and subspaces as matrices: what the tests of projections, subspaces and refreshes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from qgalore_compile.subspace.projection import project, side_of

EDGES = [1, 2, 6, 7, 13, 42, 53, 123]
side_lengths = st.one_of(st.integers(1, 40), st.sampled_from(EDGES))
shapes = st.tuples(side_lengths, side_lengths)
seeds = st.integers(0, 2**20)


def as_matrix(projector: Tensor, shape: Sequence[int]) -> np.ndarray:
    """PPᵀ, PᵀP on the right side."""
    p = projector.double().numpy()
    return p.T @ p if side_of(shape) == "right" else p @ p.T


def assert_orthonormal(projector: Tensor, shape: tuple[int, int]) -> None:
    p = projector.double()
    gram = p @ p.t() if side_of(shape) == "right" else p.t() @ p
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-5)


def captured(gradient: Tensor, projector: Tensor) -> float:
    """‖R‖² of orthonormal P: the energy that the subspace holds."""
    low = project(gradient.double(), projector.double(), side_of(gradient.shape))
    return float(low.square().sum())


def with_spectrum(shape: tuple[int, int], values: Tensor) -> Tensor:
    """A gradient with these singular values."""
    u, _ = torch.linalg.qr(torch.randn(shape[0], len(values), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], len(values), dtype=torch.float64))
    return ((u * values) @ v.t()).float()
