"""APOLLO's rule: the gradient itself, scaled by what Adam does in a random subspace of which nothing is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import drawn
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.subspace.projection import side_of

ALPHA, LR = 0.25, 0.01


def optimizer(shape: tuple[int, int], rank: int, **keys: Any) -> tuple[qg.QGaLoreAdamW, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": rank, "rule": "apollo", "update_proj_gap": 3, **keys}
    return qg.QGaLoreAdamW([group], lr=LR, moments="32bit"), weight


def projector(opt: qg.QGaLoreAdamW, weight: nn.Parameter) -> Tensor:
    weight.grad = torch.zeros_like(weight)
    return drawn(opt, weight, side_of(weight.shape))


def test_nothing_is_stored_of_the_projector_and_no_refresh_is_due() -> None:
    opt, weight = optimizer((8, 20), 4)
    assert not {"projector", "schedule"} & opt.state[weight].keys()
    assert opt.schedule() == []


def test_its_entries_are_signs_that_change_with_every_gap_seed_and_parameter() -> None:
    opt, weight = optimizer((8, 20), 4)
    seen = []
    for _ in range(7):
        seen.append(projector(opt, weight))
        weight.grad = torch.randn(8, 20)
        opt.step()
    assert all(each.abs().eq(0.5).all() for each in seen)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[3], seen[5])
    assert not torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[3], seen[6])
    other, another = optimizer((8, 20), 4, seed=1)
    assert not torch.equal(projector(other, another), seen[0])


def test_columns_keep_their_norms_on_average() -> None:
    opt, weight = optimizer((256, 400), 64)
    g = torch.randn(256, 400)
    ratios = (projector(opt, weight).t() @ g).norm(dim=0) / g.norm(dim=0)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_the_first_update_is_the_gradient_with_every_column_at_full_rank_adam_s_norm(shape: tuple[int, int]) -> None:
    opt, weight = optimizer(shape, 4)
    weight.grad = torch.randn(shape)
    p = projector(opt, weight).clone()
    weight.grad = g = torch.randn(shape)
    opt.step()
    r = p.t() @ g if shape[0] < shape[1] else g @ p.t()
    dim = 0 if shape[0] < shape[1] else 1
    # the first step's N is R's signs: every column of it has the norm √r
    phi = (8 / 4) ** 0.5 * 4**0.5 / r.norm(dim=dim, keepdim=True)
    torch.testing.assert_close(weight.detach(), -LR * ALPHA * phi * g, rtol=1e-4, atol=1e-7)


def test_of_rank_one_all_columns_have_one_factor() -> None:
    opt, weight = optimizer((8, 20), 1)
    weight.grad = g = torch.randn(8, 20)
    opt.step()
    factors = weight.detach() / g
    torch.testing.assert_close(factors, factors.mean().expand(8, 20), rtol=1e-4, atol=0)
