"""What a region of an FX graph is read into, over which spaces, and the reasons why it may not be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import fx

from qgalore_compile import _ops, formats, rng  # noqa: F401  # they define torch.ops.qgalore
from qgalore_compile.kernels.ir.memory import OF_DTYPE
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.read.coded import DECODE, ENCODE, coded_shape, node_format, space_of
from qgalore_compile.kernels.read.fx_values import dtype, shape

qgalore = torch.ops.qgalore


class Refusal(Enum):
    """Why a region is no program; the text is for the user."""

    OPERATION = "an operation that generated kernels do not know"
    DTYPE = "a type that generated kernels do not compute in"
    SHAPE = "a shape that is not made of rows and groups of one matrix"
    BROADCAST = "operands that do not vary over the same rows, columns and groups"
    REDUCTION = "a reduction over more or less than one group"
    PADDING = "groups filled up with something other than the row's last element"
    STRIDES = "a tensor that is not contiguous"
    SIZE = "a size that is not known before the step runs"
    DRAWS = "an operand that draws random bits as it is decoded, which products would do once for each block of theirs"
    READ = "something that reads more of it than a number a row"
    LATE = "a value that follows from what the program is to compute"
    TILE = "groups that are too wide for any tile of this GPU; a smaller group size is fused"


class RefusedError(Exception):
    """A region that is no program."""

    def __init__(self, refusal: Refusal, node: fx.Node) -> None:
        super().__init__(f"{refusal.value} (at {node.name}: {node.target})")
        self.refusal, self.node = refusal, node


class Output(NamedTuple):
    """What a region writes: the node, and the tensor whose storage takes it, an input of the graph or what an op left
    there; None for a tensor of its own."""

    node: fx.Node
    target: fx.Node | None = None


@dataclass
class Region:
    """A program and what its arguments are.

    Attributes:
        program: over ``space``.
        buffers: the node behind each buffer that is read or updated in place; outputs of their own have none.
        numbers: the value of each integer argument.
        outputs: the buffer that each output goes to.
    """

    program: BlockProgram
    buffers: dict[str, fx.Node] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    outputs: dict[Output, str] = field(default_factory=dict)


def candidates(nodes: Sequence[fx.Node], domain: Sequence[int]) -> list[Space]:
    """Spaces for a region on tensors of shape ``domain``: widths that its shapes suggest, matrix before flat."""
    if not all(isinstance(size, int) for size in domain) or not math.prod(domain):
        return []
    *leading, columns = domain or (1,)
    rows, total = math.prod(leading), math.prod(domain)
    flat: list[int] = []
    matrix: list[int] = []
    for node in nodes:
        if node.target in (qgalore.quantize_dynamic8.default, qgalore.dequantize_dynamic8.default):
            flat.append(formats.BLOCK_SIZE)
        elif node.target in (ENCODE, DECODE) and all(isinstance(size, int) for size in coded_shape(node)):
            (flat if node_format(node).axis == "flat" else matrix).append(space_of(node).width)
        sizes = shape(node)
        if len(sizes) < 2 or not all(isinstance(size, int) for size in sizes):
            continue
        *before, groups, width = sizes
        if width > 1 and (groups - 1) * width < columns <= groups * width and math.prod(before) == rows:
            matrix.append(width)
        if width > 1 and (groups - 1) * width < total <= groups * width and not before:
            flat.append(width)
    plain = [Space(rows, columns, min(columns, formats.BLOCK_SIZE)), Space(1, total, min(total, formats.BLOCK_SIZE))]
    found = [Space(rows, columns, width) for width in matrix] + [Space(1, total, width) for width in flat]
    return list(dict.fromkeys([*found, *plain]))


NARROW = {torch.uint8, torch.int8, torch.int16}
"""Integers whose arithmetic wraps around below 32 bits."""


def memory_of(node: fx.Node) -> str:
    """The format of a node's tensor in memory, as a program names it; RefusedError where it has no name."""
    type_of(dtype(node), node)
    return OF_DTYPE[dtype(node)].name


def type_of(kind: torch.dtype, node: fx.Node) -> str:
    """The type that a program computes in for a dtype; RefusedError, naming the node, where there is none.  In float64
    only what is one number is computed: bias corrections, not matrices."""
    if kind not in OF_DTYPE or (kind == torch.float64 and shape(node)):
        raise RefusedError(Refusal.DTYPE, node)
    return OF_DTYPE[kind].widened
