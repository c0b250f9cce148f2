"""The arithmetic that formats share: rounding by draws, and powers of two from bits."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from qgalore_compile.formats.arithmetic import OnTensors, goes_up, nonzero, power_of_two, to_whole

ON = OnTensors()
EVERY = torch.arange(65536, dtype=torch.int32)


@given(st.integers(0, 65535))
def test_a_fraction_goes_up_in_as_many_of_all_draws_as_it_is_large(parts: int) -> None:
    assert int(goes_up(ON, torch.tensor(parts / 65536), EVERY).sum()) == parts


@given(st.floats(-500, 500, width=32))
def test_all_draws_together_give_the_number_itself(level: float) -> None:
    """To 2**-17 of a step, and never another whole number than the two beside it."""
    found = to_whole(ON, torch.tensor(level).expand(65536), EVERY).double()
    assert set(found.tolist()) <= {math.floor(level), math.floor(level) + 1}
    assert abs(float(found.mean()) - level) <= 2.0**-17


@given(st.integers(-500, 500))
def test_a_whole_number_stays(level: int) -> None:
    assert to_whole(ON, torch.tensor(float(level)).expand(65536), EVERY).unique().tolist() == [level]


def test_without_draws_ties_go_to_even() -> None:
    assert to_whole(ON, torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), None).tolist() == [0, 2, 2, 0, -2]


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_the_least_power_of_two_that_is_not_smaller(scale: float) -> None:
    found = float(power_of_two(ON, torch.tensor(scale)))
    assert math.frexp(found)[0] == 0.5
    assert found / 2 < scale <= found


def test_zero_stays_and_the_smallest_numbers_are_lifted_to_a_normal_one() -> None:
    found = power_of_two(ON, torch.tensor([0.0, 1e-45, 1e-39, 2.0**-126]))
    assert found.tolist() == [0.0, *3 * [2.0**-126]]


def test_a_scale_that_is_no_number_is_no_zero() -> None:
    """What holds NaN must not be read as zeros."""
    found = power_of_two(ON, torch.tensor([torch.nan, torch.inf, 3e38]))
    assert not bool((found == 0).any())


def test_only_a_scale_of_zero_is_replaced_by_one() -> None:
    assert nonzero(ON, torch.tensor([0.0, 1e-45, 2.0])).tolist() == [1.0, float(torch.tensor(1e-45)), 2.0]
