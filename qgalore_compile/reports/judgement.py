"""Whether a tensor is one that rounding could have made, told from the same tensor in a few eager runs.

An element is *explained* where it is as near to the interval of the runs as that interval is wide, or as a floor below
which nobody looks.  So an element that rounding decides (the update of a bias whose gradient is zero but for rounding,
which Adam makes ±1) may be anything of its size, and its neighbour that rounding leaves alone must be right.

A few elements of any tensor are not explained: a sign that no run happened to flip.  How many is told by the runs: each
is compared with the others, and a tensor is wrong if more of its elements stay unexplained than that rate lets expect,
in the whole tensor or in one of its rows or columns; far more than the runs' width apart counts anew, at its own rate.
What the runs leave open is still bounded: by the largest movement of an element and by the size of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rates", "Sample", "judge"]

FLOOR = 1e-3
"""Of a tensor's rms, of what a step moved or computed anew: differences that nobody looks at."""
CONTRACT = 1e-6
"""Of a tensor's largest element: what equal products may differ by."""
_WIDTHS = (1.0, 5.0, 25.0)
"""How far outside the interval, in its widths, an element is unexplained, and far off."""
_FEW = 8
"""Elements whose rms says something of their sizes."""
_WHOLE, _SLICE = 1e-5, 1e-8
"""Chance that a right tensor, or a right row or column of one, is called wrong; a model has 100 and 100,000."""


