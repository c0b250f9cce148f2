"""What to change so that a step keeps to a budget, in the order in which it costs learning least."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from qgalore_compile.planning.forecast import Forecast
    from qgalore_compile.planning.planner import Planner, Settings

_ENOUGH = 1.002
"""What a change must save to be proposed: a factor."""


class Proposal(NamedTuple):
    """A change beside those before it.

    Attributes:
        words: what to set.
        total: bytes with it, tensors and process.
        settings: with it and those before.
    """

    words: str
    total: int
    settings: Any


def propose(settings: Settings, forecast: Forecast, budget: int, planner: Planner) -> list[Proposal]:
    """Changes to make one after the other until a step keeps to a budget; all that save anything, where none does.

    Args:
        settings, forecast: what was asked for.
        budget: bytes.
        planner: gives forecasts of other settings.
    """
    found: list[Proposal] = []
    total = forecast.total
    for change in _CHANGES:
        for words, values in change(settings):
            if values.get("checkpointing") and not planner.checkpoints(settings):
                continue
            tried = _changed(settings, values)
            now = planner.forecast(tried, words).total
            if now * _ENOUGH > total:
                continue
            found.append(Proposal(words, now, tried))
            settings, total = tried, now
            if total <= budget:
                return found
            break
    return found


def _changed(settings: Settings, values: dict[str, Any]) -> Settings:
    from qgalore_compile.planning.planner import changed

    return changed(settings, **values)


# -- each in its order: the same step, the same step in more time, less precise states, fewer numbers ------------------


def _at_once(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    if settings.nonfinite == "skip_step" and settings.max_grad_norm is None:
        yield 'nonfinite="skip_parameter": updates come at once', {"nonfinite": "skip_parameter"}


def _checkpointing(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    if not settings.checkpointing:
        yield "checkpointing: each layer's forward is computed again", {"checkpointing": True}


def _smaller_batch(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    if settings.batch > 1:
        batch = settings.batch // 2
        rest = -(-settings.batch * settings.accumulate // batch)
        yield f"batch {batch}, {rest} micro-batches a step", {"batch": batch, "accumulate": rest}


def _moments(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    if settings.moments in ("32bit", "8bit"):
        yield "moments of 4 bits", {"moments": "4bit"}


def _rank(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    if settings.rank is not None and settings.rank > 8:
        yield f"rank {settings.rank // 2}", {"rank": settings.rank // 2}


def _apollo(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    if settings.keys.get("rule", "galore") == "galore" and settings.rank is not None:
        low = max(1, settings.rank // 4)
        yield f'rule="apollo" of rank {low}: no projectors', {"rule": "apollo", "rank": low}


_CHANGES = (_at_once, _checkpointing, *[_smaller_batch] * 6, _moments, _rank, _rank, _apollo)
