"""What the study of quality consists of, and which of its runs are still to come.

A *scale* is a preset with a number of steps, a *case* an optimizer with its group keys, and a *run* one case at one
scale with one learning rate and one seed.  The plan is a pure function of the results so far:

    search     every method at three learning rates a factor of two apart; while the best one is at an edge, one more
               beyond it, at most EXTENSIONS times
    seeds      every method at its best rate, two more seeds
    variants   ours with one thing changed, at ours' best rate
    larger     the methods at the larger scale, each at the rate that the smaller scale has found

Gaps are scaled to the length of a run: about thirty refreshes would happen at a fixed gap, of which the published queue
of five similarities alone takes six.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

import qgalore_compile as qg
from qgalore_compile.optim.settings import defaults
from qgalore_compile.training.llama import LlamaConfig, Preset, find_preset

FACTOR = 2.0
EXTENSIONS = 2
FOUND = math.nan  # a learning rate that the search has yet to find

Result = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How long and on what a run trains.

    Attributes:
        preset: of the model.
        steps, batch, seq, gap: of every run; `gap` is `update_proj_gap`.
        evaluations: points of the curve.
        curve_tokens, final_tokens: held-out bytes of a point, and of the last evaluation, which is the result.
        compiled: whether steps are compiled.
        device: where it trains.
        variants: whether parts of ours are changed one at a time; a scale without is for comparing the methods.
        lr_of: the scale whose search finds the rates; None: this one searches.
        minutes, compile_minutes: of a run whose code has been compiled, by optimizer, and of compiling it: expected,
            before any has been timed.
    """

    name: str
    preset: str
    steps: int
    batch: int
    seq: int
    gap: int
    evaluations: int
    curve_tokens: int
    final_tokens: int
    minutes: dict[str, float]
    compile_minutes: float = 0.0
    compiled: bool = True
    device: str = "cpu"
    variants: bool = True
    lr_of: str | None = None


SCALES = {
    scale.name: scale
    for scale in (
        # 0.7 M tokens; a weight is refreshed 30 times at a fixed gap, and 9 times if the gap doubles whenever it can
        Scale("tiny", "tiny", 360, 16, 128, 12, 9, 16_384, 131_072,
              {"adamw": 0.8, "galore-torch": 1.0, "qgalore": 1.3}, compile_minutes=0.8),
        # 1.0 M tokens; 32 times, and 9 times
        Scale("35m", "35m", 500, 16, 128, 16, 10, 16_384, 131_072,
              {"adamw": 8.5, "galore-torch": 10, "qgalore": 10.5}, compile_minutes=3, lr_of="tiny"),
        # For a GPU. 4.1 M tokens; 20 times at a fixed gap
        Scale("60m", "60m", 1000, 16, 256, 50, 10, 65_536, 524_288,
              {"adamw": 1, "galore-torch": 2, "qgalore": 1.5}, compile_minutes=1, device="cuda", variants=False),
        Scale("quick", "nano", 3, 2, 16, 1, 3, 64, 64,
              {"adamw": 0.02, "galore-torch": 0.02, "qgalore": 0.02}, compiled=False),
    )
}  # fmt: skip

NANO = Preset(LlamaConfig(32, 56, 2, 2, max_seq_len=64), 8, 0.015, 0.001, 4, steps=4, batch=2, seq=16)
"""The model of the scale "quick", which tries every piece out and measures nothing."""


