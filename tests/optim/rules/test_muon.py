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


# -- of all of the gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_without_a_rank_the_momentum_of_all_of_the_gradient_is_made_orthogonal(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": None, "rule": "muon", "betas": (0.95, 0.999), "scale": 0.5}
    opt = qg.QGaLoreAdamW([group], lr=0.1, moments="32bit")
    assert set(opt.state[weight]) == {"step", "exp_avg", "grad_norm", "skipped_steps"}
    expected, momentum = torch.zeros(shape), torch.zeros(shape)
    for _ in range(3):
        weight.grad = torch.randn(shape)
        momentum = 0.95 * momentum + 0.05 * weight.grad
        nesterov = 0.95 * momentum + 0.05 * weight.grad
        wide = nesterov if shape[0] < shape[1] else nesterov.t()
        found = orthogonal(wide) * 20**0.5
        expected -= 0.1 * 0.5 * (found if shape[0] < shape[1] else found.t())
        opt.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_its_momentum_may_have_four_bits_and_the_schedule_is_empty() -> None:
    weight = nn.Parameter(torch.zeros(64, 80))
    opt = qg.QGaLoreAdamW([{"params": [weight], "rank": None, "rule": "muon"}], moments="4bit")
    assert opt.state[weight]["exp_avg"].numel() == 64 * 80 // 2
    assert opt.schedule() == []


def test_products_have_the_gradient_s_dtype() -> None:
    weight = nn.Parameter(torch.zeros(8, 20, dtype=torch.bfloat16))
    opt = qg.QGaLoreAdamW([{"params": [weight], "rank": None, "rule": "muon", "scale": 1.0}], lr=1.0, moments="32bit")
    weight.grad = torch.randn(8, 20).bfloat16()
    nesterov = 0.1 * (0.9 + 1) * weight.grad.float()
    opt.step()
    expected = -orthogonal(nesterov.bfloat16()).float() * 20**0.5
    torch.testing.assert_close(weight.detach().float(), expected, rtol=2e-2, atol=1e-2)
