"""A row that ends in a short group, compiled: Inductor alone would leave the short group uncomputed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qgalore_compile import formats


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("quantise", [formats.quantize_int8, formats.quantize_int4])
def test_generated_code_computes_the_short_group_too(quantise: object) -> None:
    # groups wider than 8, which do not divide the row: what makes Inductor split the loop over the row
    rows, columns, group = 6, 44, 16
    dequantise = formats.dequantize_int8 if quantise is formats.quantize_int8 else formats.dequantize_int4

    def write_back(first: Tensor, scale: Tensor, offset: Tensor, update: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        stored = (first, scale, offset) if quantise is formats.quantize_int8 else (first, scale, offset, columns)
        value = dequantise(*stored, group) - 0.01 * update  # type: ignore[operator,arg-type]
        return (value, *quantise(value, group, noise=noise)[:3])  # type: ignore[operator]

    stored = quantise(torch.randn(rows, columns), group)[:3]  # type: ignore[operator]
    given = (*stored, torch.randn(rows, columns), torch.randint(0, 1 << 16, (rows, columns), dtype=torch.int32))
    compiled = torch.compile(write_back, fullgraph=True)(*given)
    for found, expected in zip(compiled, write_back(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
