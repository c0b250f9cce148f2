"""A :class:`GemmProgram` as one Triton kernel: operands decoded as tiles are loaded, the epilogue run on the tile that
the product left in registers.

A program instance computes one tile of the product, or of several products of the same rows and columns, whose sums it
keeps beside one another.  Where the epilogue reduces over groups, or writes one value for
each, a tile takes whole groups, so that a weight's write-back needs one pass over it.  The product goes to the epilogue
in float32, not rounded to the operands' type.

Instances walk the tiles in bands of rows, so that those that run at a time share operands in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qgalore_compile.kernels.ir.gemm import VALUE, GemmProgram, Operand
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import DYNAMIC8, OF_GROUPS, REDUCTIONS, BlockProgram
from qgalore_compile.kernels.triton.printer import Body, Tile, module, power_of_two, signature


class Matrix(NamedTuple):
    """A tensor in memory: its format and its strides in elements, both known before the step runs."""

    memory: str
    strides: tuple[int, int]


class Tiling(NamedTuple):
    """How a product is cut: tiles of m × n that take k at a time, ``band`` rows of tiles that are walked together."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    band: int = 8


class Further(NamedTuple):
    """What is known of a further product: its operands' tensors, where they are not decoded, and its k."""

    left: Matrix | None
    right: Matrix | None
    k: int


class Product(NamedTuple):
    """A product whose sizes and memory are known.

    Attributes:
        program: what to compute.
        left, right: the tensors of operands that are not decoded.
        sizes: (m, n, k); m or n None where they are known only when the step runs.
        memory: format of the operands.
        precision: of products of float32 numbers: "ieee"; "tf32" for the tensor cores' 10 bits; "tf32x3" for three such
            products, whose error is about that of float32.
        further: of the program's further products.
    """

    program: GemmProgram
    left: Matrix | None
    right: Matrix | None
    sizes: tuple[int | None, int | None, int]
    memory: str
    precision: str = "ieee"
    further: tuple[Further, ...] = ()

    @property
    def parts(self) -> tuple[Product, ...]:
        """Each of the products by itself, with the epilogue that reads all of them."""
        if not self.program.further:
            return (self,)
        m, n, _ = self.sizes
        known = (Further(self.left, self.right, self.sizes[2]), *self.further)
        return tuple(
            Product(GemmProgram(left, right, self.program.epilogue, name), each.left, each.right, (m, n, each.k),
                    self.memory, self.precision)
            for (left, right, name), each in zip(self.program.products, known, strict=True)
        )  # fmt: skip

    @property
    def width(self) -> int | None:
        """Columns that a tile must take whole multiples of; None where any number will do."""
        program = self.program.epilogue
        if program is None or not needs_groups(program):
            return None
        return program.space.width

    def step(self, n: int) -> int:
        """Columns from one tile of ``n`` columns to the next: fewer than it has where a group fills no tile."""
        width = self.width
        return n if width is None or n % width == 0 else width

    @property
    def decodes_groups(self) -> bool:
        """Whether an operand is decoded a whole group at a time, as one that is rotated back: a tile of it takes k in
        parts, so there is none, and it is to be decoded before (``decode_first.py``)."""
        prologues = (each.prologue for left, right, _ in self.program.products for each in (left, right))
        return any(each is not None and needs_groups(each) for each in prologues)

    @property
    def exact(self) -> bool:
        """Whether it is computed without tensor cores."""
        return self.memory == "f32" and self.precision == "ieee"

    def signature(self) -> dict[str, str]:
        """The kernel's arguments in order and Triton's types of them."""
        program, pointer, found = self.program, f"*{MEMORY[self.memory].pointer}", dict[str, str]()
        for index, (left, right, _) in enumerate(program.products):
            for (prefix, name), operand in zip(names_of(index), (left, right), strict=True):
                found |= {name: pointer} if operand.prologue is None else signature(operand.prologue, prefix, VALUE)
        leave = [name for _, _, name in program.products]
        found |= signature(program.epilogue, "e_", *leave) if program.epilogue else {"product": pointer}
        return found | {name: "i32" for name, size in zip("mn", self.sizes[:2], strict=True) if size is None}


