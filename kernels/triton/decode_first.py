"""Whether a product decodes a quantised operand in the tiles that load it, or has it decoded before, as a whole.

Every row of tiles decodes all of a right operand once more (and every column of them a left one), on units that then
do not multiply.  Decoded before, it is written to memory and read again, which for a bfloat16 operand is 5 bytes an
element in place of one; where nothing follows on the product it is a library's then.  Many tiles pay for that, few do
not: on an H100 bf16 × INT8ᵀ of 4096 × 4096 × 4096 takes 344 µs in tiles, and 180 in the library beside 21 for decoding;
the write-back of 4096 × 4096 at rank 1024 takes 182 µs with the INT4 projector decoded in tiles, and 108 where 8 are
spent on decoding it before.

What is rotated by groups is always decoded before: a product's tiles take k in parts, and of a rotation each element
needs the whole group.
"""

from __future__ import annotations

import math

from qgalore_compile.kernels.ir.gemm import VALUE, GemmProgram, Operand
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.triton.gemm import Matrix, Product
from qgalore_compile.kernels.triton.targets import Target
from qgalore_compile.kernels.triton.tiling import (
    NoTilingError,
    decoding,
    grid_sizes,
    operand_bytes,
    peak,
    region_blocks,
    seconds,
    tiling,
)

_LAUNCH = 3e-6
"""Seconds that one more kernel takes, however little it does."""
_ATTAINED = 0.7
"""Of a chip's bandwidth by a kernel of a decoding, and of its peak by a library: measured on an H100."""
_LIBRARY = (5e-6, 4e-9)
"""Seconds of a library's product however small, and for each number that it sums over: 5.7 µs of 128, 21 of 4096."""
_ALIGNED = 8
"""Elements that a row must be a multiple of for a library to load 16 bytes at a time."""


def decodes_first(product: Product, target: Target) -> bool:
    """Whether decoding before the product is faster, by the model of :mod:`qgalore_compile.kernels.triton.tiling`, or
    the only way, as for operands that are decoded in whole groups."""
    if product.further:
        return False  # operands of several products are decoded in their tiles, or the graph has another form
    plain = decoded(product)
    if plain == product:
        return False
    try:
        for operand in _quantised(product.program):
            assert operand.prologue is not None
            region_blocks(operand.prologue)
    except NoTilingError:
        return False
    try:
        in_tiles = seconds(product, tiling(product, target), target)
    except NoTilingError:
        in_tiles = math.inf
    if in_tiles < math.inf and not (_aligned(plain.left) and _aligned(plain.right)):
        return False
    try:
        before = _library(plain, target) if plain.program.epilogue is None else seconds(
            plain, tiling(plain, target), target)  # fmt: skip
    except NoTilingError:
        return False
    return before + sum(_decoding(product, operand, target) for operand in _quantised(product.program)) < in_tiles


def decoded(product: Product) -> Product:
    """The product of operands that have been decoded, each stored row by row as its prologue's value is."""
    program = product.program
    left, right = (
        matrix if operand.prologue is None else Matrix(value_of(operand.prologue), (operand.prologue.space.columns, 1))
        for operand, matrix in ((program.left, product.left), (program.right, product.right))
    )
    return product._replace(program=decoded_program(program), left=left, right=right)


def decoded_program(program: GemmProgram) -> GemmProgram:
    """The program that takes as tensors what ``program`` decodes."""
    left, right = (Operand(None, operand.transposed) for operand in (program.left, program.right))
    return GemmProgram(left, right, program.epilogue, program.product)


def value_of(prologue: BlockProgram) -> str:
    """The format in memory of what a prologue decodes."""
    return prologue.buffer(VALUE).memory


def _quantised(program: GemmProgram) -> list[Operand]:
    return [operand for operand in (program.left, program.right) if operand.prologue is not None]


def _decoding(product: Product, operand: Operand, target: Target) -> float:
    """Seconds of a kernel that decodes an operand."""
    prologue = operand.prologue
    assert prologue is not None
    moved = operand_bytes(product, operand, 0, 0) + prologue.bytes_of(prologue.buffer(VALUE))
    instructions = math.prod(prologue.space[:2]) * decoding(prologue)
    return _LAUNCH + max(
        moved / (_ATTAINED * target.dram_bytes_per_second), instructions / (_ATTAINED * target.fp32_flops / 2)
    )


def _library(product: Product, target: Target) -> float:
    """Seconds of a library's product, in tiles of 128 x 128 of which it has at least one for each multiprocessor."""
    m, n, k = *grid_sizes(product), product.sizes[2]
    rows, columns = (-(-size // 128) * 128 for size in (m, n))
    moved = operand_bytes(product, product.program.left, m, k) + operand_bytes(product, product.program.right, k, n)
    moved += operand_bytes(product, Operand(None, False), m, n)
    return max(
        _LIBRARY[0] + k * _LIBRARY[1],
        2.0 * rows * columns * k / (_ATTAINED * peak(product, target)),
        moved / (_ATTAINED * target.dram_bytes_per_second),
    )


def _aligned(matrix: Matrix | None) -> bool:
    """Also where the strides are known only when the step runs."""
    return matrix is None or max(matrix.strides) % _ALIGNED == 0
