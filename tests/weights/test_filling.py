"""Values stored row by row are those that quantising the whole float weight gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgalore_compile as qg
from qgalore_compile.weights import filling
from qgalore_compile.weights.tensor import QuantizedWeight

FORMATS = ["int8/4", "int4/4", "e4m3", "nf4/4", "nf4/4+double"]


def place(form: str, dtype: torch.dtype) -> QuantizedWeight:
    """Of a weight on the meta device."""
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(10, 7, bias=False, dtype=dtype))
    weight = qg.quantize_(layer, format=form)[0].weight  # type: ignore[index]
    assert isinstance(weight, QuantizedWeight)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_rows_end_as_the_whole_weight_quantised(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "BLOCK", 20)
    value = torch.randn(7, 10)
    stored = filling.empty(place(form, dtype).detach(), "cpu")
    assert isinstance(stored, QuantizedWeight)
    for rows in filling.blocks(stored):
        filling.fill_(stored, rows, value[rows], "w")
    expected = QuantizedWeight.from_float(value.to(dtype), form)
    for own, other in zip(stored.parts, expected.parts, strict=True):
        assert torch.equal(own, other)


def test_rows_are_as_many_as_a_block_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "BLOCK", 20)
    assert list(filling.blocks(torch.empty(5, 10))) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(filling.blocks(torch.empty(2, 3, 50))) == [slice(0, 1), slice(1, 2)]  # a row more than a block
    assert list(filling.blocks(torch.empty(100))) == [slice(None)]


def test_a_format_that_keeps_rows_together_is_filled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "BLOCK", 20)
    assert list(filling.blocks(place("nf4/4+double", torch.float32))) == [slice(None)]
    assert len(list(filling.blocks(place("int8/4", torch.float32)))) == 4


def test_a_value_without_an_int8_form_is_named() -> None:
    stored = filling.empty(place("int8/4", torch.float32).detach(), "cpu")
    with pytest.raises(ValueError, match=r"layers\.0\.w of shape \(7, 10\) holds NaN"):
        filling.fill_(stored, slice(None), torch.full((7, 10), torch.nan), "layers.0.w")
