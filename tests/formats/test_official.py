"""The published quantiser as a format; that the function is the published one is in ``test_formats.py``."""

from __future__ import annotations

import pytest
import torch
from formats_support import grouped

from qgalore_compile import formats


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 64), (2, 77), (1, 1)], ids=str)
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_it_is_quantize_official(bits: int, shape: tuple[int, int], shift: float) -> None:
    x, form = torch.randn(shape) + shift, grouped(f"official{bits}/32")
    q = formats.quantize_official(x, 32, bits=bits)
    stored = form.encode(x)
    assert all(map(torch.equal, stored, q[:3]))
    assert torch.equal(form.decode(stored, shape), formats.dequantize_official(*q))


def test_it_rounds_to_nearest_alone() -> None:
    x, form = torch.randn(3, 64), grouped("official8/32")
    assert not form.rounds
    noise = torch.full(x.shape, 65535, dtype=torch.int32)
    assert all(map(torch.equal, form.encode(x, noise), form.encode(x)))
