"""Products with prologues and an epilogue on a CPU: the library's GEMM on blocks that stay in cache.

With an epilogue, the product is computed block by block into one buffer, which the epilogue consumes before the next
block is computed.  A decoded operand is decoded block by block too.  So neither the m × n product nor a decoded operand
is stored as a whole, unless it is no larger than a block.

All that the calls of one text have in common, everything but the tensors' addresses, is worked out once (`_Plan`):
a call in Python that works out sizes, strides and blocks takes longer than a small kernel.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from math import lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.gemm import VALUE, Operand, parsed
from qgalore_compile.kernels.ir.memory import MEMORY

PRODUCT_BYTES = 1 << 21
"""Blocks of the products at most: they have to stay in the second-level caches until the epilogue has read them."""

OPERAND_BYTES = 1 << 22
"""A block of a decoded operand at most: large enough for the library's GEMM to run at its speed."""


@cache
def kernels(text: str) -> tuple[cpu.Kernel | None, ...]:
    """The kernels of a text's prologues, product by product, left before right, and of its epilogue; spelling them out
    takes 0.1 ms a call."""
    program = parsed(text)
    parts = [each.prologue for left, right, _ in program.products for each in (left, right)] + [program.epilogue]
    return tuple(None if part is None else cpu.kernel(str(part)) for part in parts)