def names_of(index: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """(the prefix of a decoded operand's arguments, the argument of one that is not) of the left operand and of the
    right one, of the first product or a further one."""
    at = str(index or "")
    return (f"l{at}_", f"left{at}"), (f"r{at}_", f"right{at}")


def needs_groups(program: BlockProgram) -> bool:
    """Whether a program is to be run on whole groups."""
    stores = any(program.buffer(name).extent == "group" for name, _ in program.stores)
    return stores or any(each.operation in REDUCTIONS | OF_GROUPS - DYNAMIC8 for each in program.instructions)


def layout_of(program: BlockProgram, step: int) -> str:
    """The layout (see ``triton_printer``) of tiles that begin at multiples of ``step`` columns."""
    width = program.space.width
    if program.space.groups == 1 or width % step == 0:
        return "part"  # of a group, which may not fill the tile
    return "groups" if step % width == 0 and width == power_of_two(width) else "free"


def print_gemm(product: Product, tiling: Tiling, name: str = "gemm") -> str:
    """The kernel of a product on a grid of one dimension, one instance a tile."""
    function = "\n".join([*_Kernel(product, tiling).lines(name), ""])
    return module(product.program.pretty(), _programs(product.program), function)


def _programs(program: GemmProgram) -> list[BlockProgram]:
    prologues = [each.prologue for left, right, _ in program.products for each in (left, right)]
    return [each for each in (*prologues, program.epilogue) if each]


class _Kernel:
    def __init__(self, product: Product, tiling: Tiling) -> None:
        self.product, self.program, self.tiling = product, product.program, tiling
        self.kind = MEMORY[product.memory].triton

    def lines(self, name: str) -> Iterator[str]:
        tiling = self.tiling
        step = self.product.step(tiling.n)
        m, n = (size or each for size, each in zip(self.product.sizes, "mn", strict=False))
        yield "@triton.jit"
        yield f"def {name}({', '.join(self.product.signature())}):"
        yield "    tile = tl.program_id(0)"
        yield f"    tiles_m = ({m} + {tiling.m - 1}) // {tiling.m}"
        yield f"    tiles_n = ({n} + {step - 1}) // {step}"
        yield f"    band = tile // ({tiling.band} * tiles_n) * {tiling.band}"
        yield f"    rows = tl.minimum(tiles_m - band, {tiling.band})"
        yield f"    at = tile % ({tiling.band} * tiles_n)"
        yield f"    first_m = (band + at % rows) * {tiling.m}"
        yield f"    first_n = at // rows * {step}"
        yield f"    at_m = first_m + tl.arange(0, {tiling.m})"
        yield f"    at_n = first_n + tl.arange(0, {tiling.n})"
        masked_m = not isinstance(m, int) or m % tiling.m != 0
        masked_n = not isinstance(n, int) or n % tiling.n != 0 or step != tiling.n
        if masked_m:
            yield f"    in_m = at_m < {m}"
        if masked_n:
            group = f" & (tl.arange(0, {tiling.n}) < {step})" if step != tiling.n else ""
            yield f"    in_n = (at_n < {n}){group}"
        masks = {"m": "in_m" if masked_m else None, "n": "in_n" if masked_n else None, "k": None}
        for index, part in enumerate(self.product.parts):
            yield from self._sum(f"acc{index or ''}", index, part, masks)
        inside = _both([masks["m"], masks["n"]])
        if self.program.epilogue is None:
            row = "at_m" if isinstance(n, int) and _fit(self.product.sizes[:2], (n, 1)) else "at_m.to(tl.int64)"
            yield f"    there = product + ({row}[:, None] * {n} + at_n[None, :])"
            yield f"    tl.store(there, acc.to({self.kind}){inside and f', mask={inside}'})"
        else:
            yield from self._epilogue(self.program.epilogue, masks, inside)

    def _sum(self, acc: str, index: int, part: Product, masks: dict[str, str | None]) -> Iterator[str]:
        """A tile of one of the products, in float32."""
        tiling, k = self.tiling, part.sizes[2]
        yield f"    {acc} = tl.full(({tiling.m}, {tiling.n}), 0.0, tl.float32)"
        yield f"    for first_k in range(0, {k}, {tiling.k}):"
        yield f"        at_k = first_k + tl.arange(0, {tiling.k})"
        masks["k"] = "in_k" if k % tiling.k else None
        if masks["k"]:
            yield f"        in_k = at_k < {k}"
        left, right = names_of(index)
        yield from self._operand("left", *left, part, part.program.left, part.left, ("m", "k"), masks)
        yield from self._operand("right", *right, part, part.program.right, part.right, ("k", "n"), masks)
        precision = f', input_precision="{part.precision}"' if part.memory == "f32" else ""
        yield f"        {acc} = tl.dot(a_left, a_right, {acc}{precision})"

    def _operand(
        self, name: str, prefix: str, argument: str, part: Product, operand: Operand, matrix: Matrix | None,
        dims: tuple[str, str], masks: dict[str, str | None],
    ) -> Iterator[str]:  # fmt: skip
        """A tile of an operand, ``a_left`` or ``a_right``."""
        inside = _both([masks[dim] for dim in dims])
        if operand.prologue is None:
            assert matrix is not None
            strides = matrix.strides[::-1] if operand.transposed else matrix.strides
            rows, columns = (f"at_{dim}" for dim in dims)
            sizes = [part.sizes["mnk".index(dim)] for dim in dims]
            if not _fit(sizes, strides):
                rows, columns = (rows, f"{columns}.to(tl.int64)") if strides[0] < strides[1] else (
                    f"{rows}.to(tl.int64)", columns)  # fmt: skip
            place = f"{rows}[:, None] * {strides[0]} + {columns}[None, :] * {strides[1]}"
            yield f"        a_{name} = tl.load({argument} + ({place}){inside and f', mask={inside}, other=0'})"
            return
        row, column = dims[::-1] if operand.transposed else dims
        size = (getattr(self.tiling, row), getattr(self.tiling, column))
        body = Body(operand.prologue, self._tile(part, operand.prologue, size, row, column, masks), prefix)
        yield from (f"        {line}" for line in body.values())
        value = f"({body.result(VALUE)}).to({self.kind})"
        if body.tile.layout == "groups":
            value = f"{value}.reshape({size})"
        if operand.transposed:
            value = f"{value}.trans()"
        # what is decoded of codes and scales that are not there need not be zero
        yield f"        a_{name} = {f'tl.where({inside}, {value}, 0.0)' if inside and masks['k'] else value}"

    def _tile(
        self, part: Product, program: BlockProgram, size: tuple[int, int], row: str, column: str,
        masks: dict[str, str | None],
    ) -> Tile:  # fmt: skip
        """The tile of a program over rows and columns of the product's dimensions ``row`` and ``column``."""
        width, (rows, columns) = program.space.width, size
        step = self.product.step(columns) if column == "n" else columns
        found = {"row": masks[row], "column": masks[column], "element": _both([masks[row], masks[column]]) or None}
        first = f"first_{column}"
        layout = layout_of(program, step)
        shape: tuple[int, ...] = size
        if layout == "part":
            found["group"] = masks[row]
            group, at = f"({first} // {width})", f"at_{column}"
        elif layout == "groups":
            groups = columns // width
            shape = (rows, groups, width)
            group = f"({first} // {width} + tl.arange(0, {groups}))[None, :]"
            at = f"({first} + tl.arange(0, {columns})).reshape({groups}, {width})"
            found = {"row": masks[row]}
            if masks[column]:
                found["column"] = f"({at} < {part.sizes['mnk'.index(column)] or column})"
            row_mask = masks[row]
            by_row = f"{row_mask}[:, None]" if row_mask else None
            by_group = f"({group} < {program.space.groups})" if masks[column] else None
            found["group"] = " & ".join(filter(None, [by_row, by_group])) or None
            parts = [f"{row_mask}[:, None, None]" if row_mask else None,
                     f"{found['column']}[None, :, :]" if masks[column] else None]  # fmt: skip
            found["element"] = " & ".join(filter(None, parts)) or None
        else:
            found["group"] = found["element"]
            at = f"at_{column}"
            group = f"(at_{column} // {width})[None, :]"
        aligned = first if step % 8 == 0 else None
        return Tile(layout, f"at_{row}", at, group, {k: v for k, v in found.items() if v}, aligned, step, shape)

    def _epilogue(self, program: BlockProgram, masks: dict[str, str | None], inside: str) -> Iterator[str]:
        tile = self._tile(self.product, program, (self.tiling.m, self.tiling.n), "m", "n", masks)
        sums = {name: f"acc{index or ''}" for index, (_, _, name) in enumerate(self.program.products)}
        if tile.layout == "groups":
            sums = {name: f"{acc}.reshape({tile.shape})" for name, acc in sums.items()}
        body = Body(program, tile, "e_", sums)
        yield from (f"    {line}" for line in [*body.values(), *body.stores()])


def _fit(sizes: Sequence[int | None], strides: Sequence[int]) -> bool:
    """Whether 32 bits hold every offset into a matrix, for sure."""
    if any(size is None and stride > 1 for size, stride in zip(sizes, strides, strict=True)):
        return False
    return sum(((size or 1) - 1) * stride for size, stride in zip(sizes, strides, strict=True)) < 1 << 31


def _both(masks: list[str | None]) -> str:
    """The mask of a tile from those of its rows and its columns."""
    rows, columns = masks
    return " & ".join([f"{rows}[:, None]"] * bool(rows) + [f"{columns}[None, :]"] * bool(columns))
