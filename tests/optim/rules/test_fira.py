"""Fira's rule, beside its formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import qgalore_compile as qg

Matrix = NDArray[np.float64]
LR, ALPHA, BETAS, EPS = 0.01, 0.25, (0.9, 0.999), 1e-8


def fira(weight: Matrix, grads: list[Matrix], rank: int, growth: float = 1.01) -> Matrix:
    """Algorithm 1 on the left (m <= n), one subspace for all steps, limited by ‖R ∘ φ‖."""
    left, _, _ = np.linalg.svd(grads[0], full_matrices=False)
    p, (beta1, beta2), last = left[:, :rank], BETAS, 0.0
    m = v = np.zeros((rank, weight.shape[1]))
    for step, g in enumerate(grads, 1):
        r = p.T @ g
        m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r * r
        n = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + EPS)
        phi = np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0)
        norm = np.linalg.norm(r * phi)
        factor = min(1.0, growth * last / norm) if last else 1.0
        last = factor * norm
        weight = weight - LR * (ALPHA * p @ n + factor * (g - ALPHA * p @ r) * phi)
    return weight


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_steps_are_those_of_the_paper_on_either_side_and_the_limiter_acts(transposed: bool, clip: float | None) -> None:
    draws = np.random.default_rng(0)
    first = draws.normal(size=(10, 24))
    grads = [draws.normal(size=(10, 24)) * (100 if step == 5 else 1) for step in range(9)]
    weight = nn.Parameter(torch.tensor(first.T if transposed else first, dtype=torch.float32).contiguous())
    group = {"params": [weight], "rank": 4, "rule": "fira", "refresh": "svd", "quant": False, "stagger": False}
    opt = qg.QGaLoreAdamW([group], lr=LR, moments="32bit", max_grad_norm=clip)
    left, _, _ = np.linalg.svd(grads[0], full_matrices=False)
    clipped = []
    for g in grads:
        weight.grad = torch.tensor(g.T if transposed else g, dtype=torch.float32).contiguous()
        opt.step()
        norm = np.linalg.norm(left[:, :4].T @ g)
        clipped.append(g if clip is None else g * min(1.0, clip / (norm + 1e-6)))
    expected = fira(first, clipped, 4)
    assert np.abs(expected - first).max() > 0.05
    np.testing.assert_allclose(
        weight.detach().numpy().T if transposed else weight.detach().numpy(), expected, atol=2e-5
    )
    if clip is None:  # which leaves the limiter nothing to do
        assert np.abs(expected - fira(first, clipped, 4, growth=np.inf)).max() > 1e-3


def test_a_column_whose_projection_is_zero_gets_nothing() -> None:
    weight = nn.Parameter(torch.zeros(6, 8))
    opt = qg.QGaLoreAdamW([{"params": [weight], "rank": 2, "rule": "fira", "quant": False}], lr=LR, moments="32bit")
    weight.grad = torch.randn(6, 8)
    weight.grad[:, 3] = 0
    opt.step()
    assert weight.detach()[:, 3].eq(0).all()
    assert weight.detach()[:, :3].ne(0).all()
