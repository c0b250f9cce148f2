"""Layers as functions: what a layer's forward hands to its backward, where pass ``outline`` compiles equal ones once.

A function hands over what products and other library calls have written; casts, gates and norms are computed again in
the backward's function (``passes/crossing.py``).  So here the operations behind them are copied into the backward.
"""

from __future__ import annotations

from dataclasses import replace

from qgalore_compile.planning.recording import Op, Recording

MUCH = 1_000
"""Nodes that calls must save: ``passes/outline.py``."""
_UPDATE = 20
"""Nodes of a projected weight's update, as the pass finds them."""


def is_outlined(recording: Recording, device: str, depth: int, projected: int) -> bool:
    """Whether the layers of a stack become functions: on a CPU, where that saves much.

    Args:
        recording: of the model.
        device: "cpu" or "cuda".
        depth: equal layers of the model.
        projected: weights of a layer that are projected.
    """
    ops = sum(op.segment.layer == 1 for op in recording.ops)
    return device == "cpu" and depth > 1 and (depth - 1) * (ops + _UPDATE * projected) >= MUCH


def outlined(recording: Recording) -> Recording:
    """The recording with layers as functions."""
    maker = {value: op for op in recording.ops for value in op.writes}
    values, ops = list(recording.values), list[Op]()
    again: dict[tuple[int, int], int] = {}

    def computed(value: int, layer: int) -> int:
        """The value in a layer's backward: a copy where its forward's function does not hand it over."""
        op = maker.get(value)
        if op is None or op.kind != "pointwise" or (op.segment.part, op.segment.layer) != ("forward", layer):
            return value
        if (layer, value) not in again:
            reads = tuple(computed(read, layer) for read in op.reads)
            again[layer, value] = len(values)
            values.append(values[value])
            ops.append(replace(op, reads=reads, writes=(again[layer, value],), segment=segment))
        return again[layer, value]

    for op in recording.ops:
        segment = op.segment
        if segment.part == "backward":
            op = replace(op, reads=tuple(computed(read, segment.layer) for read in op.reads))
        ops.append(op)
    made = {value: op.segment for op in ops for value in op.writes}
    handed = {
        read
        for op in ops
        for read in op.reads
        if read in made and made[read] != op.segment and made[read].part in ("forward", "backward")
    }
    return replace(recording, ops=ops, values=values, handed=frozenset(handed))
