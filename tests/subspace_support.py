"""Gradients' shapes, and subspaces as matrices: what the tests of projections, subspaces and refreshes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from torch import Tensor

from qgalore_compile.projection import side_of

EDGES = [1, 2, 6, 7, 13, 42, 53, 123]
side_lengths = st.one_of(st.integers(1, 40), st.sampled_from(EDGES))
shapes = st.tuples(side_lengths, side_lengths)
seeds = st.integers(0, 2**20)


def as_matrix(projector: Tensor, shape: Sequence[int]) -> np.ndarray:
    """PPᵀ, PᵀP on the right side."""
    p = projector.double().numpy()
    return p.T @ p if side_of(shape) == "right" else p @ p.T
