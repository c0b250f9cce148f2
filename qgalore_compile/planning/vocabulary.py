"""Logits that a compiled step has some rows of at a time (:mod:`qgalore_compile.passes.chunked_loss`)."""

from __future__ import annotations

import math

from qgalore_compile.kernels.loss import BLOCK_BYTES, SMALL
from qgalore_compile.planning.recording import Op, Recording

_PRODUCTS = ("aten.mm", "aten.addmm")


def by_rows(recording: Recording) -> dict[int, int]:
    """By value of the logits' size that never exists as a whole, the bytes of it that do at a time.

    Logits are a product behind the stack whose rows a softmax is taken of; they are computed by rows where the products
    that read their gradient make less than they are.
    """
    found: dict[int, int] = {}
    for op in recording.ops:
        if op.name not in _PRODUCTS or op.segment.part != "head":
            continue
        (logits,) = op.writes
        shape, held = recording.values[logits].shape, recording.values[logits].bytes
        count = math.prod(shape)
        if len(shape) != 2 or count < SMALL:
            continue
        whole = {value for each in recording.ops for value in each.writes
                 if each.segment == op.segment and _is_like(recording.values[value].shape, shape)}  # fmt: skip
        read = [each for each in recording.ops if each.name in _PRODUCTS and whole.intersection(each.reads)]
        softmax = any(each.name == "aten.amax" and whole.intersection(each.reads) for each in recording.ops)
        if softmax and read and sum(_made(recording, each, held // count) for each in read) < held:
            found |= dict.fromkeys(whole, min(BLOCK_BYTES, held))
    return found


def _is_like(shape: tuple[int, ...], logits: tuple[int, ...]) -> bool:
    return bool(shape) and shape[-1] == logits[1] and math.prod(shape) == math.prod(logits)


def _made(recording: Recording, op: Op, element: int) -> int:
    """Bytes that a product beside a loss takes: sums of weights are in float32, and exist beside what they are
    added to."""
    (result,) = op.writes
    size = recording.values[result].bytes
    weight = result in recording.gradients.values() or op.name == "aten.addmm"
    return (size // element * 4 if weight else size) + (size if op.name == "aten.addmm" else 0)
