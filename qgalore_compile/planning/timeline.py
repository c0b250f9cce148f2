"""Bytes over a step, kernel by kernel and by category: what is stored, until when, and what comes of each gradient.

The recording has a few layers of a deep stack.  What one more layer adds, two layers in the middle tell (two, since
Inductor stores the residual stream in every second one), so the rest of the stack is theirs repeated.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from qgalore_compile.planning.buffers import Kernel, fused, kernels_of
from qgalore_compile.planning.recording import Recording, Segment
from qgalore_compile.planning.states import Bytes

EDGE = 2
"""Layers at either end of a recorded stack that may differ from those between them."""
PERIOD = 2
"""Layers after which a stack repeats itself."""
MOST = EDGE + PERIOD + EDGE
"""Layers that a recording has, or one more."""


def recorded_layers(depth: int) -> int:
    """How many of ``depth`` equal layers a recording has, so that what is left out is whole periods."""
    return depth if depth <= MOST + 1 else MOST + (depth - MOST) % PERIOD


class Treatment(NamedTuple):
    """What becomes of a parameter's gradient.

    Attributes:
        kept: bytes that live from the gradient's product to the update: R, or the gradient.
        forms: whether the gradient itself is formed; else ``kept`` is what the product leaves.
        while_made: bytes while it is computed.
        factors: whether the product's factors live until the update.
        by_rows: whether the update makes the gradient block by block (pass ``row_blocks``): nor do zeros exist then
            that rows are added to.
        waits: whether the update comes behind the whole backward.
        while_updated: bytes while the update runs, beside ``kept``.
        while_refreshed: bytes while a subspace is computed anew, in a step in which it is.
        layer: number of the recorded layer that it is in; -1 outside of the stack.
    """

    kept: int
    forms: bool = True
    while_made: int = 0
    factors: bool = False
    by_rows: bool = False
    waits: bool = True
    while_updated: int = 0
    while_refreshed: int = 0
    layer: int = -1


@dataclass(frozen=True)
class Moment:
    """One call in a step.

    Attributes:
        part: "before", "forward", "head", "backward", "after" or "update".
        layer: number of the layer, -1 outside of the stack.
        what: the parameter that is projected, refreshed or updated; else "".
        bytes: live while it runs, by category, without what is resident.
        refresh: whether it only happens in a step that refreshes that parameter's subspace.
    """

    part: str
    layer: int
    what: str
    bytes: Bytes
    refresh: bool = False

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.bytes.values())

    def __str__(self) -> str:
        where = {"before": "the embedding", "head": "the head and the loss", "after": "the embedding's backward"}
        text = where.get(
            self.part, "the updates" if self.part == "update" else f"the {self.part} of layer {self.layer}"
        )
        return f"a refresh of {self.what}, in {text}" if self.refresh else text


class _Point(NamedTuple):
    segment: Segment
    what: str
    during: Bytes
    after: Bytes
    refresh: bool


@dataclass
class _Live:
    """What is live, by value and by category."""

    recording: Recording
    gradients: Mapping[int, str]
    held: dict[int, tuple[str, int]]
    total: Bytes

    def add(self, value: int, segment: Segment, size: int | None = None) -> None:
        bytes_ = self.recording.values[value].bytes if size is None else size
        category = "gradients" if value in self.gradients else _CATEGORY[segment.part]
        self.held[value] = category, bytes_
        self.total[category] += bytes_

    def drop(self, value: int) -> None:
        if value in self.held:
            category, size = self.held.pop(value)
            self.total[category] -= size


_CATEGORY = {
    "before": "activations",
    "forward": "activations",
    "head": "logits and loss",
    "backward": "temporaries",
    "after": "temporaries",
}


def timeline(
    recording: Recording,
    treatments: Mapping[str, Treatment],
    *,
    device: str,
    depth: int,
    recorded: int,
    prefix: str = "",
    by_rows: Mapping[int, int] = MappingProxyType({}),
) -> list[Moment]:
    """The moments of a step.

    Args:
        recording: of a forward and a backward.
        treatments: of each parameter that has a gradient, by name.
        device: "cpu" or "cuda".
        depth, recorded: equal layers of the model, and of the recording.
        prefix: the name of their list, with a dot.
        by_rows: values that exist some rows at a time, with the bytes that do.
    """
    points, total = _walked(recording, treatments, device, by_rows)
    moments, more = _unrolled(points, depth - recorded, prefix)
    return moments + _updates(treatments, _sum(total, more), (depth - recorded) // PERIOD)


def _walked(
    recording: Recording, treatments: Mapping[str, Treatment], device: str, by_rows: Mapping[int, int]
) -> tuple[list[_Point], Bytes]:
    """Each call of the recording's forward and backward, and what lives behind the last one."""
    wanted = [recording.gradients[name] for name in treatments]
    kernels = fused(kernels_of(recording, device, [recording.loss, *wanted]), recording, {recording.loss, *wanted})
    names = {recording.gradients[name]: name for name in treatments}
    last = _last_reads(kernels, names, treatments, recording.handed)
    dies: dict[int, list[int]] = defaultdict(list)
    for value, place in last.items():
        dies[place].append(value)
    unmade = _zeros_of_rows(kernels, recording, names, treatments) | by_rows.keys()
    live = _Live(recording, names, {}, Counter())
    points: list[_Point] = []
    for place, kernel in enumerate(kernels):
        dying = dies[place]
        transient, refreshed, done = Counter[str](), 0, []
        transient["logits and loss"] = max(
            (by_rows.get(each, 0) for each in (*kernel.reads, *kernel.writes)), default=0
        )
        for value in kernel.writes:
            if (name := names.get(value)) is None:
                if value in unmade:
                    continue
                _reuse(live, kernel, dying, recording.values[value].bytes)
                live.add(value, kernel.segment)
                continue
            treatment = treatments[name]
            live.add(value, kernel.segment, treatment.kept)
            transient["temporaries"] += treatment.while_made
            refreshed = max(refreshed, treatment.while_refreshed)
            if not treatment.waits:
                done.append(value)
        what = next((names[value] for value in kernel.writes if value in names), "")
        if refreshed:
            during = live.total + Counter({"temporaries": refreshed})
            points.append(_Point(kernel.segment, what, during, Counter(live.total), True))
        during = live.total + transient
        for value in done:  # its update runs here, and ends it
            update = live.total + Counter({"temporaries": treatments[names[value]].while_updated})
            during = max(during, update, key=lambda found: sum(found.values()))
            live.drop(value)
        for value in (*dying, *(value for value in kernel.writes if value not in last and value not in names)):
            live.drop(value)
        points.append(_Point(kernel.segment, what, during, Counter(live.total), False))
    return points, live.total