@dataclass
class Sample:
    """One tensor in all runs, in float64.

    Attributes:
        found: of the compiled step; finite.
        runs: (1 + K, *shape), the unperturbed eager run first.
        start: before the step; zeros where the step computes it anew.
        new: whether it does.
        flip: how far one flipped code or one rounding of a 16-bit weight takes an element; None where neither can be.
        spare: flips that need no explanation.
        kind: what shares a rate of unexplained elements with this tensor.
        ulp: twice its dtype's eps.
        least: of the floor.
        bound: of the norm of what is not explained, where no sign is taken of a number: a new value, a moment.
    """

    found: Tensor
    runs: Tensor
    start: Tensor
    new: bool
    flip: Tensor | None
    spare: int
    kind: str
    ulp: float = 0.0
    least: float = 0.0
    bound: float = math.inf

    def __post_init__(self) -> None:
        moved = (self.runs - self.start).abs()
        self.largest = float(moved.max()) if moved.numel() else 0.0
        size = moved[0].square().mean().sqrt() if moved.numel() else torch.tensor(0.0)
        value = self.runs[0].abs()
        self.floor = torch.maximum(FLOOR * size, CONTRACT * value.max()) if value.numel() else size
        self.floor = self.floor.clamp(min=self.least)
        if self.new:  # it was rounded to its dtype, by either
            self.floor = torch.maximum(self.floor, self.ulp * value)
        ordered = self.runs.sort(0).values
        self.low, self.high = ordered[0], ordered[-1]
        # without one of the runs, for comparing it with the others
        low = torch.where(self.runs == ordered[0], ordered[min(1, len(ordered) - 1)], ordered[0])
        high = torch.where(self.runs == ordered[-1], ordered[max(-2, -len(ordered))], ordered[-1])
        self.beyond = self._beyond(self.found, self.low, self.high)
        self.others = self._beyond(self.runs[1:], low[1:], high[1:])

    def _beyond(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """How many widths (of the interval and a floor) x is outside; 0 inside."""
        outside = torch.maximum(low - x, x - high).clamp(min=0.0)
        return outside / (high - low + self.floor).clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def explained(self) -> Tensor:
        """How far from the unperturbed run each element may be."""
        return torch.maximum(self.high - self.runs[0], self.runs[0] - self.low) + (self.high - self.low) + self.floor

    def rounding(self) -> Tensor:
        """The rms of the interval's width."""
        return (self.high - self.low).square().mean().sqrt() if self.low.numel() else torch.tensor(0.0)

    def unexplained(self, width: float) -> tuple[Tensor, Tensor]:
        """Bool of the compiled step and of each perturbed run against the others."""
        return self.beyond > width, self.others > width


class Rates:
    """How often an element stays unexplained, by kind of tensor and width."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        counts: dict[tuple[str, float], tuple[int, int]] = {}
        for sample in samples:
            for width in _WIDTHS:
                among = sample.unexplained(width)[1]
                seen, of = counts.get((sample.kind, width), (0, 0))
                counts[sample.kind, width] = (seen + int(among.sum()), of + among.numel())
        self._rates = {key: seen / max(of, 1) for key, (seen, of) in counts.items()}

    def allowed(self, sample: Sample, width: float, elements: int, own: float, chance: float) -> int:
        """Unexplained elements among ``elements`` that a right tensor exceeds with ``chance`` at most."""
        return _quantile(max(self._rates.get((sample.kind, width), 0.0), own) * elements, chance)


def judge(sample: Sample, rates: Rates) -> tuple[str, int, int]:
    """(what is wrong, or ""; unexplained elements; how many of them may be)."""
    if not sample.found.numel():
        return "", 0, 0
    near = _near(sample)
    outside = allowed = 0
    said = ""
    for width in _WIDTHS:
        mine, among = sample.unexplained(width)
        spare = min(int((mine & near).sum()), sample.spare)
        count, own = int(mine.sum()) - spare, float(among.double().mean()) if len(among) else 0.0
        limit = rates.allowed(sample, width, mine.numel(), own, _WHOLE)
        if width == _WIDTHS[0]:
            outside, allowed = count, limit
        if count > limit and not said:
            said = f"{count} of {mine.numel()} elements are not explained by rounding, {limit} may be"
        for dim, what in ((1, "row"), (0, "column")) if mine.dim() > 1 and not said else ():
            flat, others = mine.flatten(1).sum(dim), among.flatten(2).sum(dim + 1)
            length = mine.flatten(1).shape[dim]
            limit = rates.allowed(sample, width, length, own, _SLICE)
            limit = max(limit, 2 * int(others.max()) if others.numel() else 0)
            worst = int(flat.argmax())
            if int(flat[worst]) - spare > limit:
                said = f"{int(flat[worst])} of {length} in {what} {worst} are not explained by rounding, {limit} may be"
                break
    return said or _of_size(sample) or _of_the_rest(sample), outside, allowed


def _near(sample: Sample) -> Tensor:
    """Where the compiled step is one flip from a run."""
    if sample.flip is None:
        return torch.zeros_like(sample.found, dtype=torch.bool)
    nearest = (sample.runs - sample.found).abs().amin(0)
    return nearest <= 1.01 * sample.flip + sample.floor


def _of_size(sample: Sample) -> str:
    """What is wrong with the size of a movement that rounding may have decided, or ""."""
    moved = (sample.found - sample.start).abs()
    flip = sample.flip.max() if sample.flip is not None else 0.0
    if float(moved.max()) > 4 * sample.largest + float(flip) + float(sample.floor.max()):
        return f"an element moved by {float(moved.max()):.2g}, in eager by {sample.largest:.2g} at most"
    least = (sample.runs - sample.start).abs()
    decided = sample.high - sample.low > 0.5 * least.amax(0)  # by rounding: they may not hide behind the others
    for chosen in (torch.ones_like(decided), decided):
        if int(chosen.sum()) >= min(_FEW, chosen.numel()):
            said = _of_rms(moved[chosen], least[:, chosen], sample, flip)
            if said:
                return said
    return ""


def _of_rms(moved: Tensor, runs: Tensor, sample: Sample, flip: Tensor | float) -> str:
    mine, sizes = float(moved.square().mean().sqrt()), runs.flatten(1).square().mean(1).sqrt()
    low, high = float(sizes.min()), float(sizes.max())
    slack = float(sample.floor.max()) + sample.spare * float(flip) / math.sqrt(moved.numel())
    if mine > 1.5 * high + 2 * (high - low) + slack or mine + slack < 0.5 * low * (low / max(high, low, 1e-300)) ** 2:
        return f"{moved.numel()} elements moved by {mine:.2g}, in eager by {low:.2g} to {high:.2g}"
    return ""


def _of_the_rest(sample: Sample) -> str:
    """What is wrong with the few elements that may stay unexplained, or "": they are most of the tensor."""
    apart = (sample.found - sample.runs.mean(0))[sample.beyond > _WIDTHS[0]]
    norm = float(torch.linalg.vector_norm(apart)) if apart.numel() else 0.0
    if norm > sample.bound:
        return f"{apart.numel()} unexplained elements are {norm:.2g} off, {sample.bound:.2g} at most may be"
    return ""


def _quantile(mean: float, chance: float) -> int:
    """The least k that a Poisson variable of this mean exceeds with ``chance`` at most."""
    if mean > 200:
        return math.ceil(mean + 6 * math.sqrt(mean))
    k, term = 0, math.exp(-mean)
    missing = 1 - term
    while missing > chance:
        k += 1
        term *= mean / k
        missing -= term
    return k
