"""Which of a recording's values a compiled step stores, and from when until when: a model of Inductor's choices.

Inductor computes a pointwise operation inside its readers, unless it is read by a library call, or by several readers
while it is dear: it reads more than four buffers, or calls ``exp`` and its like, which on a CPU are stored.  So the
backward computes casts and norms' factors again, and reads what they were computed from.  A kernel that is neighbour to
another one that reads the same runs with it.

Numbers are those of ``torch._inductor.config`` (``realize_reads_threshold`` and its neighbours); how near this is to
what Inductor allocates, ``tests/planning/test_timeline.py`` and ``benchmarks/plan.py`` measure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from qgalore_compile.planning.recording import Op, Recording, Segment

_IN_PLACE = frozenset({"aten.index_put", "aten._unsafe_index_put", "aten.scatter_add", "aten.index_add"})
"""Operations that Inductor lets write into what they are given."""
_READS = 4
_MOST_READS = {"cpu": 12, "cuda": 8}
_MOST_OPS = {"cpu": 50, "cuda": 30}


@dataclass
class Kernel:
    """A call that the compiled step makes.

    Attributes:
        op: place of the last operation that it computes.
        reads, writes: values that are stored.
        segment: where it is.
        fuses: whether Inductor writes it, and so it may run with a neighbour.
        reuses: whether a buffer that it reads last may be what it writes.
    """

    op: int
    reads: set[int]
    writes: list[int]
    segment: Segment
    fuses: bool
    reuses: bool


@dataclass
class _Lazy:
    """A value that is computed in its readers."""

    reads: set[int]
    ops: set[int]
    heavy: bool


@dataclass
class _Walk:
    recording: Recording
    device: str
    users: dict[int, list[Op]]
    kernels: list[Kernel] = field(default_factory=list)
    lazy: dict[int, _Lazy] = field(default_factory=dict)

    def stored(self, values: Collection[int]) -> set[int]:
        """What is read for these values, of lazy ones what they are computed from."""
        found: set[int] = set()
        for value in values:
            found |= self.lazy[value].reads if value in self.lazy else {value}
        return found

    def store(self, value: int, op: int) -> None:
        """Write a lazy value."""
        if (lazy := self.lazy.pop(value, None)) is not None:
            at = min(op, len(self.recording.ops) - 1)
            self.kernels.append(Kernel(op, lazy.reads, [value], self.recording.ops[at].segment, True, True))

    def pointwise(self, index: int, op: Op) -> None:
        (value,) = op.writes
        inside = [self.lazy[read] for read in op.reads if read in self.lazy]
        ops = {index}.union(*(each.ops for each in inside))
        heavy = op.heavy or any(each.heavy for each in inside)
        reads = self.stored(op.reads)
        self.lazy[value] = _Lazy(reads, ops, heavy)
        users, size = self.users.get(value, []), len(ops) + len(reads)
        dear = (heavy and self.device == "cpu") or size > _MOST_OPS[self.device] or len(reads) > _READS
        called = len(reads) > 1 and any(user.kind == "extern" for user in users)
        handed, many = value in self.recording.handed, len(reads) > _MOST_READS[self.device]
        if handed or many or (len(users) > 1 and (dear or called)):
            self.store(value, index)


def kernels_of(recording: Recording, device: str, outputs: Collection[int]) -> list[Kernel]:
    """The calls of a compiled forward and backward, in order.

    Args:
        recording: of them.
        device: "cpu" or "cuda".
        outputs: values that somebody wants.
    """
    alive = _needed(recording, outputs)
    users: dict[int, list[Op]] = {}
    for index in sorted(alive):
        for read in recording.ops[index].reads:
            users.setdefault(read, []).append(recording.ops[index])
    walk = _Walk(recording, device, users)
    for index, op in enumerate(recording.ops):
        if index not in alive:
            continue
        if op.kind == "pointwise" and len(op.writes) == 1:
            walk.pointwise(index, op)
            continue
        if op.kind == "extern":
            for read in op.reads:
                walk.store(read, index)
        ours = op.kind != "extern"
        reuses = ours or op.name in _IN_PLACE
        walk.kernels.append(Kernel(index, walk.stored(op.reads), list(op.writes), op.segment, ours, reuses))
    for value in outputs:
        walk.store(value, len(recording.ops))
    return walk.kernels


def _needed(recording: Recording, outputs: Collection[int]) -> set[int]:
    """Places of the operations that the outputs follow from."""
    wanted, found = set(outputs), set()
    for index in range(len(recording.ops) - 1, -1, -1):
        op = recording.ops[index]
        if wanted.intersection(op.writes):
            found.add(index)
            wanted.update(op.reads)
    return found


def fused(kernels: list[Kernel], recording: Recording, outputs: Collection[int]) -> list[Kernel]:
    """The same, neighbours that read or write the same run together, and what only they read is not stored."""
    groups: list[Kernel] = []
    made: dict[int, int] = {}  # by value, the place of the group that writes it
    sizes: list[int] = []
    for kernel in kernels:
        at, size = len(groups), _elements(kernel, recording)
        if kernel.fuses:
            earliest = max((made[read] for read in kernel.reads if read in made), default=-1)
            for place in range(len(groups) - 1, max(earliest, 0) - 1, -1):
                group = groups[place]
                alike = group.fuses and sizes[place] == size and group.segment == kernel.segment
                if alike and kernel.reads & (group.reads | set(group.writes)):
                    at = place
        if at == len(groups):
            groups.append(replace(kernel, reads=set(kernel.reads), writes=list(kernel.writes)))
            sizes.append(size)
        else:
            groups[at].reads |= kernel.reads
            groups[at].writes += kernel.writes
        made.update(dict.fromkeys(kernel.writes, at))
    readers: dict[int, int] = {}
    for group in groups:
        for read in group.reads.difference(group.writes):
            readers[read] = readers.get(read, 0) + 1
    for group in groups:
        group.reads.difference_update(group.writes)
        if group.fuses:
            group.writes = [value for value in group.writes if value in readers or value in outputs]
    return groups


def _elements(kernel: Kernel, recording: Recording) -> int:
    """Elements that an Inductor kernel goes over: of the largest that it reads or writes, all but batch-free ones."""
    if not kernel.fuses:
        return 0
    counts = [_count(recording.values[value].shape) for value in (*kernel.reads, *kernel.writes)]
    return max(counts, default=0)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
