"""What the tuned comparison consists of, and which of its runs are still to come.

A *method* is an optimizer with its settings, a *setting* a model with a batch and a length, and a *run* one method in
one setting with a rate for the blocks, a rate for embedding, head and norms, and a seed.  The plan is a pure function
of the results so far:

    search    4 rates of the blocks × 2 of the rest; then, as long as the best one is at an edge, one beyond that edge,
              at most EXTENSIONS times; of a method that changes one thing in another, 3 rates of the blocks about that
              one's best
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
PLAIN = (0.01, 0.02)
"""Rates of embedding, head and norms that are tried for every method before edges are looked at."""
_LIKELIEST = ((1, 1), (2, 1), (1, 0), (0, 1), (2, 0), (3, 1), (0, 0), (3, 0))
"""Places of the blocks' rate and of that of the rest, in the order in which they are tried."""


@dataclass(frozen=True)
class Setting:
    """Where methods are compared.

    Attributes:
        preset: of the model.
        steps, batch, seq, accumulate: of every run; a step sees ``batch * seq * accumulate`` tokens.
        gap: steps from one subspace to the next.
        seeds: how many the best rates are run with.
        final_tokens: held-out bytes of the last evaluation.
        autocast: whether products of forward and backward run in bfloat16, weights and optimizers in float32.
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
    autocast: bool = False

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
        Setting("60m-8k", "60m", steps=250, accumulate=1, gap=50, seeds=1, batch=64, autocast=True),
    )
}


@dataclass(frozen=True)
class Method:
    """An optimizer and its settings.

    Attributes:
        name, title: in names of files, and for people.
        optimizer: "adamw" (torch's), "adamw8bit" (torchao's), "galore-torch", "ours" (this project's), "rules"
            (``rules.py``), or "whole" (``whole.py``).
        rates: of the blocks, four, ascending.
        keys: of the optimizer's projected group.
        rank_factor: on the preset's rank.
        near: the method in which this one changes one thing, if it does: its rates are searched about that one's.
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
    near: str = ""
    moments: str = "8bit"
    bits: tuple[float, float, float] = (8.25, 4.25, 8.125)

    @property
    def keeps_whole(self) -> bool:
        """Whether its only moment is as large as the weight, in four bits."""
        return self.optimizer == "whole" or (self.optimizer == "ours" and self.keys.get("rule") in ("factored", "muon"))

    def rank(self, setting: Setting) -> int:
        """Of the projection."""
        return max(1, int(find_preset(setting.preset).rank * self.rank_factor))


_LOW = (0.005, 0.01, 0.02, 0.04)
_FULL = (0.0005, 0.001, 0.002, 0.004)
_SIGN = (0.0002, 0.0004, 0.0008, 0.0016)
_FLOAT = (32.0, 32.0, 32.0)
_WHOLE = (8.25, 0.0, 4.25)
_FACTORED = {"rule": "factored", "rank": 16, "scale": 1.0}
_MUON = {"rule": "muon", "rank": None, "scale": 1.0, "betas": (0.95, 0.999)}
_4BIT = {"stored": "moment4/128"}

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
        Method("apollo", "APOLLO", "rules", _LOW, {"rule": "apollo", "basis": "drawn", "limiter": "exact"}),
        Method("muon", "momentum orthogonalised in the subspace", "rules", _LOW, {"rule": "muon"}),
        Method("factored", "4-bit momentum, factored second moment", "whole", _FULL, {"rule": "factored", **_4BIT},
               bits=_WHOLE),
        Method("muon-whole", "Muon, 4-bit momentum", "whole", _FULL, {"rule": "muon", **_4BIT}, bits=_WHOLE),
        Method("lion", "Lion, 4-bit momentum", "whole", _SIGN, {"rule": "lion", **_4BIT}, bits=_WHOLE),
        Method("ours-factored", "rule factored, INT8 weights, ours", "ours", _FULL, _FACTORED, bits=_WHOLE),
        Method("ours-muon", "rule muon of all of the gradient, INT8 weights, ours", "ours", _FULL, _MUON,
               moments="4bit", bits=_WHOLE),
        # one thing changed
        Method("fira-published", "Fira, as published", "rules", _LOW, {"rule": "fira, published", "limiter": "exact"},
               near="fira"),
        Method("fira-free", "Fira without limiter", "rules", _LOW, {"rule": "fira"}, near="fira"),
        Method("fira-low", "Fira, limiter by N", "rules", _LOW, {"rule": "fira", "limiter": "low"}, near="fira"),
        Method("fira-mixed", "Fira, half of the basis drawn", "rules", _LOW,
               {"rule": "fira", "limiter": "exact", "basis": "mixed"}, near="fira"),
        Method("galore-mixed", "GaLore's rule, half of the basis drawn", "rules", _LOW, {"basis": "mixed"},
               near="galore"),
        Method("galore-2r", "GaLore's rule, twice the rank", "rules", _LOW, rank_factor=2.0, near="galore"),
        Method("apollo-1", "APOLLO of rank 1", "rules", _LOW,
               {"rule": "apollo", "basis": "drawn", "limiter": "exact", "scale": "matrix"}, rank_factor=0.0,
               near="apollo"),
        Method("apollo-free", "APOLLO without limiter", "rules", _LOW, {"rule": "apollo", "basis": "drawn"},
               near="apollo"),
        Method("apollo-svd", "APOLLO, P by SVD", "rules", _LOW, {"rule": "apollo", "limiter": "exact"}, near="apollo"),
        Method("factored-float", "float momentum, factored second moment", "whole", _FULL, {"rule": "factored"},
               near="factored", bits=(8.25, 0.0, 32.0)),
        Method("factored-after", "4-bit momentum of what is written, factored second moment", "whole", _FULL,
               {"rule": "after", **_4BIT}, near="factored", bits=_WHOLE),
        Method("factored-nearest", "4-bit momentum rounded to nearest, factored second moment", "whole", _FULL,
               {"rule": "factored", "draws": False, **_4BIT}, near="factored", bits=_WHOLE),
        Method("larger", "4-bit momentum, a second moment for each place of the larger side", "whole", _FULL,
               {"rule": "larger", **_4BIT}, near="factored", bits=_WHOLE),
        Method("smaller", "4-bit momentum, a second moment for each place of the smaller side", "whole", _FULL,
               {"rule": "smaller", **_4BIT}, near="factored", bits=_WHOLE),
        Method("sketched", "4-bit momentum, factored second moment of sketches of rank 16", "whole", _FULL,
               {"rule": "sketched", "rank": 16, **_4BIT}, near="factored", bits=_WHOLE),
        Method("sketched-4", "the same, rank 4", "whole", _FULL, {"rule": "sketched", "rank": 4, **_4BIT},
               near="factored", bits=_WHOLE),
        Method("muon-whole-float", "Muon, float momentum", "whole", _FULL, {"rule": "muon"}, near="muon-whole",
               bits=(8.25, 0.0, 32.0)),
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
        """Runs to come, as far as they are known, in the order in which they are best run: the likeliest rates of every
        method before the second likeliest of any, and seeds last."""
        for setting in self.settings:
            missing = [spec for method in self.methods for spec in self.missing(setting, method)]
            yield from sorted(missing, key=self._likeliness)
        for setting in self.settings:
            for method in self.methods:
                best = self.best(setting, method)
                if best is not None:
                    for seed in range(1, setting.seeds):
                        spec = RunSpec(setting, method, best, seed)
                        if spec.name not in self.results:
                            yield spec

    @staticmethod
    def _likeliness(spec: RunSpec) -> int:
        """The place of a run's rates in the order of :data:`_LIKELIEST`; what an edge asks for comes behind those."""
        method = spec.method
        if method.near or spec.rates.blocks not in method.rates or spec.rates.plain not in PLAIN:
            return len(_LIKELIEST)
        return _LIKELIEST.index((method.rates.index(spec.rates.blocks), PLAIN.index(spec.rates.plain)))

    def at(self, rates: Sequence[Rates], seeds: Sequence[int]) -> list[RunSpec]:
        """Runs to come of every method at those rates and with those seeds."""
        specs = [
            RunSpec(setting, method, pair, seed)
            for seed in seeds
            for setting in self.settings
            for pair in rates
            for method in self.methods
        ]
        return [spec for spec in specs if spec.name not in self.results]

    def missing(self, setting: Setting, method: Method) -> list[RunSpec]:
        """What the search of a method's rates needs next; empty where it is over."""
        rates = self._first(setting, method)
        grid = [RunSpec(setting, method, each) for each in rates]
        missing = [spec for spec in grid if spec.name not in self.results]
        if missing:
            return missing
        tried = self.tried(setting, method)
        if not grid or len(tried) - len(grid) >= 2 * EXTENSIONS:
            return []
        beyond = [RunSpec(setting, method, each) for each in self._beyond(tried, plain=not method.near)]
        return [spec for spec in beyond if spec.name not in self.results]

    def _first(self, setting: Setting, method: Method) -> list[Rates]:
        """Rates to begin with; none where those of another method have to be known first."""
        if not method.near:
            return [Rates(method.rates[i], PLAIN[j]) for i, j in _LIKELIEST]
        best = self.best(setting, METHODS[method.near])
        return [] if best is None else [Rates(rounded(best.blocks * factor), best.plain) for factor in (0.5, 1.0, 2.0)]

    def tried(self, setting: Setting, method: Method) -> dict[Rates, float]:
        """Losses of seed 0 by rates."""
        prefix = f"{setting.name}/{method.name}/"
        rows = [result for name, result in self.results.items() if name.startswith(prefix) and result["seed"] == 0]
        return {Rates(*result["rates"]): loss_of(result) for result in rows}

    @staticmethod
    def _beyond(tried: Mapping[Rates, float], *, plain: bool) -> list[Rates]:
        """Where the best rates have no neighbour on one side, that neighbour: a factor of two in one of them, in that
        of the rest only if ``plain``."""
        best = min(tried, key=lambda rates: tried[rates])
        if tried[best] == math.inf:
            return []
        found = []
        for factor in (0.5, 2.0):
            found.append(Rates(rounded(best.blocks * factor), best.plain))
            if plain:
                found.append(Rates(best.blocks, rounded(best.plain * factor)))
        return [rates for rates in found if rates not in tried]

    def best(self, setting: Setting, method: Method) -> Rates | None:
        """The best rates of a search that is over."""
        if self.missing(setting, method) or not self._first(setting, method):
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
    projects = method.optimizer in ("galore-torch", "ours", "rules") and not method.keeps_whole
    low = sum(min(rank, m, n) * max(m, n) for m, n in shapes) if projects else blocks
    drawn = method.keys.get("basis") == "drawn"
    p = 0 if drawn or not projects else sum(min(rank, m, n) * min(m, n) for m, n in shapes)
    rule = method.keys.get("rule")
    means = sum(m + n for m, n in shapes) if method.keeps_whole and rule not in ("muon", "lion") else 0
    moments = 1 if method.keeps_whole or rule == "muon" else 2
    others = 8.125 if method.optimizer == "whole" else moment  # of embedding, head and norms: Adam's
    # galore-torch and AdamW keep whole gradients until the step; a compiled step R alone, and of rules that read the
    # gradient in the write-back its factors, which are activations; of Muon's one weight at a time
    gradients = blocks if (not projects and not method.keeps_whole) or method.optimizer == "galore-torch" else low
    if method.keeps_whole:
        gradients = max(m * n for m, n in shapes) if rule == "muon" else 0
    return {
        "weights": int(blocks * weight / 8) + 4 * plain,
        "state": int((moments * low * moment + p * projector + 2 * plain * others) / 8) + 4 * means,
        "gradients": 4 * (gradients + plain),
    }
