"""``encode`` and ``decode`` nodes in a region: which tensors hold packed codes, and what the nodes are in a program."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from qgalore_compile.formats import Format
from qgalore_compile.formats.base import Grouped
from qgalore_compile.kernels.ir.memory import PACKED
from qgalore_compile.kernels.ir.program import Space
from qgalore_compile.kernels.read.fx_values import arguments, aten, is_tensor, shape

ENCODE, DECODE = torch.ops.qgalore.encode.default, torch.ops.qgalore.decode.default

_BELOW_A_BYTE = {*PACKED, "u4"}


def node_format(node: fx.Node) -> Grouped:
    """The format of an ``encode`` or ``decode`` node."""
    found = Format.parse(arguments(node)[2])
    assert isinstance(found, Grouped)  # others are traced through
    return found


def coded_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the floats that a node encodes or decodes."""
    return tuple(arguments(node)[1]) if node.target is DECODE else shape(arguments(node)[0])


def space_of(node: fx.Node) -> Space:
    """The space whose groups are those of an ``encode`` or ``decode`` node."""
    form, sizes = node_format(node), coded_shape(node)
    if form.axis == "flat":
        count = math.prod(sizes)
        return Space(1, count, min(form.width, count))
    return Space(math.prod(sizes[:-1]), sizes[-1], min(form.width, sizes[-1]))


def has_blocks(space: Space, count: int, width: int) -> bool:
    """Whether the groups of a space are the blocks of ``width`` of ``count`` elements in row-major order: it is flat,
    or no block goes on from one row to the next."""
    if space.rows == 1 and space.columns == count <= min(space.width, width):
        return True  # one short block
    if space.rows * space.columns != count or space.width != width:
        return False
    return space.rows == 1 or space.columns % width == 0


def has_groups(space: Space, node: fx.Node) -> bool:
    """Whether the groups of an ``encode`` or ``decode`` node are those of a space."""
    form = node_format(node)
    if form.axis == "flat":
        return has_blocks(space, math.prod(coded_shape(node)), form.width)
    return space_of(node) == space


def floats_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the floats that an input stands for: of what is decoded from it, where it holds codes."""
    for user in node.users:
        if user.target is DECODE:
            for part, each in zip(node_format(user).parts, arguments(user)[0], strict=True):
                if each is node and part.extent == "element":
                    return coded_shape(user)
    return shape(node)


def packed(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """The kind of memory of every node in sight that holds codes of fewer than eight bits: what is decoded, what is
    encoded, and what is chosen between such."""
    found: dict[fx.Node, str] = {}
    for node in nodes:
        if node.target is DECODE:
            found.update(_below_a_byte(node, arguments(node)[0]))
        elif node.target is ENCODE:
            found.update(_below_a_byte(node, _results(node)))
    for node in nodes:
        if node.target is aten.where.self:
            sides = [side for side in arguments(node)[1:] if is_tensor(side)]
            kinds = {found[side] for side in sides if side in found}
            if len(kinds) == 1:
                found.update(dict.fromkeys([node, *sides], *kinds))
    return found


def _below_a_byte(node: fx.Node, parts: Sequence[fx.Node | None]) -> Iterator[tuple[fx.Node, str]]:
    for part, each in zip(node_format(node).parts, parts, strict=True):
        if each is not None and part.memory in _BELOW_A_BYTE:
            yield each, part.memory


def _results(node: fx.Node) -> list[fx.Node | None]:
    """The results of an ``encode`` node, in order."""
    taken = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    return [taken.get(index) for index in range(len(node_format(node).parts))]


def apart(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Scales that are decoded themselves: their groups are others, so they are computed before the region."""
    return {
        each for node in nodes if node.target is DECODE
        for part, each in zip(node_format(node).parts, arguments(node)[0], strict=True)
        if part.extent == "group" and part.memory == "f32" and each.op == "call_function"
        and each.target is not operator.getitem
    }  # fmt: skip


def encoded_again(nodes: Sequence[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Scales of ``encode`` nodes that are encoded themselves, each with the nodes that follow from it: those are of
    other groups, so they are left to what comes behind the region."""
    found: dict[fx.Node, set[fx.Node]] = {}
    inside = set(nodes)
    for node in nodes:
        if node.target is not ENCODE:
            continue
        for part, scale in zip(node_format(node).parts, _results(node), strict=True):
            if part.extent != "group" or scale is None or all(user.target is aten.where.self for user in scale.users):
                continue
            behind, pending = set[fx.Node](), [scale]
            while pending:
                new = [user for user in pending.pop().users if user in inside and user not in behind]
                behind.update(new)
                pending.extend(new)
            found[scale] = behind
    return found


def fits(space: Space, extent: str, wanted: str) -> bool:
    """Whether a value of one extent may stand for one of another: where both are as many."""
    if extent == wanted or (extent == "scalar" and space.rows * space.groups == 1):
        return True
    return space.groups == 1 and {extent, wanted} == {"row", "group"}
