"""What every format promises, whatever it stores: shapes, zeros, empty tensors, rounding by draws, bits.

To add a format, add its text to ``WRITTEN`` in ``tests/helpers/formats_support.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from formats_support import ALL, DOUBLE, GROUPED, SHAPES, draws, grouped, numbers, rounding
from torch import Tensor

from qgalore_compile.formats import Format, Stored
from qgalore_compile.formats.base import Format as Base
from qgalore_compile.formats.base import dtype_of
from qgalore_compile.formats.integers import Integers

EVERY = pytest.mark.parametrize("text", ALL)
CODED = pytest.mark.parametrize("text", [*GROUPED, *DOUBLE])


def step_of(form: Base, stored: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    found = Stored(form, stored, shape).code_step()
    assert found is not None
    return found


# -- what is stored ---------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_have_the_shapes_and_dtypes_that_the_format_says(
    text: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    form = Format.parse(text)
    stored = form.encode(numbers(shape, text).to(dtype))
    assert [(tuple(each.shape), each.dtype) for each in stored] == [
        (form.shape_of(part, shape), dtype_of(part)) for part in form.parts
    ]
    back = form.decode(stored, shape, dtype)
    assert (tuple(back.shape), back.dtype) == (shape, dtype)
    assert len({part.name for part in form.parts}) == len(form.parts)


@EVERY
def test_bits_are_those_of_a_long_row(text: str) -> None:
    form, shape = Format.parse(text), (4, 1 << 13)
    count = sum(8 * each.nbytes for each in form.encode(numbers(shape, text)))
    assert count / math.prod(shape) == pytest.approx(form.bits, rel=5e-3)


@EVERY
@pytest.mark.parametrize("shape", [(2, 77), (5, 1001), (70, 70), (4097,), (3, 40, 50), (1, 1)], ids=str)
def test_zeros_are_what_zeros_are_encoded_as(text: str, shape: tuple[int, ...]) -> None:
    form = Format.parse(text)
    made, encoded = form.zeros(shape), form.encode(torch.zeros(shape))
    assert [(each.shape, each.dtype) for each in made] == [(each.shape, each.dtype) for each in encoded]
    for stored in (made, encoded):
        assert torch.equal(form.decode(stored, shape), torch.zeros(shape))
    inner = form.grouped or form
    if text in GROUPED or text in DOUBLE:
        assert torch.equal(inner.codes(made, shape), inner.codes(encoded, shape))
    made[0].fill_(1)  # memory of its own, in which no two elements are one
    assert made[0].is_contiguous()


@pytest.mark.parametrize("text", [each for each in GROUPED if "planar" not in each])
def test_flat_groups_are_along_the_flattened_tensor(text: str) -> None:
    form, x = grouped(text).flat(), numbers((3, 77), text)
    assert all(map(torch.equal, form.encode(x)[1:], form.encode(x.reshape(-1))[1:]))
    assert torch.equal(form.decode(form.encode(x), (3, 77)).view(-1), form.decode(form.encode(x.view(-1)), (231,)))


@EVERY
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 4)], ids=str)
def test_empty_tensors_come_back_empty(text: str, shape: tuple[int, ...]) -> None:
    form = Format.parse(text)
    stored = form.encode(torch.zeros(shape))
    assert [tuple(each.shape) for each in stored] == [form.shape_of(part, shape) for part in form.parts]
    back = form.decode(stored, shape, torch.bfloat16)
    assert (tuple(back.shape), back.dtype) == (shape, torch.bfloat16)
    assert [each.shape for each in form.zeros(shape)] == [each.shape for each in stored]


@EVERY
def test_a_tensor_that_is_not_contiguous_is_encoded_as_its_copy(text: str) -> None:
    form, base = Format.parse(text), numbers((77, 42), text)
    for x in (base.t(), base[:, ::2], base[:1].expand(5, -1)):
        assert all(map(torch.equal, form.encode(x), form.encode(x.contiguous())))


@pytest.mark.parametrize("text", [each for each in GROUPED if each not in ("dynamic8", "dynamic8+unsigned")])
def test_what_cannot_be_grouped_is_refused_in_words(text: str) -> None:
    with pytest.raises(TypeError, match=r"int64.*\.float\(\)"):
        grouped(text).encode(torch.arange(3))
    with pytest.raises(ValueError, match=r"0-d.*reshape\(1\)"):
        grouped(text).encode(torch.tensor(1.0))


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [each for each in GROUPED if "rotated" not in each and "official" not in each])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_number_is_stored_as_one_no_farther_than_half_a_step(text: str, shape: tuple[int, ...]) -> None:
    """But for what lies below the lowest entry of a map for moments: it has no -1, or no zero."""
    form, x = Format.parse(text), numbers(shape, text)
    stored = form.encode(x)
    back = form.decode(stored, shape).double()
    away, step = (back - x.double()).abs(), step_of(form, stored, shape)
    lowest = torch.full_like(back, -torch.inf)
    if text.startswith(("dynamic", "moment")):
        lowest = form.decode([torch.zeros_like(stored[0]), *stored[1:]], shape).double()
    inside = x.double() >= lowest
    assert bool((away <= step / 2 * (1 + 1e-5) + 1e-6 * back.abs())[inside].all())


@CODED
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_own_group_alone_and_visibly(text: str, bad: float) -> None:
    form, clean = Format.parse(text), numbers((4, 256), text)
    expected = form.decode(form.encode(clean), clean.shape)
    x = clean.clone()
    x[1, 40] = bad
    back = form.decode(form.encode(x), x.shape)
    assert back.shape == x.shape
    if "official" in text or text in DOUBLE:  # the one clamps what it is, the others' scales have a mean in common
        return
    assert not bool((back[1, 40] - clean[1, 40]).abs() < 1e3)
    if "pow2row" in text:  # the row has a scale in common
        back[1], expected[1] = 0, 0
    start = 40 // form.width * form.width  # type: ignore[attr-defined]
    back[1, start : start + form.width] = expected[1, start : start + form.width]  # type: ignore[attr-defined]
    assert torch.equal(back, expected)


@CODED
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 1e37])
def test_numbers_of_any_size_come_back_finite(text: str, size: float) -> None:
    form, x = Format.parse(text), (numbers((3, 160), text).clamp(-3, 3) * size).double()
    back = form.decode(form.encode(x), x.shape, torch.float64)
    assert bool(back.isfinite().all())
    if size > 1e-37:
        assert float((back - x).norm() / x.norm()) < 0.35 or text.startswith("official")


# -- stochastic rounding ----------------------------------------------------------------------------------------------

ROUNDED = [text for text in GROUPED if rounding(text)]


def narrow(text: str) -> str:
    """The same in groups of eight."""
    name, *words = text.split("+")
    return "+".join([f"{name.partition('/')[0]}/8", *words])


def of_scale_one(form: Base) -> tuple[float, float]:
    """The smallest and the largest element of a group whose scale is 1."""
    if isinstance(form, Integers):
        return 0.0, 2.0**form.code_bits - 1 if not form.planar else 15.0
    top = form.top  # type: ignore[attr-defined]
    return (form.entries[0] if hasattr(form, "entries") else -top), top


@pytest.mark.parametrize("text", ROUNDED)
def test_the_mean_over_all_draws_is_the_number_and_no_draw_moves_it_by_more_than_a_step(text: str) -> None:
    form = grouped(narrow(text))
    low, high = of_scale_one(form)
    row = low + (high - low) * torch.tensor([0.0, 1.0, 0.013, 0.21, 0.377, 0.5, 0.7123, 0.941])
    every = torch.arange(65536, dtype=torch.int32)[:, None].expand(-1, 8)
    x = row.expand(65536, 8).contiguous()
    stored = form.encode(x, every)
    back = form.decode(stored, x.shape).double()
    step = step_of(form, [each[:8] for each in stored] if form.axis == "rows" else form.encode(x[:8]), (8, 8)).amax(0)
    mean, smallest, largest = back.mean(0), back.amin(0), back.amax(0)
    rounding = 2.0**-21 * float(row.abs().max())  # of float32, in what is decoded
    root = math.sqrt(8) if "rotated" in text else 1.0
    widest = step.max() if "rotated" in text else step
    assert bool(((mean - row.double()).abs() <= 2.0**-16 * root * widest + rounding).all())
    if "rotated" not in text:
        assert bool((largest - smallest <= step + rounding).all())
        assert bool(((smallest - rounding <= row) & (row <= largest + rounding)).all())


@pytest.mark.parametrize("text", [text for text in ROUNDED if "rotated" not in text])
def test_a_number_on_the_grid_stays_whatever_is_drawn(text: str) -> None:
    form = grouped(narrow(text))
    low, high = of_scale_one(form)
    x = low + (high - low) * torch.rand(64, 8)
    x[:, 0], x[:, 1] = low, high
    on_grid = form.decode(form.encode(x), x.shape)
    for noise in (None, draws((64, 8)), *(torch.full((64, 8), draw, dtype=torch.int32) for draw in (0, 65535))):
        assert torch.equal(form.decode(form.encode(on_grid, noise), x.shape), on_grid)
