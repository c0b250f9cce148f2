"""Formats that take several nodes of a graph: codes packed two a byte, rows filled up to whole groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qgalore_compile.kernels.ir.program import Space
from qgalore_compile.kernels.read.fx_values import arguments, aten, dtype, shape
from qgalore_compile.kernels.read.spelling import VIEWS


def nibbles(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(node, packed) where a node unpacks two codes a byte, low nibbles first."""
    cat = node
    if node.target is aten.slice.Tensor and isinstance(node.args[0], fx.Node) and is_slice(node, 0, shape(node)[-1]):
        cat = node.args[0]
    if cat.target is not aten.cat.default or len(arguments(cat)[0]) != 2:
        return None
    low, high = arguments(cat)[0]
    if low.target is not aten.bitwise_and.Scalar or high.target is not aten.__rshift__.Scalar:
        return None
    if low.args != (high.args[0], 15) or high.args[1] != 4:
        return None
    missing = shape(cat)[-1] - shape(node)[-1]
    return (node, low.args[0]) if missing in (0, 1) and dtype(low.args[0]) == torch.uint8 else None


def filled(node: fx.Node, space: Space) -> fx.Node | None:
    """The tensor that a node fills up to whole groups by repeating its last element."""
    if node.target is not aten.cat.default or len(arguments(node)[0]) != 2:
        return None
    source, tail = arguments(node)[0]
    if shape(node)[-1:] != (space.groups * space.width,) or shape(source)[-1:] != (space.columns,):
        return None
    while tail.target in (aten.expand.default, *VIEWS):
        tail = tail.args[0]
    last = space.columns - 1
    return source if tail.target is aten.slice.Tensor and tail.args[0] is source and is_slice(tail, last) else None


def is_slice(node: fx.Node, start: int, stop: int | None = None) -> bool:
    """Whether a slice takes ``start``..``stop`` of the last dimension, of stride 1."""
    source, *rest = arguments(node)
    given: list[Any] = [*rest, *[0, None, None, 1][len(rest) :]]
    dim, first, last, stride = given
    size = shape(source)[-1]
    if dim not in (-1, len(shape(source)) - 1) or not isinstance(size, int) or stride != 1:
        return False
    begin, end, _ = slice(first, last).indices(size)
    return (begin, end) == (start, size if stop is None else stop)
