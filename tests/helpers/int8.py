"""What the tests of Int8Weight share: a small layer and a small model, and the numbers that a weight stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qgalore_compile as qg

Context = Callable[[], contextlib.AbstractContextManager[Any]]

INNER = ("codes", "scale", "offset")


def linear(m: int = 8, n: int = 13, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A Linear with an INT8 weight, labelled "0.weight", whose rows end in a short group."""
    layer = qg.quantize_(nn.Sequential(nn.Linear(n, m, bias=bias).to(dtype)), group_size=5)[0]  # type: ignore[index]
    assert isinstance(layer, nn.Linear)
    return layer


def int8(layer: nn.Module) -> qg.Int8Weight:
    """The layer's weight, which must be INT8."""
    assert isinstance(layer.weight, qg.Int8Weight)
    return layer.weight


def values(weight: qg.Int8Weight) -> Tensor:
    """codes * scale + offset in float64 NumPy."""
    columns = np.arange(weight.codes.shape[1]) // weight.group_size
    scale, offset = (part.numpy().astype(np.float64)[:, columns] for part in (weight.scale, weight.offset))
    return torch.from_numpy(weight.codes.numpy() * scale + offset)


def float_twin(layer: nn.Linear) -> nn.Linear:
    """An ordinary Linear with the same numbers."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
    with torch.no_grad():
        twin.weight.copy_(values(int8(layer)))
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


def storage(weight: qg.Int8Weight) -> dict[str, Tensor]:
    """Clones of what is stored."""
    return {part: getattr(weight, part).clone() for part in INNER}


def assert_same(weight: Tensor, before: dict[str, Tensor]) -> None:
    """The weight stores exactly what :func:`storage` returned."""
    assert isinstance(weight, qg.Int8Weight)
    for part in INNER:
        assert torch.equal(getattr(weight, part), before[part]), part


class Tiny(nn.Module):
    """A language model with two projections in each block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(12, 20), "o_proj": nn.Linear(20, 12, bias=False)}) for _ in range(2)
        )
        self.head = nn.Linear(12, 17, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + block["o_proj"](torch.relu(block["q_proj"](hidden)))
        return self.head(hidden)  # type: ignore[no-any-return]
