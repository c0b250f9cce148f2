"""Rules of what reaches a weight from its gradient, as prototypes in plain PyTorch: eager, with float states.

A weight W (m, n) with m <= n is projected on the left, another by its transpose; P is m×r, G m×n, R = PᵀG.  From R Adam
makes N, and φ_j = ‖N_j‖ / ‖R_j‖ for each of the n columns.  What is written is -lr times

==========  ==========================================  ===============================================
galore      α P N                                       GaLore, arXiv 2403.03507
fira        α (P N + f (G - P R) diag φ)                Fira, arXiv 2410.01623, algorithm 1
apollo      α √(m / r) f G diag φ, P drawn              APOLLO, arXiv 2412.05270, algorithm 1; √(m / r) so that
                                                        rates do not depend on the rank
muon        α √n P ortho(M), M the momentum of R        Muon (Jordan, 2024), in the subspace
==========  ==========================================  ===============================================

Fira's published code does not multiply the residual with α, but what it takes from G: α P N + f (G - α P R) diag φ.
f is the limiter of the two papers: what is scaled may grow by 1 % a step, ‖S‖ against that of the step before.  "exact"
takes the norm of S itself, as the papers do; "low" that of N, which needs no G: ‖S_j‖ is ‖N_j‖ times the part of G that
lies outside of P, or all of it where P is drawn.  `scale="matrix"` has one φ a matrix (APOLLO-Mini's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

GROWTH = 1.01
BETAS, EPS = (0.9, 0.999), 1e-8


class Stepping(Optimizer):
    """One update of every parameter: what :meth:`update` says, times the learning rate.

    Args:
        params, lr: as of any optimizer; ``defaults``: of the groups' other keys.
        seed: of draws.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, seed: int, **defaults: Any) -> None:
        super().__init__(params, dict(lr=lr, **defaults))
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    p.sub_(group["lr"] * self.update(group, state, p.grad))

    def update(self, group: dict[str, Any], state: dict[str, Any], g: Tensor) -> Tensor:
        """U of a gradient."""
        raise NotImplementedError


class Rules(Stepping):
    """AdamW, but for groups with a ``rank``.

    Args:
        params: groups; with ``rank``: ``rule``, ``gap``, ``alpha``, ``basis`` ("svd", "mixed", "drawn"), ``limiter``
            ("exact", "low", ""), ``scale`` ("column", "matrix").
        seed: of drawn bases.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, seed: int = 0) -> None:
        defaults = dict(rule="galore", gap=50, alpha=0.25, basis="svd", limiter="", scale="column")
        super().__init__(params, lr, seed, **defaults)

    def update(self, group: dict[str, Any], state: dict[str, Any], g: Tensor) -> Tensor:
        if "rank" not in group:
            return adam(state, g)
        return (
            self._direction(group, state, g) if g.shape[0] <= g.shape[1] else self._direction(group, state, g.t()).t()
        )

    def _direction(self, group: dict[str, Any], state: dict[str, Any], g: Tensor) -> Tensor:
        rank = min(group["rank"], g.shape[0])
        if (state["step"] - 1) % group["gap"] == 0:
            state["p"] = basis(group["basis"], g, rank, self.generator)
        p: Tensor = state["p"]
        low, alpha = p.t() @ g, group["alpha"]
        if group["rule"] == "muon":
            return alpha * low.shape[1] ** 0.5 * (p @ orthogonal(momentum(state, low)))
        n = adam(state, low)
        if group["rule"] == "galore":
            return alpha * (p @ n)
        phi = ratio(n, low, None if group["scale"] == "matrix" else 0)
        if group["rule"] == "fira":
            rest = (g - p @ low) * phi
            return alpha * (p @ n + limited(state, rest, n, group["limiter"]) * rest)
        if group["rule"] == "fira, published":
            rest = (g - alpha * (p @ low)) * phi
            return alpha * (p @ n) + limited(state, rest, n, group["limiter"]) * rest
        assert group["rule"] == "apollo"
        whole = g * phi
        return alpha * (g.shape[0] / rank) ** 0.5 * limited(state, whole, n, group["limiter"]) * whole


def basis(kind: str, g: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """P (m, r) for a gradient (m, n)."""
    m = g.shape[0]
    if kind == "drawn":
        return torch.randn(m, rank, generator=generator) / rank**0.5
    left, sizes, _ = torch.linalg.svd(g, full_matrices=False)
    if kind == "svd":
        return left[:, :rank]
    assert kind == "mixed"  # the leading half, and as many of the others, drawn by their singular values
    leading = rank - rank // 2
    weights = sizes[leading:] + 1e-12
    others = torch.multinomial(weights, min(rank // 2, len(weights)), generator=generator)
    return torch.cat([left[:, :leading], left[:, leading + others]], 1)


def adam(state: dict[str, Any], g: Tensor) -> Tensor:
    """m̂ / (√v̂ + ε)."""
    m, v = state.setdefault("m", torch.zeros_like(g)), state.setdefault("v", torch.zeros_like(g))
    (beta1, beta2), step = BETAS, state["step"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + EPS)


def momentum(state: dict[str, Any], g: Tensor, beta: float = 0.95) -> Tensor:
    """Nesterov's, as Muon has it."""
    m = state.setdefault("m", torch.zeros_like(g))
    m.lerp_(g, 1 - beta)
    return g.lerp(m, beta)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Near U Vᵀ of x (r, n) with r <= n, by five steps of Newton and Schulz with Muon's coefficients."""
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.t()
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def ratio(n: Tensor, low: Tensor, dim: int | None) -> Tensor:
    """φ: ‖N‖ / ‖R‖ of columns, or of the matrix."""
    if dim is None:
        return n.norm() / (low.norm() + EPS)
    return n.norm(dim=dim) / (low.norm(dim=dim) + EPS)


def limited(state: dict[str, Any], scaled: Tensor, n: Tensor, how: str) -> float | Tensor:
    """f: 1, or less where the norm would grow by more than 1 %."""
    if not how:
        return 1.0
    (beta1, beta2), step = BETAS, state["step"]
    # as in Fira's code, of what is not bias-corrected
    norm = (scaled if how == "exact" else n).norm() * (1 - beta1**step) / (1 - beta2**step) ** 0.5
    last = state.get("norm")
    factor = torch.ones(()) if last is None else (GROWTH * last / (norm + EPS)).clamp(max=1.0)
    state["norm"] = factor * norm
    return factor
