"""Floats of eight bits against PyTorch's casts; of six and four against a table of the OCP microscaling text."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from formats_support import grouped
from torch import Tensor

from qgalore_compile.formats.arithmetic import OnTensors
from qgalore_compile.formats.minifloat import Minifloat

CASTS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""OCP microscaling formats 1.0, section 5.3.3, as they are listed there."""


class Bits(NamedTuple):
    exponent: int
    mantissa: int
    bias: int


SHORT = {"e2m3": Bits(2, 3, 1), "e3m2": Bits(3, 2, 3), "e2m1": Bits(2, 1, 1), "e3m0": Bits(3, 0, 3)}
"""The same, table 3; e3m0 is in no standard."""


def table(name: str) -> list[float]:
    """The numbers of codes without a sign, in float64, by the text's formula."""
    exponent, mantissa, bias = SHORT[name]
    found = []
    for e, m in itertools.product(range(2**exponent), range(2**mantissa)):
        fraction = m / 2**mantissa
        found.append(2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction))
    return found


def minifloat(text: str) -> Minifloat:
    found = grouped(text)
    assert isinstance(found, Minifloat)
    return found


def codes_of(name: str, x: Tensor) -> Tensor:
    """Codes of (n,) numbers in groups whose scale is 1: each with the format's largest number beside it."""
    form = minifloat(f"{name}/4")
    rows = torch.stack([x, *3 * [torch.full_like(x, form.top)]], dim=-1)
    stored = form.encode(rows)
    assert stored[-1].eq(1.0).all()
    return form.codes(stored, rows.shape)[:, 0]


def values_of(name: str, codes: Tensor) -> Tensor:
    """What codes stand for, with a scale of 1."""
    form = minifloat(f"{name}/4")
    rows = codes.int()[:, None].expand(-1, 4)
    stored = form.with_codes(form.encode(torch.zeros(rows.shape)), rows)
    return form.decode([*stored[:-1], torch.ones_like(stored[-1])], rows.shape)[:, 0]


def every_bfloat16() -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).float()


# -- eight bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASTS)
def test_every_bfloat16_number_in_range_gets_the_code_of_pytorch_s_cast(name: str) -> None:
    dtype, top = CASTS[name]
    x = every_bfloat16()
    x = x[x.abs() <= top]
    assert len(x) > 30_000
    assert torch.equal(codes_of(name, x), x.to(dtype).view(torch.uint8).int())


@pytest.mark.parametrize("name", CASTS)
def test_so_do_float32_numbers_beside_each_middle_of_two_codes(name: str) -> None:
    dtype, _ = CASTS[name]
    entries = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    entries = entries[entries.isfinite()].unique()
    middles = (entries[1:] + entries[:-1]) / 2
    x = torch.cat([middles, *(middles.nextafter(torch.tensor(side)) for side in (-torch.inf, torch.inf))])
    assert torch.equal(codes_of(name, x), x.to(dtype).view(torch.uint8).int())


@pytest.mark.parametrize("name", CASTS)
def test_every_code_of_a_finite_number_is_decoded_as_pytorch_does(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(CASTS[name][0]).float()
    finite = expected.isfinite()
    assert torch.equal(values_of(name, codes)[finite].view(torch.int32), expected[finite].view(torch.int32))


@pytest.mark.parametrize("name", [*CASTS, *SHORT])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_beyond_the_largest_number_codes_saturate(name: str, sign: float) -> None:
    """As a quotient may be by a rounding: neither an infinity nor NaN comes of it."""
    form = minifloat(f"{name}/4")
    for factor in (1.0 + 2.0**-23, 1.1, 1e6):
        x = torch.tensor([sign * form.top * factor])
        code = form.code(OnTensors(), x, None)
        assert values_of(name, code).tolist() == [sign * form.top]


# -- six and four bits ------------------------------------------------------------------------------------------------


def test_the_table_of_e2m1_is_the_standard_s_list() -> None:
    assert table("e2m1") == E2M1
    assert [max(table(name)) for name in SHORT] == [7.5, 28.0, 6.0, 16.0]
    assert [minifloat(name).top for name in SHORT] == [7.5, 28.0, 6.0, 16.0]


@pytest.mark.parametrize("name", SHORT)
def test_every_code_stands_for_its_number_in_the_table(name: str) -> None:
    sizes = torch.tensor(table(name))
    found = values_of(name, torch.arange(2 * len(sizes)))
    assert torch.equal(found.view(torch.int32), torch.cat([sizes, -sizes]).view(torch.int32))
    assert torch.equal(codes_of(name, found), torch.arange(2 * len(sizes), dtype=torch.int32))


@pytest.mark.parametrize("name", SHORT)
def test_the_code_is_that_of_the_nearest_number_and_of_two_the_even_one(name: str) -> None:
    """Without a mantissa there is no even one: e3m0 takes the larger, and of 0 and its least number 0."""
    sizes = torch.tensor(table(name), dtype=torch.float64)
    x = torch.linspace(-float(sizes[-1]), float(sizes[-1]), 20_001, dtype=torch.float64).float()
    middles = ((sizes[1:] + sizes[:-1]) / 2).float()
    x = torch.cat([x, middles, -middles])
    distances = (x.double().abs()[:, None] - sizes).abs()
    near = distances == distances.amin(-1, keepdim=True)
    tie = near.sum(-1) == 2
    assert tie.sum() >= 2 * len(middles)
    last = len(sizes) - 1 - near.flip(-1).int().argmax(-1)
    even = torch.where(last % 2 == 0, last, last - 1) if name != "e3m0" else torch.where(last == 1, 0, last)
    expected = torch.where(tie, even, last) + len(sizes) * x.view(torch.int32).lt(0)
    assert torch.equal(codes_of(name, x), expected.int())


@pytest.mark.parametrize("name", [*CASTS, *SHORT])
def test_neighbours_are_the_next_numbers_of_the_same_sign(name: str) -> None:
    form = minifloat(name)
    codes = codes_of(name, torch.tensor([0.0, -0.0, form.top, -form.top]))
    below, above = (values_of(name, each) for each in form.neighbours(codes))
    assert below[:2].tolist() == [0.0, 0.0]
    assert above[:2].abs().gt(0).all()
    assert torch.equal(above[2:].abs(), torch.full((2,), form.top))
    assert below[2:].abs().lt(form.top).all()
    assert torch.equal(below[2:].sign(), torch.tensor([1.0, -1.0]))
