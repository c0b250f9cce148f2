"""How a group's scale is kept: powers of two that never fall short of it (ZeroQuant-FP's M1 and M2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formats_support import grouped
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qgalore_compile.formats import FormatError, scaling
from qgalore_compile.formats.arithmetic import OnTensors

scales_ = st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=12)


def kept(how: str, scales: Tensor) -> tuple[list[Tensor], Tensor]:
    """(what is stored, the scales that it stands for) of a row of scales."""
    stored, meant = scaling.store(how, OnTensors(), scales[:, None])
    assert torch.equal(scaling.load(how, OnTensors(), stored), meant)
    return stored, meant[:, 0]


@given(scales_)
def test_a_float_scale_stays(wanted: list[float]) -> None:
    scales = torch.tensor(wanted)
    stored, meant = kept("float32", scales)
    assert len(stored) == 1
    assert torch.equal(meant, scales)


@given(scales_)
def test_pow2_is_the_least_power_of_two_that_is_not_below(wanted: list[float]) -> None:
    scales = torch.tensor(wanted)
    (exponent,), meant = kept("pow2", scales)
    assert bool((torch.frexp(meant).mantissa == 0.5).all())
    assert bool(((meant / 2 < scales) & (scales <= meant)).all())
    assert bool(((exponent >= 0) & (exponent <= 255)).all())


@given(scales_)
def test_pow2row_keeps_the_row_s_largest_and_makes_the_others_shifts_of_it(wanted: list[float]) -> None:
    scales = torch.tensor(wanted)
    (shift, row), meant = kept("pow2row", scales)
    assert float(row) == float(scales.max()) == float(meant.max())
    ratios = torch.frexp(row.reshape(()) / meant)
    assert bool((ratios.mantissa == 0.5).all())
    assert bool((scales <= meant).all())
    near = shift[:, 0] < 126
    assert bool((meant[near] < 2 * scales[near]).all())
    assert bool(((shift >= 0) & (shift <= 126)).all())


@pytest.mark.parametrize("how", ["pow2", "pow2row"])
def test_powers_of_two_stay(how: str) -> None:
    scales = 2.0 ** torch.arange(-20.0, 20.0)
    assert torch.equal(kept(how, scales)[1], scales)


@pytest.mark.parametrize("text", ["int4/32+pow2row", "int8/32+pow2row", "e2m1/32+pow2row", "nf4/32+pow2row"])
def test_a_row_s_groups_are_shifts_of_its_largest_scale(text: str) -> None:
    x, form = torch.randn(6, 160) * torch.logspace(-3, 0, 160), grouped(text)
    wanted = grouped(text.removesuffix("+pow2row")).encode(x)[1]
    _, shift, row, *_ = form.encode(x)
    assert torch.equal(row, wanted.amax(-1, keepdim=True))
    assert torch.equal(shift.amin(-1), torch.zeros(6, dtype=torch.uint8))
    meant = row / 2.0**shift
    assert bool(((meant >= wanted) & (meant < 2 * wanted)).all())


WIDEST = {"int8/32": 1.0, "int4/32": 1.0, "e4m3/32": 32.0, "e2m1/32": 2.0, "nf4/32": 0.304}
"""The widest step between two entries, in scales."""


@pytest.mark.parametrize("text", WIDEST)
def test_nothing_saturates_and_steps_are_at_most_twice_as_wide(text: str) -> None:
    """Since no scale is below the one wanted, nor twice as large."""
    x = torch.randn(8, 160)
    step = grouped(text).encode(x)[1] * WIDEST[text] * (1 + 1e-4)
    for how, times in (("", 1), ("+pow2", 2), ("+pow2row", 2)):
        form = grouped(text + how)
        error = (form.decode(form.encode(x), x.shape) - x).abs().view(8, -1, 32).amax(-1)
        assert bool((error <= times * step / 2).all())


def test_shifts_within_a_row_are_for_what_is_encoded_at_once() -> None:
    builder: Any = object()  # of a program
    with pytest.raises(FormatError, match="use pow2"):
        scaling.store("pow2row", builder, torch.ones(1, 1))
    assert not grouped("e4m3+pow2row").trains
    assert not grouped("int8+pow2row").trains
    assert grouped("e4m3+pow2").trains
