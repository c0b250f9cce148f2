"""Equal sections of a list: what stands there twice or more often, longest savings first.

The list holds numbers, equal ones for equal things.  Nothing is known of layers: a transformer's forward is a *tandem
repeat* (``abcabcabc``), two kinds of layers that alternate are one of twice the period, and a kind that comes back
later is found again behind other things.

Periods are read off the distances at which short sections stand again, so that the list is compared with itself a few
times, in NumPy, and not once for every length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Repeat:
    """Sections of one length whose numbers are equal.

    Attributes:
        starts: of the sections, ascending; no two overlap.
        length: of each.
    """

    starts: tuple[int, ...]
    length: int

    @property
    def saved(self) -> int:
        """Places that need not be looked at again."""
        return self.length * (len(self.starts) - 1)


def repeats(
    numbers: Sequence[int], shortest: int, costs: Callable[[int], Sequence[float]] | None = None
) -> list[Repeat]:
    """Repeats that cover no place twice, those that save most first.

    Args:
        numbers: the list.
        shortest: the least length of a section.
        costs: by a period, what it costs to cut before each place of the list, and behind the last; decides where a
            period begins, which the numbers alone leave open.
    """
    whole = np.asarray(numbers, dtype=np.int64)
    free = np.ones(len(whole), dtype=bool)
    hashes = _Hashes(whole)
    found = []
    while (best := _tandem(whole, free, hashes, shortest) or _apart(whole, free, hashes, shortest)) is not None:
        best = _elsewhere(whole, free, _shifted(best, whole, free, costs))
        for start in best.starts:
            free[start : start + best.length] = False
        found.append(best)
    return found


class _Hashes:
    """Hashes of all sections of one length, from sums of powers modulo 2**64; equal sections have equal ones."""

    def __init__(self, numbers: Numbers) -> None:
        random = np.random.default_rng(0)
        one_each = random.integers(1, 2**63, size=int(numbers.max(initial=0)) + 1, dtype=np.uint64)
        base, inverse = (np.full(len(numbers) + 1, each, dtype=np.uint64) for each in (_BASE, pow(_BASE, -1, 2**64)))
        base[0] = inverse[0] = 1
        self._power, self._inverse = np.cumprod(base), np.cumprod(inverse)
        self._sums = np.concatenate(([np.uint64(0)], np.cumsum(one_each[numbers] * self._power[:-1])))

    def of(self, length: int) -> NDArray[np.uint64]:
        """By start; empty where the list is shorter."""
        count = max(len(self._sums) - length, 0)
        found: NDArray[np.uint64] = (self._sums[length:] - self._sums[:count]) * self._inverse[:count]
        return found


_BASE = 6364136223846793005
"""Odd, so that it has an inverse."""

_NEXT = 4
"""Later occurrences of a section of the shortest length that tell of a period: its second, third and fourth, where it
stands more than once in a period."""


def _periods(free: NDArray[np.bool_], hashes: _Hashes, shortest: int) -> list[int]:
    """Distances at which sections of the shortest length stand again."""
    found = hashes.of(shortest)
    order = np.argsort(found, kind="stable")
    distances: set[int] = set()
    for behind in range(1, _NEXT + 1):
        first, later = order[:-behind], order[behind:]
        same = (found[first] == found[later]) & free[first] & free[later]
        distances.update(map(int, np.unique((later - first)[same])))
    return sorted(each for each in distances if each >= shortest)


def _tandem(numbers: Numbers, free: NDArray[np.bool_], hashes: _Hashes, shortest: int) -> Repeat | None:
    """The tandem repeat that saves most; of equal ones the shortest period."""
    best: Repeat | None = None
    for period in _periods(free, hashes, shortest):
        for start, length in _runs((numbers[:-period] == numbers[period:]) & free[:-period] & free[period:]):
            count = length // period + 1
            if count > 1 and (best is None or period * (count - 1) > best.saved):
                best = Repeat(tuple(start + period * index for index in range(count)), period)
    return best


def _runs(equal: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, length) of all runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.view(np.int8), [0]))))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def _shifted(
    best: Repeat, numbers: Numbers, free: NDArray[np.bool_], costs: Callable[[int], Sequence[float]] | None
) -> Repeat:
    """The same repeat, begun where it costs least to cut: a run is longer than its whole periods."""
    length, last = best.length, best.starts[-1]
    if costs is None or best.starts[1] - best.starts[0] != length:  # not in tandem
        return best
    room = 0
    while (
        room + 1 < length and last + length + room < len(numbers)
        and numbers[last + length + room] == numbers[last + room] and free[last + length + room]
    ):  # fmt: skip
        room += 1
    at = costs(length)
    shift = min(range(room + 1), key=lambda by: (sum(at[start + by] for start in (*best.starts, last + length)), by))
    return Repeat(tuple(start + shift for start in best.starts), length)


def _elsewhere(numbers: Numbers, free: NDArray[np.bool_], best: Repeat) -> Repeat:
    """The same repeat with equal sections that stand anywhere else."""
    length = best.length
    section = numbers[best.starts[0] : best.starts[0] + length]
    left = free.copy()
    for start in best.starts:
        left[start : start + length] = False
    starts, place = list(best.starts), 0
    candidates = np.flatnonzero(numbers[: len(numbers) - length + 1] == section[0])
    for candidate in map(int, candidates):
        here = slice(candidate, candidate + length)
        if candidate >= place and left[here].all() and np.array_equal(numbers[here], section):
            starts.append(candidate)
            place = candidate + length
    return Repeat(tuple(sorted(starts)), length)


def _apart(numbers: Numbers, free: NDArray[np.bool_], hashes: _Hashes, shortest: int) -> Repeat | None:
    """The longest section that stands somewhere else again, found by bisection over its length."""
    low, high, best = shortest, len(numbers) // 2, None
    while low <= high:
        length = (low + high) // 2
        pair = _pair(numbers, free, hashes, length)
        if pair is None:
            high = length - 1
        else:
            best, low = Repeat(pair, length), length + 1
    return best


def _pair(numbers: Numbers, free: NDArray[np.bool_], hashes: _Hashes, length: int) -> tuple[int, int] | None:
    """Two equal sections of a length that do not overlap: the first and the last place where it stands."""
    busy = np.concatenate(([0], np.cumsum(~free)))
    places = np.flatnonzero(busy[length:] == busy[:-length])
    found = hashes.of(length)[places]
    order = np.argsort(found, kind="stable")
    edges = np.flatnonzero(np.concatenate(([True], np.diff(found[order]) != 0, [True])))
    for begin, end in pairwise(edges if len(places) else []):
        first, last = int(places[order[begin]]), int(places[order[end - 1]])
        if last >= first + length and np.array_equal(
            numbers[first : first + length], numbers[last : last + length]
        ):  # fmt: skip
            return first, last
    return None
