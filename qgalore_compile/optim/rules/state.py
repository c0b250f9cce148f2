"""One parameter in one step, as a rule sees it: its moments and its group's numbers.  Adam's formulas stand here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qgalore_compile.formats import Format, decode, encode
from qgalore_compile.subspace.moments import MomentFormats
from qgalore_compile.subspace.projection import side_of

if TYPE_CHECKING:
    from qgalore_compile.optim.hyper_parameters import Group


class RuleState:
    """What a rule works with; what it stores is stored where ``ok`` alone.

    Attributes:
        group: the parameter's group, whose ``numbers`` are tensors.
        shape: of the weight.
        step: 0-d, updates with this one.
        gemm: the gradient's dtype, in which products are taken.
        across: of rules with sketches, G projected on the other side: (m, r) on the left, (r, n) on the right; clipped,
            float32.
    """

    def __init__(
        self,
        group: Group,
        shape: Sequence[int],
        state: dict[str, Tensor],
        formats: MomentFormats,
        noise: Tensor | None,
        step: Tensor,
        ok: Tensor,
        gemm: torch.dtype,
        across: Tensor | None = None,
    ) -> None:
        self.group, self.shape, self.step, self.gemm, self.across = group, shape, step, gemm, across
        self._state, self._formats, self._noise, self._ok = state, formats, noise, ok

    @property
    def dim(self) -> int:
        """The dimension of R whose size is the rank: 0 on the left, 1 on the right."""
        return 0 if side_of(self.shape) == "left" else 1

    @property
    def smaller_side(self) -> int:
        """Of the weight."""
        return min(self.shape)

    @property
    def scale(self) -> Tensor:
        """α, by which what is projected back is multiplied; 0-d."""
        return self.group.numbers.scale

    def adam(self, r: Tensor) -> Tensor:
        """Adam's N (float32); the moments are stored.  N is of the fresh ones, before they are quantised again."""
        beta1, rest1, log1, beta2, rest2, log2, least_root, eps, *_ = self.group.numbers
        stored = [self._state[name] for name in self._formats.names]
        exp_avg, exp_avg_sq = self._formats.decode(stored, r.shape)
        exp_avg = beta1 * exp_avg + rest1 * r
        exp_avg_sq = beta2 * exp_avg_sq + rest2 * r * r
        root = exp_avg_sq.sqrt()
        if self._formats.root:
            root = torch.maximum(root, least_root * exp_avg.abs())
        encoded = self._formats.encode(exp_avg, exp_avg_sq, root=root, noise=self._noise)
        self._store(stored, encoded)
        update = exp_avg / _bias(log1, self.step)
        below = root / _bias(log2, self.step).sqrt() + eps
        if torch.compiler.is_dynamo_compiling() or self.group["eps"] == 0:  # a graph is of every number
            return torch.where(below == 0, 0.0, update / below)  # 0 / 0 where there never was a gradient
        return update / below

    def momentum(self, r: Tensor) -> Tensor:
        """β₁ m + (1 - β₁) R of the fresh m = β₁ m + (1 - β₁) R, Nesterov's; m stored.  For rules of one moment."""
        beta1, rest1, *_ = self.group.numbers
        stored = [self._state[name] for name in self._formats.names]
        exp_avg = beta1 * self._formats.decode_first(stored, r.shape) + rest1 * r
        self._store(stored, self._formats.encode_first(exp_avg, self._noise))
        return beta1 * exp_avg + rest1 * r

    def factors(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Adafactor's second moment (arXiv 1804.04235): moving averages, bias-corrected, of the mean squares of G's
        rows (m, 1) and columns (1, n), both as sketches tell them; stored."""
        _, _, _, beta2, rest2, log2, *_ = self.group.numbers
        assert self.across is not None, "for rules with sketches"
        (m, n), sketches = self.shape, (r, self.across) if self.dim == 1 else (self.across, r)
        found = []
        for name, mean in (
            ("exp_avg_sq_row", sketches[0].square().sum(1) / n),
            ("exp_avg_sq_col", sketches[1].square().sum(0) / m),
        ):
            fresh = beta2 * self._state[name] + rest2 * mean
            self._store([self._state[name]], [fresh])
            found.append(fresh / _bias(log2, self.step))
        return found[0].unsqueeze(1), found[1].unsqueeze(0)

    def whole(self, g: Tensor, form: Format, names: Sequence[str], noise: Tensor | None) -> Tensor:
        """M̂ of the fresh M = β₁ M + (1 - β₁) G, M stored.

        Args:
            g: G, clipped, float32.
            form, names: of M, and of its parts in the state.
            noise: 16 random bits an element; None rounds to nearest.
        """
        beta1, rest1, log1, *_ = self.group.numbers
        stored = [self._state[name] for name in names]
        fresh: Tensor = beta1 * decode(stored, g.shape, form) + rest1 * g
        self._store(stored, encode(fresh, form, noise))
        return fresh / _bias(log1, self.step)

    def limited(self, norm: Tensor, growth: float) -> Tensor:
        """f, at most 1, by which something whose norm is ``norm`` may be written if that is to grow by no more than the
        factor ``growth`` a step (Fira, arXiv 2410.01623, eq. 10); f · norm is kept."""
        last = self._state["limit"]
        factor = torch.where(last > 0, growth * last / norm.clamp(min=1e-30), 1.0).clamp(max=1.0)
        self._store([last], [factor * norm])
        return factor

    def _store(self, stored: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write values over what is stored, where ``ok``."""
        for tensor, value in zip(stored, values, strict=True):
            tensor.copy_(torch.where(self._ok, value, tensor))


def _bias(log_beta: Tensor, step: Tensor) -> Tensor:
    """1 - βᵗ as -expm1(t ln β): in float32, 1 - 0.999**t is off by 1.3e-5 at t = 1."""
    return -torch.expm1(step.to(torch.float32) * log_beta)
