"""Codes times what a group shares, its largest magnitude: scales, groups of zeros, codes of six bits in two parts."""

from __future__ import annotations

import pytest
import torch
from formats_support import WRITTEN, grouped

from qgalore_compile.formats.symmetric import Symmetric, code_parts, joined, split

TEXTS = [text for text in WRITTEN if isinstance(grouped(text), Symmetric)]


@pytest.mark.parametrize("text", [text for text in TEXTS if "rotated" not in text and "pow2" not in text])
def test_a_scale_takes_the_group_s_largest_magnitude_to_the_largest_entry(text: str) -> None:
    form = grouped(text)
    assert isinstance(form, Symmetric)
    x = torch.randn(4, form.width)
    x = x.abs() if "unsigned" in text else x
    scale = form.encode(x)[-1]
    torch.testing.assert_close(scale, x.abs().amax(-1).view(scale.shape) / form.top, rtol=1e-7, atol=0)


@pytest.mark.parametrize("text", TEXTS)
def test_a_group_of_zeros_beside_others_stays_zeros(text: str) -> None:
    form = grouped(text)
    x = torch.rand(3, 2 * form.width)
    x[1, : form.width] = 0.0
    back = form.decode(form.encode(x), x.shape)
    assert not back[1, : form.width].any()
    assert back[1, form.width :].any()


def test_six_bits_are_stored_as_four_and_two_and_the_others_whole() -> None:
    assert [[part.memory for part in code_parts(bits)] for bits in (8, 6, 4)] == [["u8"], ["p4", "p2"], ["p4"]]
    for bits in (8, 6, 4):
        codes = torch.arange(1 << bits, dtype=torch.int32)
        values = split(bits, codes)
        assert len(values) == len(code_parts(bits))
        assert torch.equal(joined(values), codes)
