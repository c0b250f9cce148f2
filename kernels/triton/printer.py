"""A :class:`BlockProgram` as Triton, on one tile at a time.

A *tile* is what one program instance works on.  Values have the extents of the program, in these shapes:

========  ===============  ==================  ===================  ==============
layout    row              group               column               element
========  ===============  ==================  ===================  ==============
"tasks"   (R,)             (R,)                (R, C)               (R, C)
"part"    (R,)             (R,)                (C,)                 (R, C)
"groups"  (R,)             (R, K)              (K, W)               (R, K, W)
"free"    (R,)             (R, C)              (C,)                 (R, C)
========  ===============  ==================  ===================  ==============

"tasks": every row of the tile is one group, of whichever row of the space.  "part": the tile lies within one group of
columns.  "groups": it takes K whole groups of W columns.  "free": it lies anywhere, so a group's value is loaded once
for each of its elements, and nothing can be reduced.

The arithmetic is float32 with divisions and roots to nearest; no function of a device library, which the interpreter
would not run.  The sign of a zero may be lost where it is a constant's or what a fraction is rounded to.

All loads stand before all stores, and no tile reads what another one writes, so an output may be the storage of an
input.  Random bits depend on row and column alone, not on how the space is tiled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qgalore_compile.kernels.ir.dynamic8 import expanded
from qgalore_compile.kernels.ir.memory import MEMORY, PACKED
from qgalore_compile.kernels.ir.program import REDUCTIONS, BlockProgram, Buffer, Instruction, number_of
from qgalore_compile.kernels.triton.spelling import (
    HELPERS,
    IN_F64,
    NEEDS,
    PARAMETERS,
    SPELLING,
    SPREAD,
    TRITON_TYPES,
)


class Tile(NamedTuple):
    """Where a program's values lie, in names of the kernel's variables; see the module's docstring for shapes.

    Attributes:
        layout: "tasks", "part", "groups" or "free".
        row, column, group: indices, in the shapes of those extents.
        masks: by extent, a variable that is false where a value of it lies outside; an extent that has none is whole.
        first: the tile's first column, a multiple of 8; for "tasks" (R,).  None where it may be any column.
        step: columns from one tile to the next, which all tiles of a row begin at multiples of.
        shape: of elements.
    """

    layout: str
    row: str
    column: str
    group: str
    masks: dict[str, str]
    first: str | None
    step: int
    shape: tuple[int, ...]


def helpers(programs: list[BlockProgram]) -> Iterator[str]:
    """The functions that the kernels of some programs call."""
    wanted: dict[str, None] = {}
    for program in programs:
        for each in expanded(program).instructions:
            needs = NEEDS.get(each.operation, ())
            if each.type == "f64" and needs:
                needs = ("_quotient", *(f"{name}_f64" for name in needs))
            wanted.update(dict.fromkeys(needs))
    for name in wanted:
        yield f"@triton.jit\ndef {name}({PARAMETERS.get(name, 'a, b')}):\n{HELPERS[name]}\n"


class Body:
    """Prints what a program does on a tile.

    Args:
        program: what to print.
        tile: where.
        prefix: of the names of its variables and arguments.
        given: buffers whose value a variable holds already, in float32 and in the shape of elements.
    """

    def __init__(
        self, program: BlockProgram, tile: Tile, prefix: str = "", given: Mapping[str, str] | None = None
    ) -> None:
        self.program, self.tile, self.prefix, self.given = expanded(program), tile, prefix, given or {}

    def values(self) -> Iterator[str]:
        """Loads and arithmetic."""
        for number, each in enumerate(self.program.instructions):
            if each.operation == "random_bits":
                yield from self._draws(number, each)
            elif each.operation == "lookup":
                yield from self._look_up(number, each)
            elif each.operation == "rotate":
                yield from self._rotation(number, each)
            else:
                yield f"{self.name(number)} = {self._expression(each)}"

    def stores(self) -> Iterator[str]:
        """Stores."""
        for name, value in self.program.stores:
            buffer = self.program.buffer(name)
            value, changes = self._changed(buffer, value)
            if buffer.memory in PACKED:
                yield from self._packed(buffer, value, changes)
                continue
            stored = self._spread(value, buffer.extent)
            if buffer.memory not in ("f32", "i32", "bool"):
                stored = f"({stored}).to({MEMORY[buffer.memory].triton})"
            mask = " & ".join(filter(None, [changes, self._mask(buffer.extent)]))
            yield f"tl.store({self._pointer(name)}, {stored}{mask and f', mask={mask}'})"

    def _changed(self, buffer: Buffer, value: int) -> tuple[int, str]:
        """(what a buffer is given, where): what is to stay is not written, so that no thread keeps it until then."""
        found = self.program.instructions[value]
        if found.operation == "where" and buffer.access == "inout":
            changes, new, old = found.args
            last = self.program.instructions[old]
            if buffer.memory in PACKED and self.program.instructions[changes].extent != "scalar":
                return value, ""  # of neighbours in a byte one may change and another stay
            if last.operation == "load" and last.names == (buffer.name,):
                return new, self._spread(changes, buffer.extent)
        return value, ""

    def result(self, name: str) -> str:
        """The value that a buffer would be given, in the shape of elements."""
        value = next(value for buffer, value in self.program.stores if buffer == name)
        return self._spread(value, "element")

    def name(self, number: int) -> str:
        """The variable of an instruction's value."""
        return f"{self.prefix}v{number}"

    # -- one instruction --------------------------------------------------------------------------------------------

    def _expression(self, each: Instruction) -> str:
        if each.operation == "load":
            return self._load(each.names[0], each.type)
        if each.operation == "constant":
            return f"tl.full((), {_literal(each)}, {TRITON_TYPES[each.type]})"
        if each.operation in REDUCTIONS:
            return self._reduction(each)
        args = [self._spread(arg, each.extent) for arg in each.args]
        if each.operation in ("minimum", "maximum"):
            nan = ", propagate_nan=tl.PropagateNan.ALL" if each.type in ("f32", "f64") else ""
            return f"tl.{each.operation}({args[0]}, {args[1]}{nan})"
        if each.operation == "sign":
            return f"(({args[0]} > 0).to({TRITON_TYPES[each.type]}) - ({args[0]} < 0).to({TRITON_TYPES[each.type]}))"
        spelling = IN_F64 if each.type == "f64" and each.operation in IN_F64 else SPELLING
        return spelling[each.operation].format(*args)

    def _spread(self, number: int, extent: str) -> str:
        """A value in the shape of a larger extent."""
        own = self.program.instructions[number].extent
        if own in ("scalar", extent):
            return self.name(number)
        return self.name(number) + SPREAD[self.tile.layout][own, extent]

    def _reduction(self, each: Instruction) -> str:
        source, mask = self._spread(each.args[0], "element"), self.tile.masks.get("element")
        neutral = {"group_min": "float('inf')", "group_max": "-float('inf')", "group_sum": "0.0"}[each.operation]
        combine = {"group_min": "_least", "group_max": "_most", "group_sum": "_sum"}[each.operation]
        if mask:
            source = f"tl.where({mask}, {source}, {neutral})"
        return f"tl.reduce({source}, {len(self.tile.shape) - 1}, {combine})"

    def _load(self, name: str, kind: str) -> str:
        if name in self.given:
            return self.given[name]
        buffer = self.program.buffer(name)
        mask = self._mask(buffer.extent)
        loaded = f"tl.load({self._pointer(name)}{mask and f', mask={mask}, other=0'})"
        if buffer.memory == "u4":
            return f"(({loaded} >> {self._half()[1]}) & 15).to(tl.int32)"
        if buffer.memory in PACKED:
            memory = MEMORY[buffer.memory]
            lane = f"(({self._columns()}) & {memory.lanes - 1})"
            return f"(({loaded}.to(tl.int32) >> ({lane} * {memory.bits}).to(tl.int32)) & {(1 << memory.bits) - 1})"
        if kind == "bool":
            return f"({loaded} != 0)"
        return loaded if buffer.memory == kind else f"{loaded}.to({TRITON_TYPES[kind]})"

    def _mask(self, extent: str) -> str:
        return self.tile.masks.get(extent, "")

    def _pointer(self, name: str) -> str:
        buffer, tile, space = self.program.buffer(name), self.tile, self.program.space
        pointer = f"{self.prefix}{name}"
        if buffer.extent == "scalar":
            return pointer
        if buffer.extent == "row":
            return f"{pointer} + {tile.row}"
        if buffer.extent == "column":
            return f"{pointer} + {tile.column}"
        spread, row = SPREAD[tile.layout], self._row()
        if buffer.extent == "group":
            return f"{pointer} + ({row}{spread['row', 'group']} * {space.groups} + {tile.group})"
        columns, memory = self._columns(), MEMORY[buffer.memory]
        pitch = memory.pitch(space.columns)
        if buffer.memory == "u4":
            columns = f"({columns} - {self._half()[0]})"
        elif buffer.memory in PACKED:
            columns = f"({columns}) // {memory.lanes}"
        return f"{pointer} + ({row}{spread['row', 'element']} * {pitch} + {columns})"

    def _row(self) -> str:
        """Rows, in as many bits as offsets take."""
        space = self.program.space
        return f"{self.tile.row}.to(tl.int64)" if space.rows * space.columns >= 1 << 31 else self.tile.row

    def _columns(self) -> str:
        """Columns in the shape of elements."""
        return self.tile.column + SPREAD[self.tile.layout]["column", "element"]

    def _packed(self, buffer: Buffer, value: int, changes: str) -> Iterator[str]:
        """Store neighbours that share bytes: the last dimension is taken apart into them, one bit of the place after
        the other, lowest first.  ``changes`` is a scalar."""
        memory, shape, name = MEMORY[buffer.memory], self.tile.shape, f"{self.prefix}{buffer.name}"
        mask, codes = self._mask("element"), self._spread(value, "element")
        full = f"tl.full({shape}, 0, tl.int32)"
        taken = {"p": f"{full} + {f'tl.where({mask}, {codes}, 0)' if mask else codes}"}
        place = self._pointer(buffer.name).removeprefix(f"{name} + ")
        if self._together(memory.lanes):  # no place for each element, which a thread would hold
            row = self._row() + SPREAD[self.tile.layout]["row", "element"]
            pitch = memory.pitch(self.program.space.columns)
            yield f"{name}_at = {row} * {pitch} + {self._counters(shape, memory.lanes)}"
        else:
            taken["at"] = f"{full} + {place}"
        if mask:
            taken["in"] = f"{full} + ({mask}).to(tl.int32)"
        yield from (f"{name}_{each} = {made}" for each, made in taken.items())
        lanes, size, shift = memory.lanes, shape[-1], memory.bits
        while lanes > 1:
            size //= 2
            pairs = (*shape[:-1], size, 2)
            yield f"{name}_a, {name}_b = tl.split({name}_p.reshape({pairs}))"
            yield f"{name}_p = {name}_a | ({name}_b << {shift})"
            yield from (f"{name}_{each}, _ = tl.split({name}_{each}.reshape({pairs}))" for each in taken if each != "p")
            lanes, shift = lanes // 2, shift * 2
        stored = " & ".join(filter(None, [changes, mask and f"({name}_in != 0)"]))
        yield f"tl.store({name} + {name}_at, {name}_p.to(tl.uint8){stored and f', mask={stored}'})"

    def _rotation(self, number: int, each: Instruction) -> Iterator[str]:
        """Every whole group of the last dimension rotated; sums in the order of ``formats/rotation.py``."""
        space, shape, name = self.program.space, self.tile.shape, self.name(number)
        width, size = space.width, math.prod(shape)
        column, source = f"({self._columns()})", self._spread(each.args[0], "element")
        back = each.names == ("back",)
        yield f"{name}_s = _sign({column} % {width})"
        yield f"{name} = tl.full({shape}, 0.0, tl.float32) + {source if back else f'{source} * {name}_s'}"
        distance = 1
        while distance < width:
            lead = size // (2 * distance)
            pairs = f"{name}.reshape(({lead}, 2, {distance})).trans((0, 2, 1))"
            yield f"{name}_a, {name}_b = tl.split({pairs})"
            yield f"{name} = tl.join({name}_a + {name}_b, {name}_a - {name}_b).trans((0, 2, 1)).reshape({shape})"
            distance *= 2
        yield f"{name} = {name} * {_float(1 / math.sqrt(width))}" + (f" * {name}_s" if back else "")
        if space.columns % width:
            yield f"{name} = tl.where(({column} // {width} + 1) * {width} <= {space.columns}, {name}, {source})"

    def _half(self) -> tuple[str, str]:
        """(what a column's byte lies behind the column, by how much its nibble is shifted): low nibbles hold the first
        half of a row."""
        tile, half = self.tile, -(-self.program.space.columns // 2)
        column = self._columns()
        if tile.first is not None and half % tile.step == 0:  # the tile lies in one half
            column = tile.first + ("[:, None]" if tile.layout == "tasks" else "")
        return f"tl.where({column} < {half}, 0, {half})", f"tl.where({column} < {half}, 0, 4).to(tl.uint8)"

    # -- random bits and tables -------------------------------------------------------------------------------------

    def _draws(self, number: int, each: Instruction) -> Iterator[str]:
        seed, param = (f"{self.prefix}{name}" for name in each.names)
        tile, name, shape = self.tile, self.name(number), self.tile.shape
        spread = SPREAD[tile.layout]
        row = tile.row + spread["row", "element"]
        together = self._together(8)
        yield f"{name}_seed = tl.full((), 0, tl.int64) + {seed}"  # an argument equal to 1 is no tensor
        counter = self._counters(shape, 8) if together else f"{tile.column}{spread['column', 'element']} // 8"
        size = (*shape[:-1], shape[-1] // 8) if together else shape
        zero = f"tl.full({size}, 0, tl.uint32)"
        yield f"{name}_step = {self._spread(each.args[0], 'scalar')}.to(tl.int64).to(tl.uint32)"
        words = ", ".join(f"{name}_w{word}" for word in range(4))
        yield (
            f"{words} = _philox({zero} + ({counter}).to(tl.uint32), {zero} + ({row}).to(tl.uint32), "
            f"{zero} + {name}_step, {zero} + tl.load({param}).to(tl.uint32), "
            f"{name}_seed.to(tl.uint32), ({name}_seed >> 32).to(tl.uint32))"
        )
        w0, w1, w2, w3 = words.split(", ")
        if together:
            even = f"tl.join({w0}, {w2})"  # words 0 2 and 1 3 interleave to 0 1 2 3, a word's halves then to draws
            yield f"{name}_w = tl.join({even}, tl.join({w1}, {w3}))"
            yield f"{name} = tl.join({name}_w & 0xFFFF, {name}_w >> 16).reshape({shape}).to(tl.int32)"
            return
        column = f"({tile.column}{spread['column', 'element']})"
        low, high = (f"tl.where(({column} & 2) != 0, {b}, {a})" for a, b in ((w0, w1), (w2, w3)))
        yield f"{name}_w = tl.where(({column} & 4) != 0, {high}, {low})"
        yield f"{name} = (({name}_w >> (({column} & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)"

    def _together(self, count: int) -> bool:
        """Whether so many neighbours, from a multiple of that many columns on, are the tile's all or none."""
        return self.tile.first is not None and self.tile.shape[-1] % count == 0

    def _counters(self, shape: tuple[int, ...], count: int) -> str:
        """Numbers of so many neighbours each."""
        first, last = self.tile.first, f"tl.arange(0, {shape[-1] // count})"
        if self.tile.layout == "groups":
            groups = f"tl.arange(0, {shape[1]}) * {shape[2] // count}"
            return f"({first} // {count} + {groups})[None, :, None] + {last}[None, None, :]"
        return f"({first} // {count}){'[:, None]' if self.tile.layout == 'tasks' else ''} + {last}[None, :]"

    def _look_up(self, number: int, each: Instruction) -> Iterator[str]:
        """A table as a tree of selections: Triton has no constants in memory."""
        index, name = self.name(each.args[0]), self.name(number)
        values = [_float(value) for value in self.program.tables[each.names[0]]]
        level = 0
        while len(values) > 1:
            bit = f"({index} & {1 << level}) != 0"
            pairs = [values[at : at + 2] for at in range(0, len(values), 2)]
            values = []
            for at, pair in enumerate(pairs):
                if len(pair) == 1 or pair[0] == pair[1]:
                    values.append(pair[0])
                    continue
                values.append(f"{name}_{level}_{at}")
                yield f"{values[-1]} = tl.where({bit}, {pair[1]}, {pair[0]}).to(tl.float32)"
            level += 1
        yield f"{name} = {index} * 0.0 + {values[0]}"


def _literal(each: Instruction) -> str:
    value = number_of(each.names[0])
    return _float(value) if each.type in ("f32", "f64") else str(int(value))


def _float(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return f"float('{value}')"


def module(text: str, programs: list[BlockProgram], function: str) -> str:
    """A module with a kernel, the functions that it calls, and a program's text above it."""
    above = "".join(f"# {line}\n" for line in text.splitlines())
    imports = "import triton\nimport triton.language as tl\n\n\n"
    return above + imports + "\n\n".join([*helpers(programs), function])


def power_of_two(count: int) -> int:
    """The least power of two that is at least ``count``."""
    return 1 << max(0, count - 1).bit_length()


def params(program: BlockProgram, prefix: str = "") -> frozenset[str]:
    """Arguments that hold a parameter's number, as pointers to one i32."""
    draws = (each for each in program.instructions if each.operation == "random_bits")
    return frozenset(f"{prefix}{each.names[1]}" for each in draws)


def signature(program: BlockProgram, prefix: str = "", *leave: str) -> dict[str, str]:
    """A kernel's arguments in order and Triton's types of them: buffers without ``leave``, then numbers."""
    pointers = params(program, prefix)
    buffers = {
        f"{prefix}{each.name}": f"*{MEMORY[each.memory].pointer}" for each in program.buffers if each.name not in leave
    }
    names = (f"{prefix}{name}" for name in program.numbers)
    return buffers | {name: "*i32" if name in pointers else "i64" for name in names}


def print_region(program: BlockProgram, rows: int, name: str = "region") -> str:
    """A kernel that runs a program over its space, ``rows`` groups (a power of two) an instance on a grid of one
    dimension; arguments as :func:`signature` has them."""
    program = expanded(program)
    space, width = program.space, power_of_two(program.space.width)
    width = max([width, *(MEMORY[buffer.memory].lanes for buffer in program.buffers if buffer.memory in PACKED)])
    if _is_flat(program):
        space = space._replace(rows=1, columns=space.rows * space.columns)
        program = dataclasses.replace(program, space=space)
    count = space.rows * space.groups
    # places are counted along a flattened matrix, which may have more of them than 32 bits hold
    tile = "tl.program_id(0).to(tl.int64)" if space.rows * space.columns >= 1 << 31 else "tl.program_id(0)"
    lines = [f"at = {tile} * {rows} + tl.arange(0, {rows})"]
    if space.rows == 1:
        lines += ["at_row = at * 0", "at_group = at"]
    else:
        lines += [f"at_row = at // {space.groups}", f"at_group = at % {space.groups}"]
    lines += [f"first = at_group * {space.width}", f"at_column = first[:, None] + tl.arange(0, {width})[None, :]"]
    masks, conditions = {}, []
    if count % rows:
        lines.append(f"there = at < {count}")
        masks = {"row": "there", "group": "there"}
        conditions.append("there[:, None]")
    if width != space.width:
        conditions.append(f"(tl.arange(0, {width}) < {space.width})[None, :]")
    if space.columns % space.width:
        conditions.append(f"(at_column < {space.columns})")
    if conditions:
        lines.append(f"inside = {' & '.join(conditions)}")
        masks |= {"element": "inside", "column": "inside"}
    first = "first" if space.width % 8 == 0 else None
    body = Body(program, Tile("tasks", "at_row", "at_column", "at_group", masks, first, space.width, (rows, width)))
    lines += [*body.values(), *body.stores()]
    head = f"@triton.jit\ndef {name}({', '.join(signature(program))}):\n"
    return module(program.pretty(), [program], head + "".join(f"    {line}\n" for line in lines))


def _is_flat(program: BlockProgram) -> bool:
    """Whether groups follow one upon the other in memory, and nothing asks for rows and columns."""
    if program.space.columns % program.space.width or any(
        b.memory == "u4" or (b.memory in PACKED and program.space.columns % MEMORY[b.memory].lanes)
        for b in program.buffers
    ):
        return False
    asked = {b.extent for b in program.buffers} & {"row", "column"}
    return not asked and all(each.operation != "random_bits" for each in program.instructions)
