"""Products with prologues and an epilogue on a CPU: the library's GEMM on blocks that stay in cache.

With an epilogue, the product is computed block by block into one buffer, which the epilogue consumes before the next
block is computed.  A decoded operand is decoded block by block too.  So neither the m × n product nor a decoded operand
is stored as a whole, unless it is no larger than a block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cache
from math import lcm

import torch
from torch import Tensor

from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.gemm import VALUE, Factors, GemmProgram, Operand, parsed
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
    """Run a :class:`GemmProgram` with an epilogue; arguments as for :meth:`GemmProgram.share`."""
    program = parsed(text)
    *prologues, kernel = kernels(text)
    assert program.epilogue is not None
    assert kernel is not None
    tensors, own = program.share(written, read)
    epilogue, space = kernel.arguments(own, numbers), program.epilogue.space
    products = []
    for index, (factors, (left, right)) in enumerate(zip(program.products, tensors, strict=True)):
        kind = MEMORY[program.epilogue.buffer(factors.product).memory].dtype
        products.append(_Blocks(index, factors, prologues[2 * index : 2 * index + 2], left, right, kind))
    across = lcm(space.width, *(each.right.alignment for each in products))
    down = lcm(*(each.left.alignment for each in products))
    columns = min(each.right.step(space.columns, across) for each in products)
    most = max(1, min(PRODUCT_BYTES // len(products) // each.dtype.itemsize // columns for each in products))
    rows = min(each.left.step(space.rows, down, most) for each in products)
    for each in products:
        each.keep(rows * columns)
    for column_0, column_1 in _ranges(space.columns, columns):
        for each in products:
            each.right_block = each.right.block(column_0, column_1)
        for row_0, row_1 in _ranges(space.rows, rows):
            for each in products:
                epilogue.place(each.name, each.block(row_0, row_1, column_1 - column_0), row_0, column_0)
            epilogue.run(row_0, row_1, column_0 // space.width, -(-column_1 // space.width))


class _Blocks:
    """One of the products that an epilogue reads, computed block by block."""

    right_block: Tensor

    def __init__(
        self,
        index: int,
        factors: Factors,
        prologues: Sequence[cpu.Kernel | None],
        left: Sequence[Tensor],
        right: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.name, self.dtype, self.index = factors.product, dtype, index
        self.left = _Source(factors.left, prologues[0], left, 0, index)
        self.right = _Source(factors.right, prologues[1], right, 1, index)

    def keep(self, elements: int) -> None:
        """Memory for a block."""
        self._buffer = _scratch(_use("product", self.index), elements, self.dtype)

    def block(self, row_0: int, row_1: int, columns: int) -> Tensor:
        """The rows of the product in the columns of ``right_block``."""
        size = (row_1 - row_0, columns)
        block = self._buffer[: size[0] * size[1]].view(size)
        torch.mm(self.left.block(row_0, row_1), self.right_block, out=block)
        return block


def product(text: str, read: Sequence[Tensor]) -> Tensor:
    """The product (m, n) of a :class:`GemmProgram` without an epilogue, from the tensors of its operands."""
    whole = _whole(text)
    if whole is not None and whole.bytes <= OPERAND_BYTES:
        return whole.product(read)
    program = parsed(text)
    left_kernel, right_kernel, _ = kernels(text)
    ((left_tensors, right_tensors),) = program.operands(read)
    left = _Source(program.left, left_kernel, left_tensors, 0)
    right = _Source(program.right, right_kernel, right_tensors, 1)
    m, n = left.count, right.count
    out = torch.empty((m, n), dtype=left.dtype)
    row_step, column_step = left.step(m, left.alignment), right.step(n, right.alignment)
    for column_0, column_1 in _ranges(n, column_step):
        right_block = right.block(column_0, column_1)
        for row_0, row_1 in _ranges(m, row_step):
            torch.mm(left.block(row_0, row_1), right_block, out=out[row_0:row_1, column_0:column_1])
    return out


class _Whole:
    """A product with one decoded operand, decoded as a whole: everything that calls have in common.

    A step of 60m makes 168 such calls, which took 0.1 ms each beside the kernel and the library's product before.
    """

    def __init__(self, program: GemmProgram, kernel: cpu.Kernel, decoded: int) -> None:
        self.kernel, self.decoded = kernel, decoded
        operand, plain = (program.left, program.right) if decoded == 0 else (program.right, program.left)
        assert operand.prologue is not None
        self.space, self.transposed = operand.prologue.space, operand.transposed
        self.plain_transposed = plain.transposed
        self.dtype = MEMORY[operand.prologue.buffer(VALUE).memory].dtype
        self.bytes = self.space.rows * self.space.columns * self.dtype.itemsize
        self.first = 0 if decoded == 0 else 1  # of the operand's tensors among those that are read
        self.last = self.first + operand.tensors()
        buffers = operand.prologue.buffers
        self.places = [place for place, buffer in enumerate(buffers) if buffer.name != VALUE]
        self.value_place = next(place for place, buffer in enumerate(buffers) if buffer.name == VALUE)
        self.pitches = kernel.pitches

    def product(self, read: Sequence[Tensor]) -> Tensor:
        rows, columns, _ = self.space
        value = _scratch(f"operand {self.decoded}", rows * columns, self.dtype).view(rows, columns)
        pointers = [0] * len(self.pitches)
        for place, tensor in zip(self.places, read[self.first : self.last], strict=True):
            pointers[place] = tensor.data_ptr()
        pointers[self.value_place] = value.data_ptr()
        self.kernel.launch(pointers, self.pitches, rows, self.space.groups)
        if self.transposed:
            value = value.t()
        plain = read[self.last] if self.decoded == 0 else read[0]
        if self.plain_transposed:
            plain = plain.t()
        return torch.mm(value, plain) if self.decoded == 0 else torch.mm(plain, value)


@cache
def _whole(text: str) -> _Whole | None:
    """What a text's calls have in common, where it has one decoded operand; else None."""
    program, parts = parsed(text), kernels(text)
    decoded = [place for place in (0, 1) if parts[place] is not None]
    if len(decoded) != 1:
        return None
    kernel = parts[decoded[0]]
    assert kernel is not None
    return _Whole(program, kernel, decoded[0])


