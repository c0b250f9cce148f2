"""What ``plan`` returns: forecasts side by side, as a text, JSON and a picture."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qgalore_compile.planning.budget import Proposal
from qgalore_compile.planning.cards import CARDS, Card, smallest_card, written
from qgalore_compile.planning.states import Bytes
from qgalore_compile.planning.timeline import Moment

CATEGORIES = (
    "weights",
    "scales",
    "moments",
    "projectors",
    "other states",
    "gradients",
    "activations",
    "logits and loss",
    "temporaries",
)
"""Of tensors, in the order of tables; "process" is what a process holds beside them."""


@dataclass(frozen=True)
class Forecast:
    """What one way of training holds.

    Attributes:
        name: of the way.
        held: bytes between steps, by category.
        moments: over a step, those of refreshes included; bytes above ``held``.
        process: what the process holds beside tensors, an estimate.
    """

    name: str
    held: Bytes
    moments: tuple[Moment, ...]
    process: int

    def with_process(self, size: int) -> Forecast:
        """The same with another estimate of the process."""
        return replace(self, process=size)

    @property
    def resident(self) -> int:
        """Bytes of tensors between steps."""
        return sum(self.held.values())

    @property
    def at(self) -> Moment:
        """When most is held."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """The most bytes of tensors."""
        return self.resident + self.at.total

    @property
    def steady_peak(self) -> int:
        """The most in a step that refreshes nothing."""
        return self.resident + max(moment.total for moment in self.moments if not moment.refresh)

    @property
    def total(self) -> int:
        """The most bytes of tensors and process."""
        return self.peak + self.process

    @property
    def by_category(self) -> dict[str, int]:
        """Bytes at the peak; they add up to ``total``."""
        found = Counter(self.held)
        found.update(self.at.bytes)
        return {**{name: found[name] for name in CATEGORIES}, "process": self.process}

    @property
    def card(self) -> Card | None:
        """The smallest card that holds it."""
        return smallest_card(self.total)


@dataclass(frozen=True)
class MemoryPlan:
    """A forecast, and what it is beside.

    Attributes:
        forecast: of the settings that were asked for.
        others: of other settings, and of other ways to train the same model.
        batch, seq: sequences of a micro-batch, and their tokens.
        device: "cpu" or "cuda".
        budget: bytes; None for none.
        proposals: what to change to keep to it, one after the other.
    """

    forecast: Forecast
    others: tuple[Forecast, ...]
    batch: int
    seq: int
    device: str
    budget: int | None
    proposals: tuple[Proposal, ...]

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes at the peak by category, the process's among them."""
        return self.forecast.by_category

    @property
    def peak(self) -> int:
        """The most bytes of tensors over a step, of those that refresh a subspace too."""
        return self.forecast.peak

    @property
    def total(self) -> int:
        """``peak`` and the process."""
        return self.forecast.total

    @property
    def fits(self) -> bool:
        """Whether it keeps to the budget; with none, whether any card holds it."""
        return self.total <= self.budget if self.budget is not None else self.forecast.card is not None

    @property
    def cards(self) -> dict[int, bool]:
        """Whether cards of so many GB hold it."""
        return {card.gb: card.bytes >= self.total for card in CARDS}

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(self._as_dict(), indent=1)

    def _as_dict(self) -> dict[str, Any]:
        sides = (self.forecast, *self.others)
        return {
            "batch": self.batch,
            "seq": self.seq,
            "device": self.device,
            "budget": self.budget,
            "fits": self.fits,
            "forecasts": {side.name: {"peak": side.peak, "steady_peak": side.steady_peak, "total": side.total,
                                      "at": str(side.at), "bytes": side.by_category} for side in sides},
            "proposals": [{"change": p.words, "total": p.total} for p in self.proposals],
        }  # fmt: skip

    def plot(self, path: str | Path) -> None:
        """Draw the categories of every side at its peak, and this one's over the step, as PNG or SVG by the name."""
        from qgalore_compile.planning.picture import draw

        draw(self, Path(path))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The table of all sides, when the peak is, and what keeps to the budget."""
        sides = (self.forecast, *self.others)
        names = [name for name in (*CATEGORIES, "process") if any(side.by_category[name] for side in sides)]
        table = [["", *names, "in all", "card"]]
        for side in sides:
            card = side.card
            row = [f"{side.by_category[name] / 1e9:.2f}" for name in names]
            table.append([side.name, *row, f"{side.total / 1e9:.2f}", f"{card.gb} GB" if card else "none"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = [f"{self.batch} × {self.seq} tokens, {self.device}; GB at the peak of a step"]
        for first, *rest in table:
            cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
            text.append("  ".join([first.ljust(widths[0]), *cells]))
        text.append(
            f"most: {written(self.peak)} of tensors, in {self.forecast.at}; {written(self.forecast.resident)} between "
            f"steps; the process beside them, {written(self.forecast.process)}, is an estimate"
        )
        return text + self._of_budget()

    def _of_budget(self) -> list[str]:
        if self.budget is None:
            return []
        if self.fits:
            return [f"keeps to {written(self.budget)}, with {written(self.budget - self.total)} to spare"]
        lines = [
            f"needs {written(self.total)}, more than {written(self.budget)}, by {written(self.total - self.budget)}"
        ]
        before = self.total
        for proposal in self.proposals:
            lines.append(f"  {proposal.words}: {written(proposal.total)}, {written(before - proposal.total)} less")
            before = proposal.total
        if not self.proposals or before > self.budget:
            lines.append("nothing of what was tried keeps to it: take a smaller model, or a larger card")
        else:
            lines.append(f"with these together it keeps to {written(self.budget)}")
        return lines