@dataclass(frozen=True)
class Case:
    """An optimizer and its settings.

    Attributes:
        name, title: in names of files, and for people.
        optimizer: "qgalore" (this project's), "galore-torch" (PyPI's GaLoreAdamW) or "adamw" (torch's).
        lr: the middle one of the search; None: at ours' best rate times `lr_factor`.
        int8: INT8 weights.
        moments: "8bit" or "32bit".
        keys: group keys beside rank and gap; the optimizer's defaults hold for the rest.
        rank_factor: on the preset's rank.
        seeds: how many, from 0.
    """

    name: str
    title: str
    optimizer: str = "qgalore"
    lr: float | None = None
    int8: bool = True
    moments: str = "8bit"
    keys: dict[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0
    rank_factor: float = 1.0
    seeds: int = 2


# The rule has never been a part of a result's settings: it is GaLore's in all of them.
PROJECTION_DEFAULTS = {key: value for key, value in defaults(projected=True).items() if key != "rule"}
# Ours while its parts were changed one at a time: defaults have followed from that, and may again.
BASE = {"refresh": "svd", "power_iterations": 2}
# What the published optimizers do, whatever this project's defaults are.
PUBLISHED = {"similarity": "official", "moments_on_refresh": "keep", "refresh": "svd"}
# The rates of the presets (0.015 and 0.001) lie within the three.
GALORE_LR, ADAMW_LR = 0.02, 0.001

METHODS = (
    Case("adamw", "AdamW", "adamw", ADAMW_LR, int8=False, moments="32bit", seeds=3),
    # GaLore's α gives projected weights a smaller rate than embedding and head: the same split at full rank tells
    # what that does from what the projection does.
    Case(
        "adamw-scaled",
        "AdamW, α on the blocks",
        "adamw",
        GALORE_LR,
        int8=False,
        moments="32bit",
        keys={"scale": 0.25},
        seeds=3,
    ),
    Case("galore-torch", "GaLore (galore-torch)", "galore-torch", GALORE_LR, int8=False, moments="32bit", seeds=3),
    Case(
        "galore",
        "GaLore (ours, unquantised, fixed gap)",
        "qgalore",
        GALORE_LR,
        int8=False,
        moments="32bit",
        keys={**PUBLISHED, "gamma_proj": 1, "quant": False},
        seeds=3,
    ),
    Case("qgalore-official", "Q-GaLore, published rules", "qgalore", GALORE_LR, keys=dict(PUBLISHED), seeds=3),
    Case("qgalore", "Q-GaLore, ours, by SVD", "qgalore", GALORE_LR, seeds=3),
    Case("qgalore-default", "Q-GaLore, ours", "qgalore", seeds=3),
)
OURS, DEFAULT = METHODS[-2:]
SEARCHED = tuple(case for case in METHODS if case.lr is not None)

VARIANTS = (
    Case("fixed-gap", "gap fixed", keys={"gamma_proj": 1}, seeds=3),
    Case("projector-float", "projector in float32", keys={"quant": False}),
    Case("weights-float", "weights in float32", int8=False),
    Case("nearest", "weights rounded to nearest", keys={"rounding": "nearest"}),
    # At the best rate every update is several quanta of a weight; here it is a fraction of one.
    Case("lr-eighth", "an eighth of the lr", lr_factor=0.125),
    Case(
        "lr-eighth-nearest",
        "an eighth of the lr, weights rounded to nearest",
        keys={"rounding": "nearest"},
        lr_factor=0.125,
    ),
    Case("moments-32bit", "moments in float32", moments="32bit"),
    Case("similarity-official", "similarity official", keys={"similarity": "official"}),
    Case("threshold-0.6", "similarity threshold 0.6", keys={"similarity_threshold": 0.6}),
    Case("threshold-0.8", "similarity threshold 0.8", keys={"similarity_threshold": 0.8}),
    Case("cap-24", "gaps of at most two first ones", keys={"max_gap": 24}),
    Case("similarity-subspace", "similarity subspace", keys={"similarity": "subspace"}),
    Case("moments-keep", "moments kept at a refresh", keys={"moments_on_refresh": "keep"}),
    Case("moments-rotate", "moments rotated", keys={"moments_on_refresh": "rotate"}),
    Case("moments-reset", "moments reset", keys={"moments_on_refresh": "reset"}),
    Case("refresh-svd", "refresh by SVD", keys={"refresh": "svd"}),
    Case("refresh-power", "refresh by a power step", keys={"refresh": "power"}),
    Case("refresh-randomized", "refresh by the range finder, two power iterations", keys={"refresh": "randomized"}),
    Case("no-shrink", "gaps never shrink", keys={"shrink_threshold": -1.0}),
    Case("no-stagger", "refreshes not staggered", keys={"stagger": False}),
    Case("trigger-energy", "refresh when energy falls", keys={"trigger": "energy"}),
    Case("scale-0.5", "α 0.5", keys={"scale": 0.5}),
    Case("scale-1", "α 1", keys={"scale": 1.0}),
    Case("scale-1-lr", "α 1, lr·α as ours", keys={"scale": 1.0}, lr_factor=0.25),
    Case("rank-half", "half the rank", rank_factor=0.5),
    Case("rank-double", "twice the rank", rank_factor=2.0),
)
CASES = {case.name: case for case in (*METHODS, *VARIANTS)}

# At the larger scale, where a run takes long: a second seed for the two that are to be told apart.
LARGER_SEEDS = {"adamw": 2, "galore-torch": 1, "galore": 1, "qgalore-official": 1, "qgalore-default": 2}


@dataclass(frozen=True)
class RunSpec:
    """One run; `lr` is FOUND until the search has found it."""

    scale: Scale
    case: Case
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of the run, and of its result's file."""
        rate = "best" if math.isnan(self.lr) else f"{self.lr:g}"
        return f"{self.scale.name}-{self.case.name}-lr{rate}-seed{self.seed}"

    @property
    def rank(self) -> int:
        return int(find_preset(self.scale.preset).rank * self.case.rank_factor)

    @property
    def keys(self) -> dict[str, Any]:
        """Group keys as the optimizer will have them, its defaults included, without rank."""
        if self.case.optimizer == "adamw":
            return dict(self.case.keys)
        gap = {"update_proj_gap": self.scale.gap}
        if self.case.optimizer == "galore-torch":
            return {**gap, "scale": 0.25, "proj_type": "std", **self.case.keys}
        base = {} if self.case == DEFAULT else BASE
        return {**PROJECTION_DEFAULTS, "rounding": "stochastic", **gap, **base, **self.case.keys}

    def settings(self) -> Result:
        """All that decides what the run computes: a result belongs to the run whose settings it holds."""
        scale, case = self.scale, self.case
        settings = {
            "preset": scale.preset,
            "steps": scale.steps,
            "batch": scale.batch,
            "seq": scale.seq,
            "final_tokens": scale.final_tokens,
            "compiled": scale.compiled,
            "optimizer": case.optimizer,
            "int8": case.int8,
            "moments": case.moments,
            "rank": self.rank,
            "keys": self.keys,
            "lr": self.lr,
            "seed": self.seed,
        }
        if scale.device != "cpu":  # of results on CPUs it has never been a part
            settings["device"] = scale.device
        loaded: Result = json.loads(json.dumps(settings))
        return loaded


class Planned(NamedTuple):
    """A run of the plan: its stage, its result if there is one, or why it is left out."""

    spec: RunSpec
    stage: str
    result: Result | None
    skipped: str | None

    @property
    def pending(self) -> bool:
        """Whether it can be run now."""
        return self.result is None and self.skipped is None and not math.isnan(self.spec.lr)


def refusal(spec: RunSpec) -> str | None:
    """Why the run is left out: no such optimizer, or one that refuses its keys, or it is ours itself; else None."""
    case = spec.case
    if case.optimizer == "galore-torch" and find_spec("galore_torch") is None:
        return "galore-torch is not installed"
    if case.optimizer != "qgalore":
        return None
    if case in VARIANTS and case.lr_factor == 1:
        same = RunSpec(spec.scale, OURS, spec.lr, spec.seed)
        if repr(same.settings()) == repr(spec.settings()):  # repr: a rate that is NaN equals itself
            return "that is ours"
    return _refused(case.moments, json.dumps({"update_proj_gap": spec.scale.gap, **case.keys}))


@cache
def _refused(moments: str, keys: str) -> str | None:
    """What the optimizer says to group keys (JSON) that it does not take."""
    group = {"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 2, **json.loads(keys)}
    try:
        qg.QGaLoreAdamW([group], moments=moments)
    except ValueError as error:
        return str(error).split("; ")[0]
    return None


def loss_of(result: Result) -> float:
    """The held-out loss, nats per byte; infinite for a run that diverged."""
    loss = result["val_loss"]
    return math.inf if loss is None else float(loss)


class Plan:
    """The runs of some scales, given results.

    Args:
        results: of earlier runs, in any order; those of other settings are ignored.
        scales: whose runs are planned.
    """

    def __init__(self, results: Iterable[Result], scales: Sequence[str] = ("tiny", "35m")) -> None:
        self._results = {json.dumps(result["settings"], sort_keys=True): result for result in results}
        self.scales = [SCALES[name] for name in scales]
        self._searches: dict[tuple[str, str], tuple[list[float], float]] = {}

    def result(self, spec: RunSpec) -> Result | None:
        """The result with exactly these settings."""
        return self._results.get(json.dumps(spec.settings(), sort_keys=True))

    def search(self, scale: Scale, case: Case) -> tuple[list[float], float]:
        """The rates to try at this point, ascending, and the best; FOUND while one is missing."""
        place = (scale.name, case.name)
        if place not in self._searches:
            self._searches[place] = self._search(scale, case)
        return self._searches[place]

    def _search(self, scale: Scale, case: Case) -> tuple[list[float], float]:
        assert case.lr is not None
        rates = [rounded(case.lr * FACTOR**power) for power in (-1, 0, 1)]
        for extension in range(EXTENSIONS + 1):
            results = [self.result(RunSpec(scale, case, rate, 0)) for rate in rates]
            losses = [math.inf if result is None else loss_of(result) for result in results]
            if any(result is None for result in results):
                return rates, FOUND
            best = losses.index(min(losses))
            if best not in (0, len(rates) - 1) or extension == EXTENSIONS or min(losses) == math.inf:
                return rates, rates[best]
            beyond = rounded(rates[best] * (FACTOR if best else 1 / FACTOR))
            rates = sorted([*rates, beyond])
        raise AssertionError("the last extension returns")

    def best_lr(self, scale: Scale, case: Case) -> float:
        """The rate of a case's runs after the search; FOUND before."""
        searched = SCALES[scale.lr_of] if scale.lr_of else scale
        method = case if case.lr is not None else OURS
        return rounded(self.search(searched, method)[1] * case.lr_factor)

    def __iter__(self) -> Iterator[Planned]:
        """In the order in which they are run: what the conclusions need most comes first."""
        searching = [scale for scale in self.scales if scale.lr_of is None]
        for scale in searching:
            for case in SEARCHED:
                for rate in self.search(scale, case)[0]:
                    yield self._planned(RunSpec(scale, case, rate, 0), "search")
            for case in METHODS:
                yield from self._seeds(scale, case, range(int(case in SEARCHED), case.seeds), "seeds")
            for case in VARIANTS if scale.variants else ():
                yield from self._seeds(scale, case, range(1 if case.seeds == 2 else case.seeds), "variants")
        for scale in self.scales:
            if scale.lr_of is not None:
                for case in METHODS:
                    yield from self._seeds(scale, case, range(min(1, LARGER_SEEDS.get(case.name, 0))), "larger")
        for scale in searching:
            for case in VARIANTS if scale.variants else ():
                yield from self._seeds(scale, case, range(1, 2 if case.seeds == 2 else 1), "variants")
        for scale in self.scales:
            if scale.lr_of is not None:
                for case in METHODS:
                    yield from self._seeds(scale, case, range(1, LARGER_SEEDS.get(case.name, 0)), "larger")

    def _seeds(self, scale: Scale, case: Case, seeds: range, stage: str) -> Iterator[Planned]:
        rate = self.best_lr(scale, case)
        for seed in seeds:
            yield self._planned(RunSpec(scale, case, rate, seed), stage)

    def _planned(self, spec: RunSpec, stage: str) -> Planned:
        return Planned(spec, stage, self.result(spec), refusal(spec))

    def minutes(self, spec: RunSpec, *, warm: bool = False) -> float:
        """Expected: the median of the case's runs; before there is one, as said, with compiling unless `warm`."""
        place, results = (spec.scale.name, spec.case.name), self._results.values()
        seconds = sorted(each["wall_seconds"] for each in results if (each["scale"], each["case"]) == place)
        if seconds:
            return seconds[len(seconds) // 2] / 60
        return spec.scale.minutes[spec.case.optimizer] + (0.0 if warm else spec.scale.compile_minutes)


def rounded(rate: float) -> float:
    """To three digits, so that a rate has one name."""
    return rate if math.isnan(rate) else float(f"{rate:.3g}")
