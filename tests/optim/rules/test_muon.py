"""Muon's rule: one moment, and an update all of whose singular values are alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgalore_compile as qg
from qgalore_compile.optim.rules.muon import orthogonal


@pytest.mark.parametrize("shape", [(4, 4), (5, 33), (1, 9)])
def test_singular_values_come_near_one_whatever_they_were(shape: tuple[int, int]) -> None:
    left, right = (torch.linalg.qr(torch.randn(size, shape[0]))[0] for size in shape)
    sizes = torch.logspace(0, -1, shape[0])
    found = orthogonal(left @ sizes.diag() @ right.t())
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25
    torch.testing.assert_close((found @ right).diagonal().sign().abs(), torch.ones(shape[0]))


def test_of_zero_it_is_zero() -> None:
    assert not orthogonal(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_an_update_has_the_rank_of_the_subspace_and_elements_of_adam_s_size(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": 4, "rule": "muon", "refresh": "svd", "quant": False, "scale": 1.0}
    opt = qg.QGaLoreAdamW([group], lr=1.0, moments="32bit")
    weight.grad = torch.randn(shape)
    opt.step()
    values = torch.linalg.svdvals(weight.detach())
    assert values[4:].max() < 1e-4
    assert 0.6 * 20**0.5 < float(values[3]) <= float(values[0]) < 1.25 * 20**0.5


def test_one_moment_is_kept() -> None:
    weight = nn.Parameter(torch.zeros(64, 80))
    opt = qg.QGaLoreAdamW([{"params": [weight], "rank": 8, "rule": "muon"}], moments="8bit")
    assert {name for name in opt.state[weight] if name.startswith("exp_avg")} == {"exp_avg", "exp_avg_absmax"}
