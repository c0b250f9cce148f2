"""Floats as they are, as formats."""

from __future__ import annotations

import pytest
import torch
from formats_support import draws

from qgalore_compile.formats import Format


def test_float32_keeps_every_bit() -> None:
    x = torch.randn(3, 5)
    form = Format.parse("float32")
    (stored,) = form.encode(x, draws((3, 5)))
    assert torch.equal(stored, x)
    assert torch.equal(form.decode([stored], x.shape), x)


def test_bfloat16_rounds_to_nearest_without_draws_and_without_bias_with_all_of_them() -> None:
    form, x = Format.parse("bfloat16"), torch.randn(16)
    assert torch.equal(form.encode(x)[0], x.bfloat16())
    every = torch.arange(65536, dtype=torch.int32)[:, None].expand(-1, 16)
    (stored,) = form.encode(x.expand(65536, 16), every)
    assert torch.equal(stored.double().mean(0), x.double())


@pytest.mark.parametrize("text", ["float32", "bfloat16"])
def test_decoding_gives_the_dtype_asked_for(text: str) -> None:
    form = Format.parse(text)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert form.decode(form.encode(torch.randn(3)), (3,), dtype).dtype == dtype
