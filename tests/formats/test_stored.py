"""Tensors beside their format: read, written, compared by code."""

from __future__ import annotations

import pytest
import torch
from formats_support import ALL, DOUBLE, GROUPED, draws, grouped, numbers

from qgalore_compile.formats import Format, Stored

SHAPE = (3, 77)


def stored(text: str) -> Stored:
    form = Format.parse(text)
    return Stored(form, form.encode(numbers(SHAPE, text)), SHAPE)


@pytest.mark.parametrize("text", ALL)
def test_it_is_read_in_any_dtype_and_written_in_place(text: str) -> None:
    one, value = stored(text), numbers(SHAPE, text)
    parts = list(one.parts)
    one.store_(value)
    expected = one.format.encode(value)
    assert all(map(torch.equal, parts, expected))
    assert torch.equal(one.load(), one.format.decode(expected, SHAPE))
    assert one.load(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("text", ALL)
def test_everything_stays_where_ok_is_false(text: str) -> None:
    one = stored(text)
    before = [part.clone() for part in one.parts]
    one.store_(torch.full(SHAPE, torch.nan), draws(SHAPE), torch.tensor(False))
    assert all(map(torch.equal, one.parts, before))
    one.store_(numbers(SHAPE, text), draws(SHAPE), torch.tensor(True))
    assert not all(map(torch.equal, one.parts, before))


@pytest.mark.parametrize("text", [*GROUPED, *DOUBLE])
def test_codes_are_what_it_is_made_of(text: str) -> None:
    one = stored(text)
    inner = grouped(text.removesuffix("+double"))
    codes = one.codes()
    assert codes is not None
    assert (codes.shape, codes.dtype) == (SHAPE, torch.int32)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 1 << inner.code_bits
    again = one._replace(parts=inner.with_codes(one.parts, codes))
    assert torch.equal(again.load(), one.load())


@pytest.mark.parametrize("text", [*GROUPED, *DOUBLE])
def test_a_code_s_step_is_to_the_farther_neighbour(text: str) -> None:
    one = stored(text)
    inner, codes, step = grouped(text.removesuffix("+double")), one.codes(), one.code_step()
    assert codes is not None
    assert step is not None
    for each in inner.neighbours(codes):
        moved = one._replace(parts=inner.with_codes(one.parts, each)).load(torch.float64)
        assert bool(((moved - one.load(torch.float64)).abs() <= step).all())
    assert bool((step > 0).all()) or text.startswith("official")


def test_floats_have_no_codes() -> None:
    for text in ("float32", "bfloat16"):
        assert stored(text).codes() is None
        assert stored(text).code_step() is None
