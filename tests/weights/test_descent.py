"""W - lr U - lr λ W: the formula in double precision, decay behind the update, and what is stored where not ok."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile import formats
from qgalore_compile.composites import kept
from qgalore_compile.weights.descent import descended
from qgalore_compile.weights.operations import descend_

LR, DECAY = 0.125, 0.5


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 16, generator=generator).to(dtype), torch.randn(6, 16, generator=generator)


def expected(weight: Tensor, update: Tensor, decay: float) -> Tensor:
    moved = weight.double() - LR * update.double()
    return moved - LR * decay * moved


@pytest.mark.parametrize("decay", [None, DECAY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_weight(dtype: torch.dtype, decay: float | None) -> None:
    weight, update = given(dtype)
    wanted = expected(weight, update, decay or 0.0)
    strength = None if decay is None else torch.tensor(decay)
    descend_(weight, update, torch.tensor(LR), strength, None, torch.tensor(True))
    torch.testing.assert_close(weight.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_quantised_weight_within_half_a_code() -> None:
    value, update = given()
    weight = qg.Int8Weight.from_float(value, 8)
    wanted = expected(weight.dequantize(), update, DECAY)
    descend_(nn.Parameter(weight).data, update, torch.tensor(LR), torch.tensor(DECAY), None, torch.tensor(True))
    assert bool(((weight.dequantize() - wanted).abs() <= weight.scale.repeat_interleave(8, 1) * 0.5001).all())


@pytest.mark.parametrize("kept_", [False, True])
def test_nothing_is_stored_where_not_ok(kept_: bool) -> None:
    form = formats.Format.parse("int8/8")
    value, update = given()
    parts = formats.encode(value, form)
    with kept(kept_):
        found = descended(parts, update, torch.tensor(LR), None, None, torch.tensor(False), form)
    assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))


def test_a_transpose_is_refused() -> None:
    value, update = given()
    weight = qg.Int8Weight.from_float(value, 8)
    with pytest.raises(ValueError, match="not into its transpose"):
        descend_(weight.t(), update.t(), torch.tensor(LR), None, None, torch.tensor(True))
