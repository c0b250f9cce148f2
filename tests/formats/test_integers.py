"""Integers of eight, six and four bits, against the functions that they are formats of, and against float64."""

from __future__ import annotations

import pytest
import torch
from formats_support import SHAPES, draws, grouped

from qgalore_compile import formats
from qgalore_compile.formats import FormatError

NOISY = pytest.mark.parametrize("noisy", [False, True], ids=["nearest", "stochastic"])
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@NOISY
@EACH_SHAPE
def test_int8_is_quantize_int8(shape: tuple[int, ...], noisy: bool) -> None:
    x, noise = torch.randn(shape), draws(shape) if noisy else None
    codes, scale, offset, _ = formats.quantize_int8(x, 32, noise=noise)
    form = grouped("int8/32")
    stored = form.encode(x, noise)
    assert all(map(torch.equal, stored, (codes, scale, offset)))
    assert torch.equal(form.decode(stored, shape), formats.dequantize_int8(codes, scale, offset, 32))


@NOISY
@EACH_SHAPE
def test_planar_int4_is_quantize_int4(shape: tuple[int, ...], noisy: bool) -> None:
    x, noise = torch.randn(shape), draws(shape) if noisy else None
    q = formats.quantize_int4(x, 32, noise=noise)
    form = grouped("int4/32+planar")
    stored = form.encode(x, noise)
    assert all(map(torch.equal, stored, q[:3]))
    assert torch.equal(form.decode(stored, shape), formats.dequantize_int4(*q))


@NOISY
@EACH_SHAPE
def test_int4_differs_in_the_order_of_nibbles_alone(shape: tuple[int, ...], noisy: bool) -> None:
    x, noise = torch.randn(shape), draws(shape) if noisy else None
    paired, planar = grouped("int4/32"), grouped("int4/32+planar")
    one, other = paired.encode(x, noise), planar.encode(x, noise)
    assert torch.equal(paired.codes(one, shape), planar.codes(other, shape))
    assert all(map(torch.equal, one[1:], other[1:]))
    assert torch.equal(paired.decode(one, shape), planar.decode(other, shape))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_smallest_and_the_largest_get_the_first_and_the_last_code_and_the_rest_the_nearest(bits: int) -> None:
    x, form = torch.randn(5, 77), grouped(f"int{bits}/32")
    stored = form.encode(x)
    codes = form.codes(stored, x.shape)
    for start in (0, 32, 64):
        group, own = x[:, start : start + 32].double(), codes[:, start : start + 32].double()
        low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
        level = (group - low) / (high - low) * (2**bits - 1)
        assert float((own - level).abs().max()) <= 0.5 + 1e-4
        assert torch.equal(own.amin(-1), torch.zeros(5, dtype=torch.float64))
        assert torch.equal(own.amax(-1), torch.full((5,), 2.0**bits - 1, dtype=torch.float64))


def test_six_bits_are_four_and_two() -> None:
    x, form = torch.randn(3, 77), grouped("int6/32")
    low, high, *_ = form.encode(x)
    assert (low.shape, high.shape) == ((3, 39), (3, 20))
    assert int(form.codes(form.encode(x), x.shape).max()) == 63


@pytest.mark.parametrize("text", ["int8+planar", "int6+planar", "int4+planar+flat"])
def test_only_int4_in_rows_is_planar(text: str) -> None:
    with pytest.raises(FormatError, match="only int4 in rows is planar"):
        grouped(text)


def test_what_a_graph_keeps_as_plain_arithmetic_are_q_galore_s_own_two() -> None:
    inline = {
        text for text in ("int8", "int4+planar", "int4", "int6", "int8+pow2", "int8+rotated", "int8+flat", "int4+pow2")
        if grouped(text).inline
    }  # fmt: skip
    assert inline == {"int8", "int4+planar"}
