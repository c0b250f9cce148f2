"""Faults planted in a step without a compiler: what ``qg.check`` must find.

The compiled side of a check is an eager run off by its rounding (``Perturbed``), and a
fault in it: in a gradient before the update reads it, or in what the step left.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.reports import check as _check
from qgalore_compile.reports.compared import TensorError
from qgalore_compile.reports.perturbed import Perturbed
from qgalore_compile.reports.reach import entries
from qgalore_compile.reports.runs import Run, eager

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: 0 * x,
    "rows permuted": lambda x: x[torch.randperm(len(x))],
    "first row missing": lambda x: torch.cat([0 * x[:1], x[1:]]),
    "last column missing": lambda x: torch.cat([x[..., :-1], 0 * x[..., -1:]], -1),
    "rolled": lambda x: x.roll(1, -1),
    "sign": lambda x: -x,
    "twice": lambda x: 2 * x,
}
"""Of a gradient, or of how far a step moved a tensor."""

PRECISIONS = ("float32", "int8", "autocast", "bfloat16", "int8 bfloat16")


class Planted:
    """The fault that is on: a type, since these are not copied with a step."""

    in_gradient: Callable[[nn.Module], None] | None = None


class Net(nn.Module):
    """Embedding, two projected layers, norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.b(torch.relu(self.a(hidden)))
        logits = self.head(self.norm(hidden)).float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def batch(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 17, (4, 9), generator=generator)


def step_of(precision: str, *, taken: int, seed: int = 0) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A step after ``taken`` others, and its batch."""
    torch.manual_seed(seed)
    net, generator = Net().to(torch.bfloat16 if "bfloat16" in precision else torch.float32), torch.Generator()
    if "int8" in precision:
        qg.quantize_(net, group_size=8, targets=["a", "b"])
    keys = dict(targets=["a", "b"], rank=4, update_proj_gap=5, quant_group_size=8, weight_decay=0.1)
    opt = qg.QGaLoreAdamW(qg.param_groups(net, **keys), lr=1e-2)

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = net(tokens)
        loss.backward()
        if Planted.in_gradient is not None:
            Planted.in_gradient(net)
        opt.step()
        opt.zero_grad()
        return loss.detach()

    for _ in range(taken):
        step(batch(generator.manual_seed(seed)))
    return step, batch(generator)


class Trial:
    """A step, eager runs of it, and one more, which stands for the compiled step.

    Args:
        taken: steps before this one.
        seed: of the net, the batches and the rounding.
        spoilt, fault: the parameter whose gradient has this fault in the compiled step.
    """

    def __init__(self, precision: str, *, taken: int = 0, seed: int = 0, spoilt: str = "", fault: str = "") -> None:
        self._step, self._batch = step_of(precision, taken=taken, seed=seed)
        self._roots = {"": self._step, "tokens": self._batch}
        self._before = entries(self._roots)
        self._runs: dict[int, Run] = {}

        def in_gradient(net: nn.Module) -> None:
            grad = net.get_parameter(spoilt).grad
            assert grad is not None
            grad.copy_(FAULTS[fault](grad))

        with mock.patch.object(Planted, "in_gradient", staticmethod(in_gradient) if spoilt else None):
            self._compiled = Run(self._eager(Perturbed(1000 + seed), {}).entries)
        self._follow = _check._to_follow(self._eager(nullcontext(), {}), self._compiled)

    def _eager(self, mode: AbstractContextManager[Any], follow: dict[str, Any]) -> Run:
        return eager(self._roots, (self._step, (self._batch,), {}), mode, follow)

    def _run(self, seed: int) -> Run:
        if seed not in self._runs:
            self._runs[seed] = self._eager(Perturbed(seed) if seed else nullcontext(), self._follow)
        return self._runs[seed]

    def wrong(self, where: str = "", fault: str = "") -> list[TensorError]:
        """What ``qg.check`` calls wrong, with ``fault`` in how far the compiled step moved the tensor ``where``."""
        found = dict(self._compiled.entries)
        if where:
            name = f"net.{where}"
            found[name] = found[name]._replace(tensor=found[name].tensor.clone())
            spoil(self._before[name].tensor, found[name].tensor, FAULTS[fault])
        return [error for error in _check.judged(self._before, Run(found), self._run) if not error.ok]


@torch.no_grad()
def spoil(before: Tensor, after: Tensor, fault: Callable[[Tensor], Tensor]) -> None:
    """Change ``after`` so that it moved from ``before`` by ``fault`` of what it did; in codes, where there are any."""
    if isinstance(after, qg.Int8Weight):
        assert isinstance(before, qg.Int8Weight)
        spoil(before.codes, after.codes, fault)
    elif after.is_floating_point():
        after.copy_(before.float() + fault(after.float() - before.float()))
    else:
        limits = torch.iinfo(after.dtype)
        moved = fault(after.float() - before.float())
        after.copy_((before.float() + moved).clamp(limits.min, limits.max))
