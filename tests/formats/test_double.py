"""Scales that are quantised once more; that the numbers are bitsandbytes' is in ``test_nf4.py``."""

from __future__ import annotations

import pytest
import torch
from formats_support import DOUBLE, draws, grouped

from qgalore_compile.formats import Format, FormatError, dequantize_dynamic8

TEXTS = pytest.mark.parametrize("text", DOUBLE)


@TEXTS
@pytest.mark.parametrize("noisy", [False, True], ids=["nearest", "stochastic"])
def test_codes_are_those_without_it(text: str, noisy: bool) -> None:
    x, noise = torch.randn(5, 77), draws((5, 77)) if noisy else None
    inner = grouped(text.removesuffix("+double"))
    assert torch.equal(Format.parse(text).encode(x, noise)[0], inner.encode(x, noise)[0])


@TEXTS
def test_a_scale_is_its_code_s_entry_and_the_mean(text: str) -> None:
    x, inner = torch.randn(40, 77), grouped(text.removesuffix("+double"))
    form = Format.parse(text)
    codes, scale, absmax, mean = stored = form.encode(x)
    expected = dequantize_dynamic8(scale, absmax, signed=True) + mean
    assert torch.equal(form.decode(stored, x.shape), inner.decode([codes, expected], x.shape))
    kept = inner.encode(x)[1]
    torch.testing.assert_close(mean, kept.mean(), rtol=1e-6, atol=0)
    assert float((expected - kept).abs().max()) <= 0.04 * float((kept - mean).abs().max())  # half a step, and at -1


@TEXTS
def test_bits_are_a_quarter_of_the_scale_s(text: str) -> None:
    form, inner = Format.parse(text), grouped(text.removesuffix("+double"))
    assert inner.bits - form.bits == pytest.approx((32 - 8 - 32 / 256) / inner.width)


@pytest.mark.parametrize("text", ["int8", "float32", "dynamic8", "e4m3+pow2", "e4m3+pow2row", "nf4+flat", "dynamic4"])
def test_what_has_no_float_scale_a_group_of_a_row_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="double"):
        Format.parse(f"{text}+double")