def _zeros_of_rows(
    kernels: list[Kernel], recording: Recording, names: Mapping[int, str], treatments: Mapping[str, Treatment]
) -> set[int]:
    """What an embedding's gradient would be added up in, where it is made by rows."""
    from_nothing = {value for kernel in kernels if not kernel.reads for value in kernel.writes}
    return {
        read for kernel in kernels for value in kernel.writes
        if value in names and treatments[names[value]].by_rows
        for read in kernel.reads
        if read in from_nothing and recording.values[read].bytes == recording.values[value].bytes
    }  # fmt: skip


def _reuse(live: _Live, kernel: Kernel, dying: list[int], size: int) -> None:
    """A kernel of Inductor's writes where it reads something for the last time, if that is as large."""
    for value in dying if kernel.reuses else ():
        if value in live.held and live.held[value][1] == size:
            live.drop(value)
            return


def _last_reads(
    kernels: list[Kernel], names: Mapping[int, str], treatments: Mapping[str, Treatment], handed: frozenset[int]
) -> dict[int, int]:
    """The place of the call that reads each value last; none where an update does, behind all of them.

    What a function is given its caller holds until it returns.
    """
    last = {value: place for place, kernel in enumerate(kernels) for value in kernel.reads}
    ends = {kernel.segment: place for place, kernel in enumerate(kernels)}
    for kernel in kernels if handed else ():
        if kernel.segment.layer >= 0:
            for value in handed & kernel.reads:
                last[value] = max(last[value], ends[kernel.segment])
    for kernel in kernels:
        for value in kernel.writes:
            if value in names and treatments[names[value]].factors and treatments[names[value]].waits:
                last.update(dict.fromkeys(kernel.reads, -1))
    return last


# -- the rest of the stack --------------------------------------------------------------------------------------------


def _unrolled(points: list[_Point], extra: int, prefix: str) -> tuple[list[Moment], Bytes]:
    """The moments of all layers, and what those that are left out leave behind the backward."""
    moments, shift, place = list[Moment](), Counter[str](), 0
    while place < len(points):
        first, end = points[place].segment, place + 1
        block = extra and _in_block(first)
        while end < len(points) and (points[end].segment == first or (block and _continues(first, points[end]))):
            end += 1
        moments += [_moment(point, shift, extra, prefix) for point in points[place:end]]
        if block:
            before = points[place - 1].after if place else Counter[str]()
            grows = _sum(points[end - 1].after, _times(before, -1))
            step = PERIOD if first.part == "forward" else -PERIOD
            for index in range(1, extra // PERIOD + 1):
                shift = _sum(shift, grows)
                moments += [_moment(point, shift, extra, prefix, index * step) for point in points[place:end]]
        place = end
    return moments, shift


def _in_block(segment: Segment) -> bool:
    return segment.part in ("forward", "backward") and EDGE <= segment.layer < EDGE + PERIOD


def _continues(first: Segment, point: _Point) -> bool:
    return point.segment.part == first.part and _in_block(point.segment)


def _moment(point: _Point, shift: Bytes, extra: int, prefix: str, further: int = 0) -> Moment:
    recorded = layer = point.segment.layer
    if layer >= EDGE + PERIOD or (layer >= EDGE and point.segment.part == "backward"):
        layer += extra
    layer += further
    what = point.what.replace(f"{prefix}{recorded}.", f"{prefix}{layer}.", 1) if layer >= 0 else point.what
    return Moment(point.segment.part, layer, what, _sum(point.during, shift), point.refresh)


def _sum(one: Bytes, other: Bytes) -> Bytes:
    return Counter({name: one[name] + other[name] for name in {**one, **other}})


def _times(counter: Bytes, number: int) -> Bytes:
    return Counter({name: size * number for name, size in counter.items()})


def _updates(treatments: Mapping[str, Treatment], total: Bytes, repeated: int) -> list[Moment]:
    """Updates that wait for the last gradient, one after the other; what is kept for each goes with it."""
    moments, live = list[Moment](), Counter(total)
    for name, treatment in treatments.items():
        if treatment.waits:
            moments.append(Moment("update", -1, name, live + Counter({"temporaries": treatment.while_updated})))
            times = 1 + repeated * (EDGE <= treatment.layer < EDGE + PERIOD)
            live = live - Counter({"gradients": treatment.kept * times})
    return moments
