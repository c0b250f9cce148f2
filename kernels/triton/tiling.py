"""Which tiles a kernel works on, chosen by a model of the chip: registers, shared memory, bytes, waves.

The model of a product:

- A tile fits if its registers and its shared memory do.  Registers of a thread are estimated from its share of the
  accumulators: once and a half that, the addresses and what is being decoded, or 1.35 to 6.6 times that where an
  epilogue works on them.  The factors are from kernels compiled for sm_80 to sm_120: with the write-back of an INT8
  weight, 64 accumulators a thread come to 128 registers on sm_90, 212 on sm_100 and 163 to 204 elsewhere, to 246 where
  tiles are not full, and to more than there are where rows begin anywhere.
- Tiles are walked in the bands that read least from memory by ``traffic``.
- A block takes the longest of: its multiply-adds at its share of the peak, its operands from shared memory at 128
  bytes a cycle, its loads at 54 bytes a cycle; on top, decoding and the epilogue at 128 instructions a cycle, for they
  come before and after; and a barrier for every step along k, of which more stages hide more.  Of two blocks on a
  multiprocessor a third of what is not the longest overlaps.  The constants are fitted to kernels timed on an H100
  (products of 4096 x 4096 and 4096 x 11008 with INT8 and INT4 operands, with and without the write-back, tiles from
  16 x 256 to 256 x 128): the model gives the times of 110 of them to within 13 % (root of the mean square), and of 28
  others that it had not seen to within 15 %.

``traffic`` is the model behind the two columns of bytes in the table of ``qgalore compile``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from itertools import product as combinations
from typing import Any, NamedTuple

from qgalore_compile.kernels.ir.gemm import Operand, parsed
from qgalore_compile.kernels.ir.memory import MEMORY, PACKED
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.triton.gemm import Product, Tiling, layout_of
from qgalore_compile.kernels.triton.printer import power_of_two
from qgalore_compile.kernels.triton.targets import Target

TOKENS = 4096
"""Rows of a batch that a product's tiles are chosen for where the number is known only when the step runs."""

REGISTERS = 252
"""Of a thread, by the estimate, at most."""

REGION_ELEMENTS = 16
"""Elements of a region that a thread works on: 16 bytes of codes, which is one access."""

REGION_WARPS = 4
_MOST_WARPS = 16
WIDEST = 2 * REGION_ELEMENTS * _MOST_WARPS * 32
"""Columns of a group that a block of a region takes: twice as many elements a thread as elsewhere."""

_CLOCK = 1.7e9
_TENSOR_MEMORY = 512
"""Columns of a block on sm_100, of which two buffers of a product in three parts and one of its operands must fit."""
_LOADS = 54
"""Bytes a cycle that a multiprocessor gets from the L2 cache."""
_DECODING = 8
"""Instructions an element beside a program's own: 12 with the four of INT8 and INT4 groups (load, convert, scale,
shift), which were measured; the rest are address, widen, narrow, store."""
_OPERATION = 3
"""Instructions for one operation of an epilogue on an element."""
_LONG = {"div": 15, "random_bits": 30}
"""Of those that take more: a quotient to nearest; an eighth of what Philox takes for eight draws."""
_BARRIER = {1: 1650, 2: 1100, 3: 650, 4: 550}
"""Cycles."""
_OVERLAP = 0.34


class NoTilingError(ValueError):
    """No tile of a product fits the chip."""


class Block(NamedTuple):
    """What a block of a region works on: ``rows`` groups, by so many warps."""

    rows: int
    warps: int


