"""What the tests of formats share: texts of all of them, shapes, numbers, and a small model that is trained in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.formats import Format
from qgalore_compile.formats.base import Grouped
from qgalore_compile.formats.codebook import Codebook

WRITTEN = (
    "int8/64", "int6/32", "int4/32", "int4/32+pow2", "int8/32+rotated", "int4/32+flat",
    "dynamic8/64+rows", "dynamic8", "dynamic8+unsigned", "dynamic4/32", "dynamic4/32+unsigned", "dynamic4/32+rows",
    "moment4/32", "moment4/32+unsigned",
    "e4m3/32", "e5m2/64", "e2m3/32", "e3m2/32", "e2m1/32", "e3m0/32", "e4m3/32+flat", "e2m1/32+pow2",
    "e4m3/32+pow2+rotated", "nf4/64", "nf4/32+rotated", "official8/32", "official4/32",
)  # fmt: skip
"""Each name, each modifier, and some of them together: to add a format to all tests, add its text here."""
READ = ("int4/32+planar", "int6/32+pow2row", "e2m1/32+pow2row")
"""Those that kernels only read."""
GROUPED = (*WRITTEN, *READ)
DOUBLE = ("nf4/64+double", "e2m1/32+double")
PLAIN = ("float32", "bfloat16")
ALL = (*GROUPED, *DOUBLE, *PLAIN)

SHAPES = ((3, 160), (2, 77), (1, 1), (5,), (2, 3, 40))
"""Whole groups, short ones, odd rows, one element, one and three dimensions."""


def grouped(text: str) -> Grouped:
    """The format of a text, with codes in groups."""
    found = Format.parse(text)
    assert isinstance(found, Grouped)
    return found


def codebook(text: str) -> Codebook:
    """The format of a text, with a table of sixteen entries."""
    found = Format.parse(text)
    assert isinstance(found, Codebook)
    return found


def entries(text: str) -> Tensor:
    """Of such a format, float64."""
    return torch.tensor(codebook(text).entries, dtype=torch.float64)


def rounding(text: str) -> bool:
    """Whether a format takes draws."""
    form = Format.parse(text)
    return (form.grouped or form).rounds


def numbers(shape: tuple[int, ...], text: str) -> Tensor:
    """Normal numbers; of unsigned formats their sizes."""
    x = torch.randn(shape)
    return x.abs() if "unsigned" in text else x


def draws(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """16 random bits an element."""
    return torch.randint(0, 1 << 16, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


# -- training ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Embedding and head, large enough for coded moments, two projected layers, one on each side, and a small norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 72)
        self.blocks = nn.ModuleList([nn.Linear(72, 40, bias=False), nn.Linear(40, 72, bias=False)])
        self.norm, self.head = nn.LayerNorm(72), nn.Linear(72, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = self.norm(hidden + self.blocks[1](torch.tanh(self.blocks[0](hidden))))
        logits = self.head(hidden)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def made(weights: str | None = None, **keys: Any) -> tuple[Net, qg.QGaLoreAdamW]:
    torch.manual_seed(0)
    net = Net()
    if weights is not None:
        qg.quantize_(net, format=weights, targets=["blocks.0", "blocks.1"])
    keys = {"rank": 8, "targets": ["blocks.0", "blocks.1"], "update_proj_gap": 3, "quant_group_size": 32, **keys}
    return net, qg.QGaLoreAdamW(qg.param_groups(net, **keys), lr=1e-2)


def batch(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(seed))
