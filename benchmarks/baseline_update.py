"""The update of one weight as Q-GaLore publishes it, in PyTorch operators: what `update_step.py` compares with.

Frozen.  8-bit moments by a search in the codebook (`bucketize`), INT8 weights in groups of 256 with a clamped integer
zero point, stochastic rounding from `torch.rand`, an INT4 projector unpacked before each product.  For plain Inductor.
Source of the arithmetic: q_galore_torch and bitsandbytes' block-wise Adam.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore_compile import formats
from qgalore_compile.subspace.projection import side_of

GROUP = BLOCK = 256
BETAS, EPS, ALPHA = (0.9, 0.999), 1e-8, 0.25


class Baseline:
    """A weight (m, n), n a multiple of the group, of rank r and all its state; `step` updates it in place."""

    def __init__(self, weight: Tensor, projector: Tensor, rank: int, lr: float) -> None:
        m, n = weight.shape
        self.right, self.lr, device = side_of(weight.shape) == "right", lr, weight.device
        self.codes, self.scale, self.zero, _ = formats.quantize_official(weight, GROUP, bits=8)
        self.packed, self.p_scale, self.p_offset, self.columns, _ = formats.quantize_int4(projector, GROUP)
        low = (m, rank) if self.right else (rank, n)
        self.books = [formats.dynamic_map(signed).to(device) for signed in (True, False)]
        self.middles = [(book[1:] + book[:-1]) / 2 for book in self.books]
        self.moments = [torch.full(low, code, dtype=torch.uint8, device=device) for code in (127, 0)]
        self.absmax = [torch.zeros(low[0] * low[1] // BLOCK, device=device) for _ in range(2)]
        self.count = torch.zeros((), device=device)

    def step(self, grad: Tensor) -> None:
        """One update; `grad` (m, n) in any floating dtype, whose dtype the products run in."""
        self.count.add_(1)
        p = formats.dequantize_int4(self.packed, self.p_scale, self.p_offset, self.columns, GROUP, dtype=grad.dtype)
        low = (grad @ p.t() if self.right else p.t() @ grad).float()
        m = BETAS[0] * self._load(0) + (1 - BETAS[0]) * low
        v = BETAS[1] * self._load(1) + (1 - BETAS[1]) * low * low
        self._store(0, m)
        self._store(1, v)
        update = (m / (1 - BETAS[0] ** self.count)) / ((v / (1 - BETAS[1] ** self.count)).sqrt() + EPS)
        update = update.to(grad.dtype)
        full = (update @ p if self.right else p @ update).float()
        weight = formats.dequantize_official(self.codes, self.scale, self.zero, GROUP) - self.lr * ALPHA * full
        grouped = weight.view(-1, GROUP)
        low_, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        scale = (high - low_).clamp(min=1e-5) / 255
        zero = (-(low_ / scale).round()).clamp(0, 255)
        level = grouped / scale
        rounded = level.floor() + (torch.rand_like(level) < level - level.floor())
        self.codes.copy_((rounded + zero).clamp(0, 255).to(torch.uint8).view_as(weight))
        self.scale.copy_(scale.view_as(self.scale))
        self.zero.copy_(zero.view_as(self.zero))

    def _load(self, which: int) -> Tensor:
        codes = self.moments[which]
        entries = self.books[which][codes.to(torch.int32).view(-1, BLOCK)]
        return (entries * self.absmax[which][:, None]).view_as(codes)

    def _store(self, which: int, value: Tensor) -> None:
        blocks = value.reshape(-1, BLOCK)
        absmax = blocks.abs().amax(-1)
        unit = blocks / absmax.clamp(min=1e-30)[:, None]
        self.moments[which].copy_(torch.bucketize(unit, self.middles[which]).to(torch.uint8).view_as(value))
        self.absmax[which].copy_(absmax)