_held = threading.local()


def _scratch(use: str, count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised elements that a thread keeps from call to call, at most a block for each use.

    Fresh memory of this size comes from the system, page by page: with it, decoding took a fifth longer.
    """
    held: Tensor | None = getattr(_held, use, None)
    if held is None or held.nbytes < count * dtype.itemsize:
        with torch.inference_mode(mode=False):  # which would mark it for good
            held = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        setattr(_held, use, held)
    return held[: count * dtype.itemsize].view(dtype)


def _use(what: str, product: int) -> str:
    """What a block is for: of the first product, or of a further one."""
    return f"{what} of {product}" if product else what


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, step):
        yield first, min(first + step, count)


class _Source:
    """An operand, handed out in blocks of the dimension that the product keeps; a decoded one has one buffer, which
    every block is decoded into.

    Attributes:
        count: size of that dimension.
        alignment: blocks must begin at multiples of this.
        dtype: of the operand.
    """

    def __init__(
        self, operand: Operand, kernel: cpu.Kernel | None, tensors: Sequence[Tensor], kept: int, product: int = 0
    ) -> None:
        self.prologue, self.transposed, self.kept = operand.prologue, operand.transposed, kept
        self.use = _use(f"operand {kept}", product)
        self.count, self.alignment = operand.size(tensors, kept), 1
        if self.prologue is None or kernel is None:
            self.whole = tensors[0].t() if operand.transposed else tensors[0]
            self.dtype = self.whole.dtype
            return
        self.decode = kernel.arguments(operand.named(tensors), ())
        self.dtype = MEMORY[self.prologue.buffer(VALUE).memory].dtype
        rows, columns, width = self.prologue.space
        self.by_columns = (kept == 1) != operand.transposed  # of the value as it is stored
        self.inner = rows if self.by_columns else columns
        self.alignment = width if self.by_columns else 1
        self.at: tuple[int, int] | None = None

    def step(self, count: int, alignment: int, most: int | None = None) -> int:
        """How much of the kept dimension a block takes: `most` at most, a multiple of `alignment`."""
        if self.prologue is not None:
            fitting = OPERAND_BYTES // (self.dtype.itemsize * self.inner)
            most = fitting if most is None else min(most, fitting)
        if most is None or most >= count:
            return count
        return max(most // alignment, 1) * alignment

    def block(self, first: int, last: int) -> Tensor:
        """Places first..last of the kept dimension."""
        if self.prologue is None:
            return self.whole[:, first:last] if self.kept else self.whole[first:last]
        rows = (0, self.inner) if self.by_columns else (first, last)
        columns = (first, last) if self.by_columns else (0, self.inner)
        size = (rows[1] - rows[0], columns[1] - columns[0])
        if self.at != (first, last):
            self.scratch = _scratch(self.use, size[0] * size[1], self.dtype)
            width = self.prologue.space.width
            self.decode.place(VALUE, self.scratch.view(size), rows[0], columns[0])
            self.decode.run(*rows, columns[0] // width, -(-columns[1] // width))
            self.at = (first, last)
        value = self.scratch.view(size)
        return value.t() if self.transposed else value
