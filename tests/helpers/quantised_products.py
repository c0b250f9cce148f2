"""Products with a matrix that is stored as INT8 groups: what the passes that decode it are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore_compile import formats

GROUP = 8


def stored_int8(m: int, n: int) -> list[Tensor]:
    """Codes, scale and offset of a random matrix."""
    return list(formats.quantize_int8(torch.randn(m, n), GROUP)[:3])


def forward_and_input_gradient(x: Tensor, dy: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantised once for both, as traced programs without a pass have it after common subexpressions."""
    weight = formats.dequantize_int8(*stored, GROUP)
    return x @ weight.t(), dy @ weight


def product_and_size(x: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded matrix has another reader."""
    weight = formats.dequantize_int8(*stored, GROUP)
    return x @ weight.t(), weight.abs().sum()


def with_bias(x: Tensor, bias: Tensor, *stored: Tensor) -> Tensor:
    """A linear layer that adds something."""
    return torch.nn.functional.linear(x, formats.dequantize_int8(*stored, GROUP), bias)
