"""What the tuned comparison consists of, and which of its runs are still to come.

A *method* is an optimizer with its settings, a *setting* a model with a batch and a length, and a *run* one method in
one setting with a rate for the blocks, a rate for embedding, head and norms, and a seed.  The plan is a pure function
of the results so far:

    search    4 rates of the blocks × 2 of the rest; then, as long as the best one is at an edge, one beyond that edge,
              at most EXTENSIONS times
    seeds     the best pair of rates with other seeds

Both rates follow the same warm-up and cosine.  Every method of a setting sees the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from quality_plan import Result, loss_of, rounded

from qgalore_compile.training.llama import find_preset

EXTENSIONS = 4
PLAIN = (0.005, 0.01)
"""Rates of embedding, head and norms that are tried for every method before edges are looked at."""


@dataclass(frozen=True)
class Setting:
    """Where methods are compared.

    Attributes:
        preset: of the model.
        steps, batch, seq, accumulate: of every run; a step sees ``batch * seq * accumulate`` tokens.
        gap: steps from one subspace to the next.
        seeds: how many the best rates are run with.
        final_tokens: held-out bytes of the last evaluation.
    """

    name: str
    preset: str
    steps: int
    accumulate: int
    gap: int
    seeds: int
    batch: int = 16
    seq: int = 128
    final_tokens: int = 262_144

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq * self.accumulate


SETTINGS = {
    each.name: each
    for each in (
        Setting("tiny-2k", "tiny", steps=800, accumulate=1, gap=50, seeds=3),
        Setting("tiny-32k", "tiny", steps=100, accumulate=16, gap=10, seeds=3),
        Setting("35m-2k", "35m", steps=500, accumulate=1, gap=50, seeds=2),
        Setting("35m-32k", "35m", steps=60, accumulate=16, gap=10, seeds=2),
    )
}


@dataclass(frozen=True)
class Method:
    """An optimizer and its settings.

    Attributes:
        name, title: in names of files, and for people.
        optimizer: "adamw" (torch's), "adamw8bit" (torchao's), "galore-torch", "ours" (this project's), or "rules"
            (``rules.py``).
        rates: of the blocks, four, ascending.
        keys: of the optimizer's projected group.
        rank_factor: on the preset's rank.
        moments: of ours.
        bits: an element of the weights of the blocks, of P, and of a moment, as they are stored.  Of a prototype, as
            its compiled form would store them.
    """

    name: str
    title: str
    optimizer: str
    rates: tuple[float, ...]
    keys: dict[str, Any] = field(default_factory=dict)
    rank_factor: float = 1.0
    moments: str = "8bit"
    bits: tuple[float, float, float] = (8.25, 4.25, 8.125)

    def rank(self, setting: Setting) -> int:
        """Of the projection."""
        return max(1, int(find_preset(setting.preset).rank * self.rank_factor))


_LOW = (0.005, 0.01, 0.02, 0.04)
_FULL = (0.0005, 0.001, 0.002, 0.004)
_FLOAT = (32.0, 32.0, 32.0)

METHODS = {
    each.name: each
    for each in (
        Method("adamw", "AdamW", "adamw", _FULL, bits=_FLOAT),
        Method("adamw8bit", "AdamW, 8-bit moments (torchao)", "adamw8bit", _FULL, bits=(32.0, 0.0, 8.125)),
        Method("galore-torch", "GaLore (galore-torch)", "galore-torch", _LOW, bits=_FLOAT),
        Method("qgalore", "Q-GaLore, ours", "ours", _LOW),
        Method("qgalore-4bit-2r", "Q-GaLore, 4-bit moments, twice the rank", "ours", _LOW, rank_factor=2.0,
               moments="4bit", bits=(8.25, 4.25, 4.25)),
        Method("galore", "GaLore's rule", "rules", _LOW),
        Method("fira", "Fira, α on all of it", "rules", _LOW, {"rule": "fira", "limiter": "exact"}),
        Method("fira-published", "Fira, as published", "rules", _LOW, {"rule": "fira, published", "limiter": "exact"}),
        Method("apollo", "APOLLO", "rules", _LOW, {"rule": "apollo", "basis": "drawn", "limiter": "exact"}),
        Method("apollo-1", "APOLLO of rank 1", "rules", _LOW,
               {"rule": "apollo", "basis": "drawn", "limiter": "exact", "scale": "matrix"}, rank_factor=0.0),
        Method("muon", "momentum orthogonalised in the subspace", "rules", _LOW, {"rule": "muon"}),
        # one thing changed
        Method("galore-mixed", "GaLore's rule, half of the basis drawn", "rules", _LOW, {"basis": "mixed"}),
        Method("galore-2r", "GaLore's rule, twice the rank", "rules", _LOW, rank_factor=2.0),
        Method("fira-free", "Fira without limiter", "rules", _LOW, {"rule": "fira"}),
        Method("fira-low", "Fira, limiter by N", "rules", _LOW, {"rule": "fira", "limiter": "low"}),
        Method("fira-mixed", "Fira, half of the basis drawn", "rules", _LOW,
               {"rule": "fira", "limiter": "exact", "basis": "mixed"}),
        Method("apollo-free", "APOLLO without limiter", "rules", _LOW, {"rule": "apollo", "basis": "drawn"}),
        Method("apollo-svd", "APOLLO, P by SVD", "rules", _LOW, {"rule": "apollo", "limiter": "exact"}),
    )
}  # fmt: skip


class Rates(NamedTuple):
    """Peak learning rates: of the blocks, and of embedding, head and norms."""

    blocks: float
    plain: float


@dataclass(frozen=True)
class RunSpec:
    """One run."""

    setting: Setting
    method: Method
    rates: Rates
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the run and of its result."""
        return f"{self.setting.name}/{self.method.name}/{self.rates.blocks:g}-{self.rates.plain:g}-{self.seed}"


class Plan:
    """The runs of some settings and methods, given results by the names of runs."""

    def __init__(self, results: Mapping[str, Result], settings: Sequence[str], methods: Sequence[str]) -> None:
        self.results = results
        self.settings = [SETTINGS[name] for name in settings]
        self.methods = [METHODS[name] for name in methods]

    def __iter__(self) -> Iterator[RunSpec]:
        """Runs to come, as far as they are known, in the order in which they are best run."""
        for setting in self.settings:
            for method in self.methods:
                yield from self.missing(setting, method)
        for setting in self.settings:
            for method in self.methods:
                best = self.best(setting, method)
                if best is not None:
                    for seed in range(1, setting.seeds):
                        spec = RunSpec(setting, method, best, seed)
                        if spec.name not in self.results:
                            yield spec

    def missing(self, setting: Setting, method: Method) -> list[RunSpec]:
        """What the search of a method's rates needs next; empty where it is over."""
        grid = [RunSpec(setting, method, Rates(blocks, plain)) for plain in PLAIN for blocks in method.rates]
        missing = [spec for spec in grid if spec.name not in self.results]
        if missing:
            return missing
        tried = self.tried(setting, method)
        if len(tried) - len(grid) >= 2 * EXTENSIONS:
            return []
        beyond = [RunSpec(setting, method, rates) for rates in self._beyond(tried)]
        return [spec for spec in beyond if spec.name not in self.results]

    def tried(self, setting: Setting, method: Method) -> dict[Rates, float]:
        """Losses of seed 0 by rates."""
        prefix = f"{setting.name}/{method.name}/"
        rows = [result for name, result in self.results.items() if name.startswith(prefix) and result["seed"] == 0]
        return {Rates(*result["rates"]): loss_of(result) for result in rows}

    @staticmethod
    def _beyond(tried: Mapping[Rates, float]) -> list[Rates]:
        """Where the best rates have no neighbour on one side, that neighbour: a factor of two in one of them."""
        best = min(tried, key=lambda rates: tried[rates])
        if tried[best] == math.inf:
            return []
        found = []
        for factor in (0.5, 2.0):
            found.append(Rates(rounded(best.blocks * factor), best.plain))
            found.append(Rates(best.blocks, rounded(best.plain * factor)))
        return [rates for rates in found if rates not in tried]

    def best(self, setting: Setting, method: Method) -> Rates | None:
        """The best rates of a search that is over."""
        if self.missing(setting, method):
            return None
        tried = self.tried(setting, method)
        return min(tried, key=lambda rates: tried[rates]) if tried else None


def stored_bytes(method: Method, setting: Setting, shapes: Sequence[tuple[int, int]], plain: int) -> dict[str, int]:
    """Bytes that live between steps, and those of the gradients that live until the update.

    Args:
        method, setting: of the run.
        shapes: of the blocks' weights.
        plain: elements of embedding, head and norms: kept in float32, with moments as the method stores them.
    """
    rank, (weight, projector, moment) = method.rank(setting), method.bits
    blocks = sum(m * n for m, n in shapes)
    projects = method.optimizer in ("galore-torch", "ours", "rules")
    low = sum(min(rank, m, n) * max(m, n) for m, n in shapes) if projects else blocks
    drawn = method.keys.get("basis") == "drawn"
    p = 0 if drawn or not projects else sum(min(rank, m, n) * min(m, n) for m, n in shapes)
    moments = 1 if method.keys.get("rule") == "muon" else 2
    # galore-torch and AdamW keep whole gradients until the step; a compiled step R alone, and of rules that read the
    # gradient in the write-back its factors, which are activations
    gradients = low if method.optimizer in ("ours", "rules") else blocks
    return {
        "weights": int(blocks * weight / 8) + 4 * plain,
        "state": int((moments * low + 2 * plain) * moment / 8 + p * projector / 8),
        "gradients": 4 * (gradients + plain),
    }
