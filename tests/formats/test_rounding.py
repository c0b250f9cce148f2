"""Float32 becomes bfloat16 or float16 without bias, from 16 random bits: every draw there is, against fp64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import qgalore_compile as qg
from qgalore_compile.formats.rounding import round_to
from qgalore_compile.rng import random_bits

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
DRAWS = torch.arange(1 << 16, dtype=torch.int32)
NUMBERS = {
    BFLOAT16: (1.0, 1 - 1e-3, -0.999, 2 - 2**-20, 1 / 3, -7e-42, 1e-40, 1.1754e-38, 3.3e38, -1e-30, 12345.678),
    FLOAT16: (1.0, 1 - 1e-4, -0.9999, 2 - 2**-12, 1 / 3, 65503.1, -65487.9, 2**-14, 6.104e-5, 1e-3, 2048.7),
}
"""Halves of a step, ends of a binade, the largest, and what bfloat16 has below the normal numbers."""
BELOW_NORMAL = (6.1e-5, 1e-5, -3.3e-7, 5.96e-8, 2e-8, -1e-9, 3e-12)
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, -3.4028235e38, 65520.0, -1e5, 65504.0]


def every_draw(number: float, dtype: torch.dtype) -> np.ndarray:
    """What becomes of a number, by draw, in float64."""
    return round_to(torch.full((1 << 16,), number), dtype, DRAWS).double().numpy()


def neighbours(number: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of a dtype below and above, by walking its bits; the number itself where it is one."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    finite = bits[bits.isfinite()]
    return float(finite[finite <= number].max()), float(finite[finite >= number].min())


@pytest.mark.parametrize(
    ("dtype", "number"), [(dtype, number) for dtype, numbers in NUMBERS.items() for number in numbers]
)
def test_the_mean_over_all_draws_is_the_number_itself(dtype: torch.dtype, number: float) -> None:
    number = float(np.float32(number))
    found = every_draw(number, dtype)
    low, high = neighbours(number, dtype)
    assert set(found) <= {low, high}
    # a mean of 2**16 numbers that 24 bits hold is exact in float64
    assert float(found.mean()) == number


@pytest.mark.parametrize("number", BELOW_NORMAL)
def test_float16_below_its_normal_numbers_is_within_a_step_of_a_draw(number: float) -> None:
    number = float(np.float32(number))
    found = every_draw(number, FLOAT16)
    assert set(found) <= set(neighbours(number, FLOAT16))
    assert abs(float(found.mean()) - number) <= 2.0**-41


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_what_the_dtype_holds_never_moves(dtype: torch.dtype) -> None:
    held = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    for draw in (0, 1, 12345, 65535):
        found = round_to(held.float(), dtype, torch.full_like(DRAWS, draw))
        torch.testing.assert_close(found, held, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("draw", [0, 1, 65535])
def test_what_is_finite_stays_finite_and_what_is_not_stays_what_it_is(dtype: torch.dtype, draw: int) -> None:
    numbers = torch.tensor([*SPECIAL, 1.0]).view(-1, 1)
    numbers[-1] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # NaN in the bits that are cut alone
    found = round_to(numbers, dtype, torch.full(numbers.shape, draw, dtype=torch.int32))
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), numbers.isnan())
    assert torch.equal(found.isinf(), numbers.isinf())
    assert torch.equal(found.float().sign().nan_to_num(), numbers.sign().nan_to_num())
    assert float(found[5]) == torch.finfo(dtype).max


def test_without_noise_it_is_pytorchs_own_rounding() -> None:
    numbers = torch.randn(1000) * 10
    for dtype in (BFLOAT16, FLOAT16, torch.float32, torch.float64):
        assert torch.equal(round_to(numbers, dtype), numbers.to(dtype))


def test_what_cannot_be_rounded_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"of float32 to bfloat16 and float16, not of torch.float32 to torch.float64"):
        round_to(torch.ones(3), torch.float64, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"not of torch.float64 to torch.bfloat16; pass noise=None"):
        round_to(torch.ones(3, dtype=torch.float64), BFLOAT16, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"noise must have the shape of x, \(3,\), got \(2,\)"):
        round_to(torch.ones(3), BFLOAT16, torch.zeros(2, dtype=torch.int32))


# -- the optimizer ----------------------------------------------------------------------------------------------------


def drift(parameter: torch.nn.Parameter, steps: int = 100, **settings: object) -> Tensor:
    """How far a constant gradient moves a parameter at a learning rate of 1e-3."""
    opt = qg.QGaLoreAdamW([{"params": [parameter], **settings}], lr=1e-3)
    before = parameter.detach().double()
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        opt.step()
    return parameter.detach().double() - before


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("shape", [(), (1024,), (33, 31), (4, 5, 51), (8, 6, 5, 5)], ids=str)
def test_weights_of_any_shape_drift_by_the_learning_rate(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    moved = drift(torch.nn.Parameter(torch.ones(shape, dtype=dtype)))
    # each of 100 steps rounds by less than a step of the dtype's, with a variance of a quarter of that at most
    error = 0.5 * torch.finfo(dtype).eps * math.sqrt(100 / moved.numel())
    assert abs(float(moved.mean()) + 0.1) < 5 * error
    assert moved.numel() == 1 or len(moved.unique()) > 1


def test_a_projected_weight_in_bfloat16_drifts_too() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.full((64, 48), 1.0, dtype=BFLOAT16))
    opt = qg.QGaLoreAdamW([{"params": [weight], "rank": 4, "quant": False, "scale": 1.0}], lr=1e-4, moments="32bit")
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        opt.step()
    assert float(weight.detach().double().mean()) < 1 - 1e-4


def test_the_groups_rounding_to_nearest_leaves_a_norms_weight_where_it_is() -> None:
    assert torch.equal(drift(torch.nn.Parameter(torch.ones(64, dtype=BFLOAT16)), rounding="nearest"), torch.zeros(64))


def test_a_step_that_is_skipped_leaves_the_weight_bit_for_bit() -> None:
    weight = torch.nn.Parameter(torch.randn(1000).to(BFLOAT16))
    weight.data[:3] = torch.tensor([-0.0, math.inf, math.nan])
    before = weight.detach().clone().view(torch.int16)
    opt = qg.QGaLoreAdamW([weight])
    weight.grad = torch.full_like(weight, math.nan)
    opt.step()
    assert torch.equal(weight.detach().view(torch.int16), before)


def test_no_two_tensors_and_no_two_steps_share_their_draws() -> None:
    pair = [torch.nn.Parameter(torch.full((4096,), 1 / 3).to(BFLOAT16)) for _ in range(2)]
    opt = qg.QGaLoreAdamW(pair, lr=1e-3)
    moves = []
    for _ in range(2):
        before = [p.detach().double() for p in pair]
        for p in pair:
            p.grad = torch.ones_like(p)
        opt.step()
        moves += [p.detach().double() - old for p, old in zip(pair, before, strict=True)]
    for index, one in enumerate(moves):
        for other in moves[:index]:
            correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
            assert abs(correlation) < 5 / 64  # five standard errors of 4096 pairs


def test_the_draws_are_those_of_rng_at_the_parameters_position() -> None:
    first, second = (torch.nn.Parameter(torch.full((6, 50), 1 / 3).to(dtype)) for dtype in (BFLOAT16, FLOAT16))
    opt = qg.QGaLoreAdamW([first, second], lr=1e-3, weight_decay=0.5, seed=11)
    for p in (first, second):
        p.grad = torch.zeros_like(p)
    expected = []
    for position, p in enumerate((first, second)):
        noise = random_bits((300,), seed=11, step=1, param=position).view(6, 50)
        old = p.detach().float()
        lr = torch.tensor(1e-3)
        expected.append(round_to(old - lr * 0.5 * old, p.dtype, noise))
    opt.step()
    for p, value in zip((first, second), expected, strict=True):
        assert torch.equal(p.detach(), value)
