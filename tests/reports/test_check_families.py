"""Models of other families, whose steps rounding changes much: none is called wrong.

`benchmarks/check_families.py` has forty, each in three precisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import Interpreted
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.reports.check import check

WIDTH = 32


class Attention(nn.Module):
    """With biases: that of the keys has a gradient that is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH / 2), -1)
        return self.out((scores @ v).transpose(1, 2).flatten(-2))


class Classifier(nn.Module):
    """As ViT: patches, a token of the class, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, WIDTH) * 0.02) for n in (1, 17))
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1) + self.places
        hidden = hidden + self.attention(self.norm(hidden))
        hidden = hidden + self.mlp(self.norm2(hidden))
        return nn.functional.cross_entropy(self.head(hidden[:, 0]).float(), torch.arange(len(x)))


class Modulated(nn.Module):
    """As DiT: a shift and a scale of one condition; with one example every gradient of theirs has rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.modulation = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.norm, self.mlp = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = self.modulation(nn.functional.silu(self.time(x[:, :1]))).chunk(2, -1)
        return (self.mlp(self.norm(x) * (1 + scale) + shift) - x).float().square().mean()


class Field(nn.Module):
    """As NeRF: sines of doubling frequency, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(39, WIDTH), nn.Linear(39 + WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        waves = [f(2.0**i * x) for i in range(6) for f in (torch.sin, torch.cos)]
        encoded = torch.cat([x, *waves], -1)
        hidden = torch.relu(self.second(torch.cat([torch.relu(self.first(encoded)), encoded], -1)))
        return (torch.sigmoid(self.out(hidden)).float() - 0.5).square().mean()


def batch_of(model: nn.Module) -> Tensor:
    shape = {Classifier: (2, 3, 16, 16), Modulated: (1, 6, WIDTH), Field: (40, 3)}[type(model)]
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "autocast", [pytest.param(False, marks=pytest.mark.more, id="float32"), pytest.param(True, id="autocast")]
)
@pytest.mark.parametrize("family", [Classifier, Modulated, Field])
def test_a_family_is_not_called_wrong(family: Callable[[], nn.Module], autocast: bool) -> None:
    torch.manual_seed(0)
    model = family()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) > 8}
    groups = qg.param_groups(model, rank=8, targets=lambda _, m: id(m.weight) in linear, refresh="svd")
    opt = qg.QGaLoreAdamW(groups, lr=5e-3, weight_decay=0.01)

    def step(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss: Tensor = model(batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    result = check(step, batch_of(model), backend=Interpreted())
    assert result.ok, result
    assert len(result.errors) > 20
