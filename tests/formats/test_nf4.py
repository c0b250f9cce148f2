"""NF4, alone and with scales that are quantised again: code for code what bitsandbytes stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formats_support import grouped
from torch import Tensor

from qgalore_compile import formats
from qgalore_compile.formats import Format
from qgalore_compile.formats.nf4 import ENTRIES

SHAPES = [(64, 256), (3, 64), (5, 192), (1, 64)]


def theirs(x: Tensor, **keys: Any) -> tuple[Tensor, Any, Tensor]:
    """(codes, their state, values) of bitsandbytes, whose bytes hold the first code in the high nibble."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", **keys)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(x.shape)
    return codes, state, functional.dequantize_4bit(packed, state)


def spread(shape: tuple[int, int]) -> Tensor:
    """Normal numbers, of another size in each row, with a block of zeros and outliers."""
    x = torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]
    x[0, :64] = 0.0
    x[-1, 7] *= 30
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_scales_and_values_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    x, form = spread(shape), grouped("nf4/64")
    codes, state, values = theirs(x)
    stored = form.encode(x)
    assert torch.equal(form.codes(stored, shape), codes.int())
    assert torch.equal(stored[1].reshape(-1), state.absmax)
    assert torch.equal(form.decode(stored, shape), values)


def test_numbers_beside_the_middle_of_two_entries_get_the_code_of_bitsandbytes() -> None:
    """But for the middle itself, where the two libraries may take either."""
    entries = torch.tensor(ENTRIES)
    middles = (entries[1:] + entries[:-1]) / 2
    x = torch.ones(2, 64)
    x[0, :15], x[1, :15] = middles - 1e-6, middles + 1e-6
    codes, _, _ = theirs(x)
    form = grouped("nf4")
    found = form.codes(form.encode(x), x.shape)
    assert torch.equal(found, codes.int())
    assert found[:, :15].tolist() == [list(range(15)), list(range(1, 16))]


@pytest.mark.parametrize("shape", [*SHAPES[:3], (300, 128)], ids=str)
def test_double_quantisation_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    """But for one scale in some hundred near the middle of two entries, where bitsandbytes takes the farther."""
    x, form = torch.randn(shape), Format.parse("nf4/64+double")
    codes, state, values = theirs(x, compress_statistics=True)
    packed, scale, absmax, mean = stored = form.encode(x)
    assert torch.equal(grouped("nf4/64").codes([packed], shape), codes.int())
    torch.testing.assert_close(absmax, state.state2.absmax, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, state.offset, rtol=1e-6, atol=0)
    away = (scale.reshape(-1).int() - state.absmax.reshape(-1).int()).abs()
    assert int(away.max()) <= 1
    assert int(away.sum()) <= scale.numel() // 100
    same = (away == 0).view(scale.shape).repeat_interleave(64, dim=-1)
    found = form.decode(stored, shape)
    torch.testing.assert_close(found[same], values[same], rtol=1e-5, atol=1e-6)
    exact = x.view(-1, 64).abs().amax(-1)
    ours, others = (
        (formats.dequantize_dynamic8(each, absmax, signed=True) + mean - exact).abs()
        for each in (scale.reshape(-1), state.absmax.reshape(-1))
    )
    assert bool((ours <= others + 1e-6).all())


def test_the_entries_are_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, appendix E: of nine positive and eight negative ones, from an offset of 0.9677083, scaled to ±1."""
    offset = torch.tensor(0.9677083, dtype=torch.float64)

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(float(offset), 0.5, count, dtype=torch.float64)[:-1])

    found = torch.cat([-quantiles(8), torch.zeros(1, dtype=torch.float64), quantiles(9).flip(0)])
    torch.testing.assert_close(torch.tensor(ENTRIES, dtype=torch.float64), found / found.max(), rtol=0, atol=1e-5)
