"""The factored rule: a momentum of all of the gradient, over a second moment of rows and columns that sketches tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import drawn
from torch import nn

import qgalore_compile as qg
from qgalore_compile.formats import Format
from qgalore_compile.optim import layout

SHAPES = ((12, 20), (20, 12), (7, 7), (5, 33))
BETA1, BETA2, EPS, LR, ALPHA = 0.9, 0.999, 1e-8, 0.01, 0.25


def optimizer(shape: tuple[int, int], rank: int = 4, **keys: object) -> tuple[qg.QGaLoreAdamW, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": rank, "rule": "factored", "momentum_format": "32bit", **keys}
    return qg.QGaLoreAdamW([group], lr=LR), weight


@pytest.mark.parametrize("shape", SHAPES)
def test_five_steps_are_those_of_the_formula_in_float64(shape: tuple[int, int]) -> None:
    (m, n), (opt, weight) = shape, optimizer(shape)
    expected, momentum = np.zeros(shape), np.zeros(shape)
    a, b = np.zeros(m), np.zeros(n)
    for t in range(1, 6):
        weight.grad = torch.randn(shape) * torch.rand(m, 1)
        g = weight.grad.double().numpy()
        p, q = (drawn(opt, weight, side).double().numpy() for side in ("right", "left"))
        opt.step()
        a = BETA2 * a + (1 - BETA2) * np.square(g @ p.T).sum(1) / n
        b = BETA2 * b + (1 - BETA2) * np.square(q.T @ g).sum(0) / m
        momentum = BETA1 * momentum + (1 - BETA1) * g
        v = np.outer(a, b) / a.mean() / (1 - BETA2**t)
        expected -= LR * ALPHA * momentum / (1 - BETA1**t) / (np.sqrt(v) + EPS)
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=2e-5, atol=1e-9)


def test_sketches_tell_the_mean_squares_of_rows_and_columns() -> None:
    """Their mean over steps, that is: each is off by √(2 / rank)."""
    opt, weight = optimizer((64, 96), rank=8, betas=(0.9, 0.99))
    g = torch.randn(64, 96) * torch.logspace(0, -2, 64).unsqueeze(1)
    for _ in range(300):
        weight.grad = g
        opt.step()
    state = opt.state[weight]
    for name, dim in (("exp_avg_sq_row", 1), ("exp_avg_sq_col", 0)):
        ratio = state[name] / (1 - 0.99**300) / g.square().mean(dim)
        assert float(ratio.mean()) == pytest.approx(1, abs=0.02)
        assert float(ratio.std()) < 0.1


def test_both_sketches_are_drawn_anew_in_every_step() -> None:
    opt, weight = optimizer((12, 20), update_proj_gap=100)
    seen = []
    for _ in range(2):
        weight.grad = torch.randn(12, 20)
        seen += [drawn(opt, weight, side) for side in ("left", "right")]
        opt.step()
    assert [tuple(each.shape) for each in seen] == [(12, 4), (4, 20)] * 2
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0].flatten()[:16], seen[1].flatten()[:16])


@pytest.mark.parametrize(
    ("weights", "momentum", "expected"),
    [
        (None, "4bit", "moment4/128+rows"),
        ("int8/64", "4bit", "moment4/64+rows"),
        ("nf4/32+double", "8bit", "e4m3/32"),
        ("int8/64", "e5m2/16", "e5m2/16"),
        (None, "32bit", "float32"),
    ],
)
def test_groups_of_the_momentum_are_the_weight_s_so_that_one_kernel_has_both(
    weights: str | None, momentum: str, expected: str
) -> None:
    net = nn.Sequential(nn.Linear(80, 96, bias=False))
    if weights is not None:
        qg.quantize_(net, format=weights, targets=["0"])
    opt = qg.QGaLoreAdamW(qg.param_groups(net, rank=4, rule="factored", momentum_format=momentum, targets=["0"]))
    weight, form = net[0].weight, Format.parse(expected)
    group = opt.param_groups[0]
    assert group.formats.momenta == {layout.width_of(weight): form}
    stored = [opt.state[weight][name] for name in layout.momentum_names(form)]
    assert [tuple(each.shape) for each in stored] == [form.shape_of(part, (96, 80)) for part in form.parts]


def test_in_four_bits_it_keeps_fewer_bytes_than_two_moments_of_a_quarter_of_the_side_and_their_projector() -> None:
    """At the ranks of GaLore's authors, whatever the shape: 512 × 512 and 1376 × 512 at rank 128."""
    for shape in ((512, 512), (1376, 512), (512, 1376)):
        sizes = []
        for rule in ("factored", "galore"):
            opt = qg.QGaLoreAdamW([{"params": [nn.Parameter(torch.zeros(shape))], "rank": 128, "rule": rule}])
            (state,) = opt.state.values()
            sizes.append(sum(tensor.nbytes for name, tensor in state.items() if name != "schedule"))
        assert sizes[0] < sizes[1]


def test_nothing_of_a_small_element_is_lost_in_four_bits() -> None:
    """To nearest, an element a thousandth of its group's largest never leaves zero."""
    opt, weight = optimizer((1, 128), rank=1, momentum_format="4bit")
    g = torch.full((1, 128), 1e-3)
    g[0, 0] = 1.0
    for _ in range(400):
        weight.grad = g
        opt.step()
    assert float(weight.detach()[0, 1:].mean()) == pytest.approx(-400 * LR * ALPHA, rel=0.05)  # as float's would
