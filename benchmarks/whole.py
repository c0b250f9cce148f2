"""Rules with one moment as large as the weight, as prototypes in plain PyTorch: no subspace, no P, no SVD.

At the authors' ranks, a quarter of the smaller side, Q-GaLore's states are 5.1 bits for each element of a square
weight: two moments of 8 bits over a quarter of it, and P in 4.  A whole momentum in 4 bits is 4.25.  M is the moment, G
the gradient, both (m, n), and what is written is -lr times

==========  ===================================================  ======================================================
lion        sign(β₁ M + (1 - β₁) G), M of β₂ after it            Lion, arXiv 2302.06675: (0.9, 0.99) here
factored    M̂ / √V̂, V of row and column means of G²              Adafactor (arXiv 1804.04235) with a momentum; in 4 bits
                                                                 "4-bit Factor", arXiv 2309.01507
after       M̂ of G / √V̂, the same V                              CAME's order: the momentum is of what is written
larger      M̂ / √v̂, v one number for each row or column of      after Adam-mini, arXiv 2406.16793, which has one number
            the larger side                                      an output neuron
smaller     M̂ / √v̂, the same of the smaller side
sketched    M̂ / √V̂, V of the columns' norms of PᵀG and of the   as APOLLO has them, arXiv 2412.05270: their mean is
            rows' of G Q, P and Q signs drawn anew in each step  that of G's
muon        √(max(m, n)) ortho(Nesterov of M)                    Muon (Jordan, 2024), scaled to Adam's size
==========  ===================================================  ======================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from rules import BETAS, EPS, Stepping, adam, orthogonal
from torch import Tensor

from qgalore_compile.formats import Format

LION_BETAS = (0.9, 0.99)
MUON_BETA = 0.95


class Whole(Stepping):
    """AdamW, but for groups with a ``rule``.

    Args:
        params: groups; with ``rule``: ``stored``, the format of M (""  for float32), ``draws``, whether it is rounded
            stochastically, and ``rank``, of a sketch.
        seed: of draws.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, seed: int = 0) -> None:
        super().__init__(params, lr, seed, rule="", stored="", draws=True, beta2=BETAS[1], rank=0)

    def update(self, group: dict[str, Any], state: dict[str, Any], g: Tensor) -> Tensor:
        if not group["rule"]:
            return adam(state, g)
        rule, step = group["rule"], state["step"]
        (beta1, _), beta2 = BETAS, group["beta2"]
        m = self._load(group, state, g)
        if rule == "lion":
            update = m.lerp(g, 1 - LION_BETAS[0]).sign()
            self._store(group, state, m.lerp(g, 1 - LION_BETAS[1]))
            return update
        if rule == "muon":
            m = m.lerp(g, 1 - MUON_BETA)
            self._store(group, state, m)
            nesterov = g.lerp(m, MUON_BETA)
            wide = nesterov if g.shape[0] <= g.shape[1] else nesterov.t()
            found = orthogonal(wide) * wide.shape[1] ** 0.5
            return found if g.shape[0] <= g.shape[1] else found.t()
        root = self._root(group, state, g) / (1 - beta2**step) ** 0.5 + EPS
        m = m.lerp(g / root if rule == "after" else g, 1 - beta1)
        self._store(group, state, m)
        m = m / (1 - beta1**step)
        return m if rule == "after" else m / root

    def _root(self, group: dict[str, Any], state: dict[str, Any], g: Tensor) -> Tensor:
        """√V, (m, n) or what spreads to it."""
        means = self._means(group, g)
        kept = state.setdefault("v", [torch.zeros_like(each) for each in means])
        for old, new in zip(kept, means, strict=True):
            old.lerp_(new, 1 - group["beta2"])
        if len(kept) == 1:
            return kept[0].sqrt()
        return (kept[0] * kept[1] / kept[0].mean().clamp(min=1e-38)).sqrt()

    def _means(self, group: dict[str, Any], g: Tensor) -> list[Tensor]:
        """Of G², over all but the dimensions that V keeps."""
        dim = int(g.shape[0] > g.shape[1])  # that of the smaller side
        if group["rule"] == "sketched":
            left, right = (self._signs(group["rank"], size, g) for size in g.shape)
            across, down = g @ right.t() / g.shape[1] ** 0.5, left @ g / g.shape[0] ** 0.5
            return [across.square().mean(1, keepdim=True), down.square().mean(0, keepdim=True)]
        square = g * g
        if group["rule"] == "larger":
            return [square.mean(dim, keepdim=True)]
        if group["rule"] == "smaller":
            return [square.mean(1 - dim, keepdim=True)]
        return [square.mean(1, keepdim=True), square.mean(0, keepdim=True)]

    def _signs(self, rank: int, size: int, like: Tensor) -> Tensor:
        return torch.randint(0, 2, (rank, size), generator=self.generator).mul_(2).sub_(1).to(like.dtype)

    def _load(self, group: dict[str, Any], state: dict[str, Any], g: Tensor) -> Tensor:
        if "m" not in state:
            return torch.zeros_like(g)
        return _compiled(group["stored"], g.shape)[1](state["m"]) if group["stored"] else state["m"]

    def _store(self, group: dict[str, Any], state: dict[str, Any], m: Tensor) -> None:
        if not group["stored"]:
            state["m"] = m
            return
        noise = None
        if group["draws"]:
            noise = torch.randint(0, 1 << 16, m.shape, dtype=torch.int32, generator=self.generator)
        state["m"] = _compiled(group["stored"], m.shape)[0](m, noise)


@cache
def _compiled(text: str, shape: tuple[int, ...]) -> tuple[Callable[..., list[Tensor]], Callable[..., Tensor]]:
    """Encode and decode; compiled, for four bits of 100,000 elements take 64 ms as they are and 2 ms so."""
    form = Format.parse(text).flat()

    def encode(m: Tensor, noise: Tensor | None) -> list[Tensor]:
        return form.encode(m, noise)

    def decode(stored: list[Tensor]) -> Tensor:
        return form.decode(stored, shape)

    return torch.compile(encode, dynamic=False), torch.compile(decode, dynamic=False)
