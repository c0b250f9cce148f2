"""Stochastic rounding carries updates far below a quantum, without bias, wherever in the range a weight lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.rng import random_bits
from qgalore_compile.weights import write_back_

Rounding: TypeAlias = Callable[[qg.Int8Weight, Tensor, int], None]

ROWS, GROUP, QUANTUM = 512, 256, 2 / 255
# Steps, so that each of the four bins of |w| (32,500 weights) has a relative standard error
# sqrt((1 - u) / (u · weights · steps)) below 0.4 %: 2 % are five of them.
STEPS = {0.02: 100, 0.05: 40, 0.1: 20, 0.25: 8, 0.5: 4}
BINS = [(0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8)]


def stochastically(weight: qg.Int8Weight, value: Tensor, step: int) -> None:
    write_back_(weight, value, random_bits(value.shape, seed=7, step=step, param=2), torch.tensor(True))


def to_nearest(weight: qg.Int8Weight, value: Tensor, step: int) -> None:
    write_back_(weight, value, None, torch.tensor(True))


def realised_drift(quanta: float, rounding: Rounding) -> list[float]:
    """Realised / expected drift in each bin of |w|, under a constant update of ``quanta`` a step."""
    start = torch.linspace(-0.8, 0.8, ROWS * GROUP)[torch.randperm(ROWS * GROUP)].reshape(ROWS, GROUP)
    # extremes that no update touches keep the grid of every group where it is
    start[:, 0], start[:, 1] = -1.0, 1.0
    sign = torch.where(torch.arange(GROUP) % 4 < 2, 1.0, -1.0).expand(ROWS, GROUP).clone()
    sign[:, :2] = 0
    weight = qg.Int8Weight.from_float(start)
    first = weight.dequantize()
    for step in range(STEPS[quanta]):
        rounding(weight, weight.dequantize() + sign * quanta * QUANTUM, step)
    drift = (weight.dequantize() - first) * sign / (quanta * QUANTUM * STEPS[quanta])
    return [float(drift[(first.abs() >= low) & (first.abs() < high) & (sign != 0)].mean()) for low, high in BINS]


@pytest.mark.parametrize("quanta", STEPS)
def test_stochastic_rounding_realises_the_expected_drift_in_every_bin(quanta: float) -> None:
    drift = realised_drift(quanta, stochastically)
    assert drift == pytest.approx([1.0] * 4, abs=0.02)


@pytest.mark.parametrize("quanta", STEPS)
def test_rounding_to_nearest_fails_the_same_check(quanta: float) -> None:
    drift = realised_drift(quanta, to_nearest)
    assert all(abs(realised - 1.0) > 0.02 for realised in drift)


def test_weights_at_the_extremes_of_their_group_move_as_far_as_they_should() -> None:
    """The published code clamps there: 0.87 of the drift for the top half of the levels.  Here the grid moves along."""
    weight = qg.Int8Weight.from_float(torch.rand(ROWS, GROUP) * 2 - 1)
    first = weight.dequantize()
    sign = torch.randint(0, 2, (ROWS, GROUP)) * 2.0 - 1
    for step in range(100):
        stochastically(weight, weight.dequantize() + sign * 0.1 * QUANTUM, step)
    moved = (weight.dequantize() - first) * sign / (0.1 * QUANTUM * 100)
    for part in (first > 0.8, first < -0.8, first.abs() < 0.5):  # 13,000 weights at least: standard error 0.45 %
        assert float(moved[part].mean()) == pytest.approx(1.0, abs=0.02)


def test_the_optimizer_writes_back_without_bias() -> None:
    """The same through ``step``: a gradient of constant sign moves each weight by lr a step, 0.1 quanta here."""
    start = torch.linspace(-0.8, 0.8, 64 * GROUP)[torch.randperm(64 * GROUP)].reshape(64, GROUP)
    start[:, 0], start[:, 1] = -1.0, 1.0
    sign = torch.where(torch.arange(GROUP) % 2 == 0, 1.0, -1.0).expand(64, GROUP).clone()
    sign[:, :2] = 0
    p = nn.Parameter(qg.Int8Weight.from_float(start))
    opt = qg.QGaLoreAdamW([p], lr=0.1 * QUANTUM, moments="32bit")
    first = p.dequantize()
    for _ in range(40):
        p.grad = -sign
        opt.step()
    moved = (p.dequantize() - first) * sign / (0.1 * QUANTUM * 40)
    # 16,256 weights: standard error sqrt(0.9 / (0.1 · 16256 · 40)) = 0.4 %
    assert float(moved[sign != 0].mean()) == pytest.approx(1.0, abs=0.02)


def test_draws_of_a_step_and_of_a_parameter_are_their_own() -> None:
    """Else equal updates of two layers, or of two steps, would round alike, and errors would add up."""
    x = qg.Int8Weight.from_float(torch.rand(8, 64), 64)
    value = x.dequantize() + 0.5 * x.scale * ((x.codes > 0) & (x.codes < 255))
    results = []
    for step, param in ((1, 0), (1, 0), (2, 0), (1, 1)):
        weight = qg.Int8Weight(x.codes.clone(), x.scale.clone(), x.offset.clone(), 64)
        write_back_(weight, value, random_bits((8, 64), seed=0, step=step, param=param), torch.tensor(True))
        results.append(weight.codes)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


def test_write_back_leaves_the_weight_where_ok_is_false() -> None:
    weight = qg.Int8Weight.from_float(torch.rand(5, 9), 4)
    before = [getattr(weight, part).clone() for part in ("codes", "scale", "offset")]
    for value in (torch.rand(5, 9), torch.full((5, 9), torch.nan)):
        write_back_(weight, value, random_bits((5, 9), seed=0, step=1, param=0), torch.tensor(False))
    after = [weight.codes, weight.scale, weight.offset]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