def run(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Run a ``GemmProgram`` with an epilogue; arguments as for ``GemmProgram.share``."""
    plan = _plan(text, PRODUCT_BYTES, OPERAND_BYTES)
    addresses, held = plan.addresses(written, read), cpu.packed(numbers)
    wholes = [(left.whole(read), right.whole(read)) for left, right in plan.sides]
    decoded: list[tuple[int, int] | None] = [None] * len(plan.sides)  # the rows that each left operand's buffer holds
    for columns, tiles in plan.tiles:
        rights = [right.block(read, whole, columns) for (_, right), (_, whole) in zip(plan.sides, wholes, strict=True)]
        for tile in tiles:
            for index, (left, _) in enumerate(plan.sides):
                product = scratch(plan.uses[index], tile.size, plan.dtypes[index])
                rows = left.block(read, wholes[index][0], tile.rows, again=decoded[index] == tile.rows)
                decoded[index] = tile.rows
                torch.mm(rows, rights[index], out=product)
                addresses[plan.places[index]] = product.data_ptr() - tile.offsets[index]
            plan.kernel.launch(plan.kernel.pack(*addresses), tile.pitches, held, *tile.bounds)


class _Tile(NamedTuple):
    """A block of the products, and the epilogue's launch on it.

    Attributes:
        rows: first and last but one.
        size: rows and columns.
        pitches: of the epilogue's buffers.
        offsets: of each product, bytes from where its matrix would begin to the block.
        bounds: rows and groups of the launch.
    """

    rows: tuple[int, int]
    size: tuple[int, int]
    pitches: Any
    offsets: tuple[int, ...]
    bounds: tuple[int, int, int, int]


class _Plan:
    """What the calls of a text with an epilogue have in common.

    Attributes:
        kernel: the epilogue's.
        sides: the left operand and the right one of each product.
        uses, dtypes, places: of each product, its block's use, its type, and its buffer in the epilogue.
        tiles: for each block of columns, first and last but one, the blocks in it.
    """

    def __init__(self, text: str, product_bytes: int, operand_bytes: int) -> None:
        program = parsed(text)
        *prologues, kernel = kernels(text)
        assert program.epilogue is not None
        assert kernel is not None
        self.kernel, space = kernel, program.epilogue.space
        buffers = [buffer.name for buffer in program.epilogue.buffers]
        self.places = [buffers.index(product) for _, _, product in program.products]
        self._order = [place for place in kernel.order if place not in self.places]
        self.dtypes = [MEMORY[program.epilogue.buffers[place].memory].dtype for place in self.places]
        self.uses = [_use("product", index) for index in range(len(self.places))]
        self.sides: list[tuple[_Side, _Side]] = []
        at = 0
        for index, (left, right, _) in enumerate(program.products):
            own = _Side(left, prologues[2 * index], 0, at, operand_bytes, index)
            other = _Side(right, prologues[2 * index + 1], 1, own.last, operand_bytes, index)
            self.sides.append((own, other))
            at = other.last
        self._rest = at  # where the epilogue's tensors begin among those that are read
        across = lcm(space.width, *(right.alignment for _, right in self.sides))
        down = lcm(*(left.alignment for left, _ in self.sides))
        columns = min(right.step(space.columns, across) for _, right in self.sides)
        most = max(1, min(product_bytes // len(self.places) // each.itemsize // columns for each in self.dtypes))
        rows = min(left.step(space.rows, down, most) for left, _ in self.sides)
        self.tiles = [
            (block, [self._tile(part, block, space.width) for part in _ranges(space.rows, rows)])
            for block in _ranges(space.columns, columns)
        ]

    def _tile(self, rows: tuple[int, int], columns: tuple[int, int], width: int) -> _Tile:
        pitch = columns[1] - columns[0]
        pitches = (ctypes.c_int64 * len(self.kernel.pitches))(*self.kernel.pitches)
        for place in self.places:
            pitches[place] = pitch
        offsets = tuple((rows[0] * pitch + columns[0]) * each.itemsize for each in self.dtypes)
        bounds = (*rows, columns[0] // width, -(-columns[1] // width))
        return _Tile(rows, (rows[1] - rows[0], pitch), pitches, offsets, bounds)

    def addresses(self, written: Sequence[Tensor], read: Sequence[Tensor]) -> list[int]:
        """Of the epilogue's buffers, those of the products left out."""
        return self.kernel.addresses(self._order, [*written, *read[self._rest :]])


@cache
def _plan(text: str, product_bytes: int, operand_bytes: int) -> _Plan:
    """Of a text, for blocks of these sizes; one a process."""
    return _Plan(text, product_bytes, operand_bytes)


def product(text: str, read: Sequence[Tensor]) -> Tensor:
    """The product (m, n) of a ``GemmProgram`` without an epilogue, from the tensors of its operands."""
    left, right = _product(text, OPERAND_BYTES)
    left_whole, right_whole = left.whole(read), right.whole(read)
    m, n = left.count(left_whole), right.count(right_whole)
    row_step, column_step = left.step(m, left.alignment), right.step(n, right.alignment)
    if row_step >= m and column_step >= n:
        return torch.mm(left.block(read, left_whole, (0, m)), right.block(read, right_whole, (0, n)))
    out = torch.empty((m, n), dtype=left.dtype or left_whole.dtype)
    decoded: tuple[int, int] | None = None
    for columns in _ranges(n, column_step):
        right_block = right.block(read, right_whole, columns)
        for rows in _ranges(m, row_step):
            left_block = left.block(read, left_whole, rows, again=decoded == rows)
            decoded = rows
            torch.mm(left_block, right_block, out=out[slice(*rows), slice(*columns)])
    return out


@cache
def _product(text: str, operand_bytes: int) -> tuple[_Side, _Side]:
    """The operands of a text without an epilogue; one a process."""
    program = parsed(text)
    left_kernel, right_kernel, _ = kernels(text)
    left = _Side(program.left, left_kernel, 0, 0, operand_bytes)
    return left, _Side(program.right, right_kernel, 1, left.last, operand_bytes)


_held = threading.local()
_views = threading.local()


def scratch(use: str, size: tuple[int, int], dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """An uninitialised matrix, or its transpose, in memory that a thread keeps from call to call, at most a block for
    each use.

    Fresh memory of this size comes from the system, page by page: with it, decoding took a fifth longer.  The views are
    kept too: to make one takes as long as a launch.
    """
    try:
        views: dict[Any, Tensor] = _views.of[use]
    except (AttributeError, KeyError):
        views = vars(_views).setdefault("of", {}).setdefault(use, {})
    found = views.get((size, dtype, transposed))
    if found is None:
        with torch.inference_mode(mode=False):  # which would mark it for good
            found = _view(use, size, dtype, views)
            found = views[size, dtype, transposed] = found.t() if transposed else found
    return found


def _view(use: str, size: tuple[int, int], dtype: torch.dtype, views: dict[Any, Tensor]) -> Tensor:
    """A matrix in a use's block, which is made anew, and its views with it, where it is too small."""
    count = size[0] * size[1]
    held: Tensor | None = getattr(_held, use, None)
    if held is None or held.nbytes < count * dtype.itemsize:
        views.clear()
        held = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        setattr(_held, use, held)
    return held[: count * dtype.itemsize].view(dtype).view(size)


def _use(what: str, product: int) -> str:
    """What a block is for: of the first product, or of a further one."""
    return f"{what} of {product}" if product else what


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, step):
        yield first, min(first + step, count)


class _Decoding(NamedTuple):
    """The launch that decodes a block.

    Attributes:
        size: rows and columns, as the value is stored.
        pitches: of the prologue's buffers.
        offset: bytes from where the whole value would begin to the block.
        bounds: rows and groups of the launch.
    """

    size: tuple[int, int]
    pitches: Any
    offset: int
    bounds: tuple[int, int, int, int]


class _Side:
    """An operand, handed out in blocks of the dimension that the product keeps; a decoded one has one buffer, which
    every block is decoded into.

    Attributes:
        first, last: its tensors among those that a product reads.
        alignment: blocks must begin at multiples of this.
        dtype: of what is decoded; None for an operand that is there.
    """

    dtype: torch.dtype | None = None
    alignment = 1

    def __init__(
        self, operand: Operand, kernel: cpu.Kernel | None, kept: int, first: int, operand_bytes: int, product: int = 0
    ) -> None:
        self._prologue, self._transposed, self._kept = operand.prologue, operand.transposed, kept
        self._kernel, self._use = kernel, _use(f"operand {kept}", product)
        self.first, self.last = first, first + operand.tensors()
        if operand.prologue is None:
            return
        self._place = [buffer.name for buffer in operand.prologue.buffers].index(VALUE)
        self._order = [place for place in range(len(operand.prologue.buffers)) if place != self._place]
        self.dtype = MEMORY[operand.prologue.buffers[self._place].memory].dtype
        rows, columns, width = operand.prologue.space
        self._by_columns = (kept == 1) != operand.transposed  # of the value as it is stored
        self._inner, self._count = (rows, columns) if self._by_columns else (columns, rows)
        self.alignment = width if self._by_columns else 1
        self._most = operand_bytes // (self.dtype.itemsize * self._inner)
        self._decodings: dict[tuple[int, int], _Decoding] = {}

    def whole(self, read: Sequence[Tensor]) -> Tensor:
        """The operand where it is there, else the first of the tensors that it is decoded from."""
        tensor = read[self.first]
        return tensor.t() if self._transposed and self._prologue is None else tensor

    def count(self, whole: Tensor) -> int:
        """Size of the dimension that the product keeps."""
        return whole.shape[self._kept] if self._prologue is None else self._count

    def step(self, count: int, alignment: int, most: int | None = None) -> int:
        """How much of the kept dimension a block takes: `most` at most, a multiple of `alignment`."""
        if self._prologue is not None:
            most = self._most if most is None else min(most, self._most)
        if most is None or most >= count:
            return count
        return max(most // alignment, 1) * alignment

    def block(self, read: Sequence[Tensor], whole: Tensor, at: tuple[int, int], *, again: bool = False) -> Tensor:
        """Places of the kept dimension; ``again``: the buffer still holds them."""
        if self._kernel is None:
            if at[1] - at[0] == whole.shape[self._kept]:
                return whole
            return whole[:, at[0] : at[1]] if self._kept else whole[at[0] : at[1]]
        decoding = self._decodings.get(at) or self._decoding(at)
        assert self.dtype is not None
        value = scratch(self._use, decoding.size, self.dtype, self._transposed)
        if not again:
            addresses = self._kernel.addresses(self._order, read[self.first : self.last])
            addresses[self._place] = value.data_ptr() - decoding.offset
            self._kernel.launch(self._kernel.pack(*addresses), decoding.pitches, None, *decoding.bounds)
        return value

    def _decoding(self, at: tuple[int, int]) -> _Decoding:
        assert self._prologue is not None
        assert self._kernel is not None
        assert self.dtype is not None
        inner, width = (0, self._inner), self._prologue.space.width
        rows, columns = (inner, at) if self._by_columns else (at, inner)
        pitch = columns[1] - columns[0]
        pitches = (ctypes.c_int64 * len(self._kernel.pitches))(*self._kernel.pitches)
        pitches[self._place] = pitch
        made = _Decoding(
            size=(rows[1] - rows[0], pitch),
            pitches=pitches,
            offset=(rows[0] * pitch + columns[0]) * self.dtype.itemsize,
            bounds=(*rows, columns[0] // width, -(-columns[1] // width)),
        )
        self._decodings[at] = made
        return made