def region_blocks(program: BlockProgram) -> list[Block]:
    """Blocks for a region, the best one first: 16 elements a thread, twice as many of the widest groups; then ever
    fewer.

    Raises:
        NoTilingError: one group is too wide for a block.
    """
    width = power_of_two(program.space.width)
    if width > WIDEST:
        raise NoTilingError(
            f"groups of {program.space.width} columns are too wide for a block of a region, which takes {WIDEST}; "
            "choose a smaller group size"
        )
    warps = min(_MOST_WARPS, max(REGION_WARPS, width // (32 * REGION_ELEMENTS)))
    found = [Block(max(1, REGION_ELEMENTS * warps * 32 // width), warps)]
    while found[-1].rows > 1:
        found.append(Block(found[-1].rows // 2, warps))
    while found[-1].warps < _MOST_WARPS:
        found.append(Block(1, 2 * found[-1].warps))
    return found


def tilings(product: Product, target: Target) -> list[Tiling]:
    """Tilings that fit by the model, the fastest first.

    Raises:
        NoTilingError: none fits, or none can decode an operand.
    """
    if product.decodes_groups:
        raise NoTilingError(f"no tile of a product of {product.sizes} takes the whole groups that an operand needs")
    fitting = _fitting(str(product.program), product[1:], target)
    if not fitting:
        raise NoTilingError(
            f"no tile of a product of {product.sizes} fits {target.name}: groups of {product.width} columns are too "
            f"wide; choose a smaller group size"
        )
    return list(fitting)


@lru_cache(maxsize=1024)
def _fitting(text: str, known: tuple[Any, ...], target: Target) -> tuple[Tiling, ...]:
    """Of a product's text and what is known of its operands, once a process: whether there is a kernel, which it is,
    and whether operands are decoded before it, all ask for a look at some hundred tiles, which takes 20 ms."""
    product = Product(parsed(text), *known)
    fitting = [each for each in _candidates(product, target) if _in_registers(product, each, target)
               and shared(product, each) <= target.shared_per_block]  # fmt: skip
    return tuple(sorted(fitting, key=lambda each: (seconds(product, each, target), each)))


def tiling(product: Product, target: Target) -> Tiling:
    """The fastest tiling by the model, in the bands that read least; NoTilingError where none fits."""
    return in_bands(product, tilings(product, target)[0], target)


def in_bands(product: Product, chosen: Tiling, target: Target) -> Tiling:
    """A tiling walked in the bands that read least from memory."""
    return _in_bands(str(product.program), product[1:], chosen, target)


@lru_cache(maxsize=1024)
def _in_bands(text: str, known: tuple[Any, ...], chosen: Tiling, target: Target) -> Tiling:
    product = Product(parsed(text), *known)
    down, _ = grid(product, chosen, *grid_sizes(product))
    bands = [chosen._replace(band=band) for band in (8, 16, 32, 64, down)]
    return min(bands, key=lambda each: round(traffic(product, each, target).dram))


def _in_registers(product: Product, tiling: Tiling, target: Target) -> bool:
    """Whether a thread keeps all its values in registers, and the tensor cores theirs in their memory."""
    wanted = registers(product, tiling, target)
    own = tiling.m * tiling.n // (tiling.warps * target.warp_size)
    if own > 64 and product.program.epilogue and _in_shared(target, tiling):
        return False
    if wanted > target.registers_per_multiprocessor // (tiling.warps * target.warp_size):
        return False
    # where a few more than 128 are needed, ptxas takes 128, for one more block, and spills those that are missing
    if product.program.epilogue is None:
        crowded = (90, 152) if tiling.warps == 8 else (150, 180)
    else:
        crowded = (170, 180) if product.memory == "f32" else (0, 0)
    if not _in_shared(target, tiling) and crowded[0] < wanted < crowded[1]:
        return False
    if product.precision == "tf32x3" and tiling.m >= 64 and 2 * tiling.n + tiling.k > _TENSOR_MEMORY:
        return False
    return wanted <= REGISTERS


def _in_shared(target: Target, tiling: Tiling) -> bool:
    """Whether the tensor cores read operands from shared memory rather than from registers."""
    return target.name in ("sm_90", "sm_100") and tiling.m >= 64


def _candidates(product: Product, target: Target) -> Iterator[Tiling]:
    width = product.width
    exact = product.exact
    if width is None:
        columns = [32, 64] if exact else [64, 128, 256]
    elif width != power_of_two(width) or width >= 128:
        columns = [max(16, power_of_two(width))]
    else:
        columns = [each for each in (16, 32, 64, 128) if each % width == 0]
    depths = [16] if exact else [16, 32, 64]
    # below 64 rows the tensor cores of sm_90 idle, and on older chips every warp holds all of a decoded left operand:
    # 32 x 256 spills on sm_80.  An epilogue on wide groups may leave no choice.
    short = product.program.epilogue is not None or (product.sizes[0] or TOKENS) < 64
    rows = [16, 32, 64, 128] if short else [64, 128, 256]
    for m, n, k, warps, stages in combinations(rows, columns, depths, [4, 8, 16], [1, 2, 3, 4]):
        found = Tiling(m, n, k, warps, stages)
        if (m == 256 or warps == 16) and (exact or target.name != "sm_90"):
            continue  # where neither has been tried; 16 warps spill on sm_100
        # 64 float32 numbers of both operands are more than a thread can hold beside its sums, and of operands in two
        # parts more than fits the tensor memory of sm_100
        whole = product.precision != "tf32x3" and _in_shared(target, found)
        if k < 64 or product.memory != "f32" or whole:
            yield found


def registers(product: Product, tiling: Tiling, target: Target) -> float:
    """Estimate of a thread's registers; of several products all but one are sums that wait for the epilogue."""
    own = tiling.m * tiling.n / (tiling.warps * target.warp_size)
    return max(_registers(part, tiling, target) for part in product.parts) + own * len(product.further)


def _registers(product: Product, tiling: Tiling, target: Target) -> float:
    size = MEMORY[product.memory].bytes
    own = tiling.m * tiling.n / (tiling.warps * target.warp_size)
    if product.exact:  # no tensor cores: a thread holds k of each operand
        return 24 + own * (3.3 if product.program.epilogue else 1) + 2 * math.sqrt(own) * tiling.k
    sides = zip((tiling.m, tiling.n), _operands(product), _warps(tiling, target), strict=True)
    decoded = sum(tiling.k * side / (target.warp_size * warps) for side, operand, warps in sides if operand.prologue)
    m, n = grid_sizes(product)
    masked = target.backend == "cuda" and bool(m % tiling.m or n % tiling.n)
    part = decoded * size / 4 * (2 if product.precision == "tf32x3" else 1)
    loop = 28 + own * 1.5 + part / 4 if _in_shared(target, tiling) else 40 + own * 1.5 + part
    epilogue = product.program.epilogue
    if epilogue is None:
        return loop + 30 * (masked or product.sizes[2] % tiling.k != 0)  # what is outside is kept
    factor = 1.68
    if _in_shared(target, tiling):
        factor = 1.35 if target.name == "sm_90" else 2.7
    if masked:
        factor = 3.3
    if any(epilogue.buffer(name).memory in PACKED for name, _ in epilogue.stores):
        factor = max(factor, 4.0)  # neighbours change places between threads: 193 for 32 sums of e2m1 in groups of 32
    if epilogue.space.columns % 16:  # rows that begin anywhere: a byte at a time, each with an address of its own
        factor = 6.6
    return max(loop, 40 + own * factor)


def _warps(tiling: Tiling, target: Target) -> tuple[int, int]:
    """Among how many warps a decoded operand's rows, or columns, are shared out.  Where the tensor cores take operands
    from registers, each warp holds all that its part of the tile needs; where they take them from shared memory, all
    warps decode a part each."""
    if _in_shared(target, tiling):
        return tiling.warps, tiling.warps
    down = across = 1
    while down * across < tiling.warps:  # as Triton does, by tiles of 16 x 16
        if tiling.m / down >= tiling.n / across:
            down *= 2
        else:
            across *= 2
    return down, across


def shared(product: Product, tiling: Tiling) -> float:
    """Estimate of a block's shared memory in bytes: operands of each stage as they are loaded, decoded ones once, and a
    tile that changes its layout."""
    return max(_shared(part, tiling) for part in product.parts)


def _shared(product: Product, tiling: Tiling) -> float:
    size = MEMORY[product.memory].bytes
    loaded = decoded = 0.0
    for side, operand, kept in zip((tiling.m, tiling.n), _operands(product), (0, 1), strict=True):
        loaded += tiling.k * side * element_bytes(product, operand, loaded=True)
        if operand.prologue:
            columns = side if kept != operand.transposed else tiling.k
            if layout_of(operand.prologue, columns) == "free":  # a group's value is loaded for each element
                loaded += 4 * tiling.k * side * sum(each.extent == "group" for each in operand.prologue.buffers)
        if product.precision == "tf32x3":
            decoded += 2 * tiling.k * side * size
        elif operand.prologue:
            decoded += tiling.k * side * size
    return max(tiling.stages * loaded + decoded, 2.0 * tiling.m * tiling.n)


def seconds(product: Product, tiling: Tiling, target: Target) -> float:
    """Estimate of a kernel's time."""
    loops = [_loop_cycles(part, tiling, target) for part in product.parts]
    products, decoded = (math.fsum(loop[at] for loop in loops) for at in (0, 1))
    k = sum(loop[2] for loop in loops)
    parts = [products, decoded, _epilogue_cycles(product, tiling)]
    held = target.occupancy(
        min(255, int(registers(product, tiling, target))), int(shared(product, tiling)), tiling.warps
    ).blocks
    if held == 0:
        return math.inf
    cycles = sum(parts) - (_OVERLAP * (sum(parts) - max(parts)) if held > 1 else 0)
    # one block alone does not overlap its loads and its arithmetic, whatever its stages
    alone = 1.3 if held * tiling.warps < 8 else 1.0
    waves = max(1.0, math.prod(grid(product, tiling, *grid_sizes(product))) / (target.multiprocessors * held))
    return waves * (held * cycles * alone + k / tiling.k * _BARRIER[tiling.stages]) / _CLOCK


def _loop_cycles(product: Product, tiling: Tiling, target: Target) -> tuple[float, float, int]:
    """Of one product's tile: cycles of its multiply-adds or loads, of decoding, and its k in whole steps."""
    k = -(-product.sizes[2] // tiling.k) * tiling.k
    size = MEMORY[product.memory].bytes
    bytes_in = sum(k * side * element_bytes(product, operand, loaded=True)
                   for side, operand in zip((tiling.m, tiling.n), _operands(product), strict=True))  # fmt: skip
    products = max(
        2.0 * tiling.m * tiling.n * k / (peak(product, target) / target.multiprocessors / _CLOCK),
        k * (tiling.m + tiling.n) * size / 128,
        bytes_in / _LOADS,
    )
    sides = zip((tiling.m, tiling.n), _operands(product), strict=True)
    decoded = sum(k * side * decoding(operand.prologue) for side, operand in sides if operand.prologue)
    return products, decoded / 128, k


def decoding(prologue: BlockProgram) -> int:
    """Instructions that decode an element: of a table of 16 entries more than twice as many as of INT8 groups."""
    return _DECODING + sum(each.extent == "element" for each in prologue.instructions)


def _epilogue_cycles(product: Product, tiling: Tiling) -> float:
    """What follows a tile's product: its instructions, or its bytes where those take longer."""
    epilogue, own = product.program.epilogue, tiling.m * tiling.n
    operations = [each for each in epilogue.instructions if each.extent == "element"] if epilogue else []
    instructions = sum(_LONG.get(each.operation, _OPERATION) for each in operations)
    return max(own * instructions / 128, _epilogue_bytes(product, tiling) / _LOADS)


def peak(product: Product, target: Target) -> float:
    """Operations a second that a chip can do of a product's kind."""
    if product.exact:
        return target.fp32_flops
    if product.memory != "f32":
        return target.bf16_flops
    return target.tf32_flops / (3 if product.precision == "tf32x3" else 1)


def grid_sizes(product: Product) -> tuple[int, int]:
    """Rows and columns of a product, as far as they are known; ``TOKENS`` else."""
    m, n, _ = product.sizes
    return m or TOKENS, n or TOKENS


def grid(product: Product, tiling: Tiling, m: int, n: int) -> tuple[int, int]:
    """Tiles down and across."""
    return -(-m // tiling.m), -(-n // product.step(tiling.n))


def _operands(product: Product) -> tuple[Operand, Operand]:
    return product.program.left, product.program.right


def element_bytes(product: Product, operand: Operand, *, loaded: bool = False) -> float:
    """Bytes in memory of an operand's element, scales and offsets included; ``loaded``: those that a tile asks for,
    which of two nibbles in a byte is the byte for each."""
    if operand.prologue is None:
        return MEMORY[product.memory].bytes
    found = operand_bytes(product, operand, 0, 0) / math.prod(operand.prologue.space[:2])
    return found + loaded * sum(
        1 - MEMORY[each.memory].bytes for each in operand.prologue.buffers if MEMORY[each.memory].bits < 8
    )


def operand_bytes(product: Product, operand: Operand, rows: int, columns: int) -> float:
    """Bytes in memory of an operand; one that is decoded has a size of its own."""
    if operand.prologue is None:
        return rows * columns * MEMORY[product.memory].bytes
    return sum(operand.prologue.bytes_of(each) for each in operand.prologue.buffers if each.access == "in")


def _epilogue_bytes(product: Product, tiling: Tiling) -> float:
    """Bytes that a tile's epilogue reads and writes."""
    epilogue = product.program.epilogue
    if epilogue is None:
        return tiling.m * tiling.n * MEMORY[product.memory].bytes
    given = sum(epilogue.bytes_of(epilogue.buffer(name)) for _, _, name in product.program.products)
    own = epilogue.bytes() - given
    return own * tiling.m * tiling.n / math.prod(epilogue.space[:2])


class Traffic(NamedTuple):
    """Bytes of one launch.

    Attributes:
        least: each operand and each of the epilogue's buffers once in each direction that it is used in.
        issued: what the tiles' loads and stores ask for.
        dram: what of that passes the L2 cache.
        wave: of operands, what the tiles that run at a time hold.
    """

    least: float
    issued: float
    dram: float
    wave: float


def traffic(product: Product, tiling: Tiling, target: Target, held: int = 1) -> Traffic:
    """Bytes by a model of the L2 cache: panels of operands (a tile's rows or columns, all of k) in least recently used
    order, tiles in waves of ``held`` a multiprocessor; what the epilogue touches is touched once and passes through.
    """
    m, n = grid_sizes(product)
    down, across = grid(product, tiling, m, n)
    lengths = {"m": tiling.m, "n": product.step(tiling.n)}
    parts = [(part, part.sizes[2], dict(zip("mn", _operands(part), strict=True))) for part in product.parts]
    panel = {side: sum(length * k * element_bytes(part, sides[side]) for part, k, sides in parts)
             for side, length in lengths.items()}  # fmt: skip
    operands = sum(operand_bytes(part, sides[side], k, size) for part, k, sides in parts
                   for side, size in (("m", m), ("n", n)))  # fmt: skip
    own = _epilogue_bytes(product, tiling) * m * n / (tiling.m * tiling.n)
    cache: OrderedDict[tuple[str, int], float] = OrderedDict()
    loaded = widest = 0.0
    wave = target.multiprocessors * held
    for first in range(0, down * across, wave):
        places = [place(tile, down, across, tiling.band) for tile in range(first, min(first + wave, down * across))]
        wanted = dict.fromkeys([("m", row) for row, _ in places] + [("n", column) for _, column in places])
        widest = max(widest, sum(panel[side] for side, _ in wanted))
        for each in wanted:
            if each not in cache:
                loaded += panel[each[0]]
                cache[each] = panel[each[0]]
            cache.move_to_end(each)
        while sum(cache.values()) > target.l2_bytes and len(cache) > 1:
            cache.popitem(last=False)
    asked = sum(k * length * element_bytes(part, sides[side], loaded=True) for part, k, sides in parts
                for side, length in lengths.items())  # fmt: skip
    issued = down * across * asked + own
    return Traffic(operands + own, issued, loaded + own, widest)


def place(tile: int, down: int, across: int, band: int) -> tuple[int, int]:
    """(row, column) of the tile that an instance of a kernel computes; as ``gemm_triton`` spells it."""
    first = tile // (band * across) * band
    rows = min(down - first, band)
    within = tile % (band * across)
    return first + within % rows, within // rows
