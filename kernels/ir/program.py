"""``BlockProgram``: what a region does to one block of a matrix, in a form that every printer can spell.

A program runs over a *space* of rows × columns.  The columns of a row form groups of ``width`` neighbours; the last
group of a row may be short.  Every value has an *extent*, how much of the space it varies over:

=========  ===================  ==========================================
extent     one value for each   shape of a buffer
=========  ===================  ==========================================
scalar     launch               ()
row        row                  (rows,)
column     column               (columns,)
group      group of a row       (rows, groups)
element    place                (rows, columns); packed ones (rows, ⌈columns · bits / 8⌉)
=========  ===================  ==========================================

and a *type*: float "f32" or "f64", integer "i32" or "i64", or "bool"; loads widen what memory holds to one of them and
lose nothing, stores convert back.  Integers wrap around at their width.  Instructions are in static single
assignment.  What is reduced is reduced within a group, so groups are independent: a program may run on any of them, in
any order, with its outputs in the storage of its inputs.

The text of a program (``str``) is its only external form: it travels as an argument of an operator in a compiled graph,
names the compiled kernel in caches, and :meth:`BlockProgram.parse` reads it back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qgalore_compile.formats.rotation import is_size
from qgalore_compile.kernels.ir.memory import MEMORY, PACKED

EXTENTS = ("scalar", "row", "column", "group", "element")
TYPES = ("f32", "f64", "i32", "i64", "bool")


class Space(NamedTuple):
    """Rows × columns, the columns in groups of ``width``."""

    rows: int
    columns: int
    width: int

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return -(-self.columns // self.width)


class Buffer(NamedTuple):
    """An argument in memory.

    ``access`` is "in", "out", or "inout" where the program reads what it then overwrites.
    """

    name: str
    memory: str
    extent: str
    access: str


class Instruction(NamedTuple):
    """One step.  ``args`` are numbers of instructions; ``names`` what else the operation needs, by ``OPERATIONS``."""

    operation: str
    args: tuple[int, ...]
    names: tuple[str, ...]
    type: str
    extent: str


# How many values an operation takes and how many names.  Pointwise operations mean what PyTorch's of that name mean in
# their type: `minimum` and `maximum` propagate NaN, `round` is to even, shifts are of non-negative numbers.  `as_i32`
# and `as_f32` are the same bits as another type.
POINTWISE: dict[str, int] = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "minimum": 2, "maximum": 2, "pow": 2, "neg": 1, "abs": 1, "sign": 1,
    "sqrt": 1, "rsqrt": 1, "exp": 1, "exp2": 1, "expm1": 1, "log": 1, "log2": 1, "log10": 1, "log1p": 1, "tanh": 1,
    "sigmoid": 1, "erf": 1, "sin": 1, "cos": 1, "floor": 1, "ceil": 1, "trunc": 1, "round": 1,
    "lt": 2, "le": 2, "gt": 2, "ge": 2, "eq": 2, "ne": 2, "and": 2, "or": 2, "not": 1,
    "bitand": 2, "bitor": 2, "bitxor": 2, "shl": 2, "shr": 2, "where": 3,
    "f32": 1, "f64": 1, "i32": 1, "i64": 1, "bool": 1, "round_bf16": 1, "round_f16": 1,
    "as_i32": 1, "as_f32": 1,
}  # fmt: skip
REDUCTIONS = {"group_min", "group_max", "group_sum"}
DYNAMIC8 = {"dynamic8_value", "dynamic8_code"}
"""bitsandbytes' map, from a code (i32, 0 to 255) and to it; ``dynamic8.py`` defines them."""
OF_GROUPS = DYNAMIC8 | {"rotate"}
"""From the elements of a group to as many others, all at once.  "rotate" is the randomised Hadamard rotation of
``formats/rotation.py``, of every group that is not a short one."""
OPERATIONS: dict[str, tuple[int, int]] = {
    **{name: (count, 0) for name, count in POINTWISE.items()},
    **dict.fromkeys(REDUCTIONS, (1, 0)),
    "dynamic8_value": (1, 1),  # code; "signed" or "unsigned"
    "dynamic8_code": (2, 1),  # value, the group's divisor; "signed" or "unsigned"
    "rotate": (1, 1),  # value; "forth" or "back"
    "load": (0, 1),  # buffer
    "constant": (0, 1),  # its value
    "lookup": (1, 1),  # index; table
    "random_bits": (1, 2),  # step; numbers that hold seed and parameter
}
_BITS = {"i32": 32, "i64": 64}
_BOOLEAN = {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "bool"}
_ARITHMETIC = {"add", "sub", "mul", "minimum", "maximum", "neg", "abs", "sign"}
_OF_BITS = {"bitand", "bitor", "bitxor", "shl", "shr"}
_TAKES = {
    **dict.fromkeys(("and", "or", "not"), ("bool",)),
    **dict.fromkeys(_OF_BITS, ("i32", "i64")),
    **dict.fromkeys(_ARITHMETIC, ("f32", "f64", "i32", "i64")),  # PyTorch's `+` of bools is "or", its `-` an error
    **dict.fromkeys(("round_bf16", "round_f16", "log10", "tanh", "sigmoid", "erf", "sin", "cos", "round"), ("f32",)),
    "as_i32": ("f32",),
    "as_f32": ("i32",),
    **dict.fromkeys((_BOOLEAN - {"and", "or", "not"}) | {"where"}, TYPES),
}
"""Types of the values that an operation takes, all of them of one; of floats where it does not stand here."""


class ProgramError(ValueError):
    """A program that cannot be: the message says which instruction and why."""


@dataclass
class BlockProgram:
    """A region over a space; see the module's docstring.

    Attributes:
        space: what it runs over.
        buffers: arguments in memory, in the order in which a launch takes them.
        numbers: names of arguments that are 64-bit integers, likewise.
        tables: look-up tables of float32 by name.
        instructions: in order.
        stores: (buffer, number of the value) of what is written, after all instructions.
    """

    space: Space
    buffers: list[Buffer] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    tables: dict[str, tuple[float, ...]] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    stores: list[tuple[str, int]] = field(default_factory=list)
    _numbers: dict[Instruction, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    # -- building ---------------------------------------------------------------------------------------------------

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name; ProgramError where there is none."""
        found = next((buffer for buffer in self.buffers if buffer.name == name), None)
        if found is None:
            known = ", ".join(buffer.name for buffer in self.buffers) or "none"
            raise ProgramError(f"no buffer {name!r}; there are {known}")
        return found

    def emit(self, operation: str, args: Sequence[int] = (), names: Sequence[str] = ()) -> int:
        """Append an instruction unless an equal one is there; its number.  Type and extent follow from its arguments.

        Raises:
            ProgramError: an unknown operation, wrong counts, or types or extents that do not go together.
        """
        args, names = tuple(args), tuple(names)
        instruction = Instruction(operation, args, names, *self._result(operation, args, names))
        for number in range(len(self._numbers), len(self.instructions)):  # given, or appended by hand
            self._numbers.setdefault(self.instructions[number], number)
        number = self._numbers.setdefault(instruction, len(self.instructions))
        if number == len(self.instructions):
            self.instructions.append(instruction)
        return number

    def constant(self, value: float, kind: str = "f32") -> int:
        """A scalar of a type; ProgramError where an integer type does not hold it."""
        text = float(value).hex() if kind in ("f32", "f64") else str(int(value))
        if kind in _BITS and not -(1 << _BITS[kind] - 1) <= int(value) < 1 << _BITS[kind] - 1:
            raise ProgramError(f"{kind} does not hold {text}")
        return self.emit("constant", names=(f"{kind}:{text}",))

    def store(self, buffer: str, value: int) -> None:
        """Write a value to a buffer at the end of the program; float to integer formats only through ``i32``.

        Raises:
            ProgramError: a buffer that cannot take it.  Rows, columns and scalars are none of any one group's, and two
                packed codes are one byte of two groups, so groups that write them would not be independent.
        """
        if not 0 <= value < len(self.instructions):
            raise ProgramError(f"no instruction %{value} to store to {buffer}")
        target, source = self.buffer(buffer), self.instructions[value]
        if target.access == "in":
            raise ProgramError(f"buffer {buffer} is read only; make it 'out' or 'inout'")
        if target.extent not in ("group", "element"):
            raise ProgramError(f"only groups and elements are stored, but {buffer} is one for each {target.extent}")
        if target.memory == "u4":
            raise ProgramError(f"{buffer} holds u4, which is read only; store u8 codes")
        if target.memory in PACKED and self.space.groups > 1 and self.space.width % MEMORY[target.memory].lanes:
            raise ProgramError(
                f"groups of {self.space.width} elements share bytes of {buffer}, which holds {target.memory}"
            )
        if MEMORY[target.memory].widened != source.type:
            raise ProgramError(f"%{value} is {source.type}, but {buffer} holds {target.memory}; cast it first")
        if join((target.extent, source.extent)) != target.extent:
            raise ProgramError(f"%{value} is one for each {source.extent}, {buffer} one for each {target.extent}")
        if any(name == buffer for name, _ in self.stores):
            raise ProgramError(f"buffer {buffer} is stored twice")
        self.stores.append((buffer, value))

    def _result(self, operation: str, args: tuple[int, ...], names: tuple[str, ...]) -> tuple[str, str]:
        """(type, extent) of an instruction's result."""
        if operation not in OPERATIONS:
            raise ProgramError(f"unknown operation {operation!r}; known: {', '.join(sorted(OPERATIONS))}")
        if (len(args), len(names)) != OPERATIONS[operation]:
            want = OPERATIONS[operation]
            raise ProgramError(f"{operation} takes {want[0]} values and {want[1]} names, got {len(args)}, {len(names)}")
        unknown = next((number for number in args if not 0 <= number < len(self.instructions)), None)
        if unknown is not None:
            raise ProgramError(f"{operation} takes earlier instructions, got %{unknown}")
        sources = [self.instructions[number] for number in args]
        if operation == "load":
            buffer = self.buffer(names[0])
            if buffer.access == "out":
                raise ProgramError(f"buffer {buffer.name} is written only; make it 'inout'")
            return MEMORY[buffer.memory].widened, buffer.extent
        if operation == "constant":
            return _type_of_constant(names[0]), "scalar"
        if operation == "lookup":
            if names[0] not in self.tables or sources[0].type != "i32":
                raise ProgramError(f"lookup needs a table and an i32, got {names[0]!r} and {sources[0].type}")
            return "f32", sources[0].extent
        if operation == "random_bits":
            if sources[0].extent != "scalar" or not set(names) <= set(self.numbers):
                raise ProgramError("random_bits needs a scalar step, and numbers for the seed and the parameter")
            return "i32", "element"
        if operation in REDUCTIONS:
            if (sources[0].type, sources[0].extent) != ("f32", "element"):
                raise ProgramError(f"{operation} reduces f32 elements, got {sources[0].type}, {sources[0].extent}")
            return "f32", "group"
        if operation == "rotate":
            if (sources[0].type, sources[0].extent) != ("f32", "element") or names[0] not in ("forth", "back"):
                raise ProgramError(f"rotate takes f32 elements, forth or back, got {sources[0].type}, {names[0]}")
            if not is_size(self.space.width):
                raise ProgramError(f"rotate is of groups of a power of two of elements, not of {self.space.width}")
            return "f32", "element"
        if operation in DYNAMIC8:
            found = ", ".join([*(f"{source.type} {source.extent}" for source in sources), *names])
            wanted = "i32 element" if operation == "dynamic8_value" else "f32 element, f32 group"
            if found not in (f"{wanted}, signed", f"{wanted}, unsigned"):
                raise ProgramError(f"{operation} takes {wanted}, signed or unsigned, got {found}")
            return "f32" if operation == "dynamic8_value" else "i32", "element"
        return self._pointwise_type(operation, sources), join([source.extent for source in sources])

    @staticmethod
    def _pointwise_type(operation: str, sources: list[Instruction]) -> str:
        types = [source.type for source in sources]
        if operation == "where":
            condition, *types = types
            if condition != "bool":
                raise ProgramError(f"where takes a bool first, got {condition}")
        if operation in TYPES:
            return operation
        if len(set(types)) > 1:
            raise ProgramError(f"{operation} takes values of one type, got {', '.join(types)}")
        wanted = _TAKES.get(operation, ("f32", "f64"))
        if types[0] not in wanted:
            raise ProgramError(f"{operation} takes {' or '.join(wanted)}, got {types[0]}")
        if operation in ("as_i32", "as_f32"):
            return operation.removeprefix("as_")
        return "bool" if operation in _BOOLEAN else types[0]

    # -- reading ----------------------------------------------------------------------------------------------------

    def phases(self) -> list[int]:
        """For each instruction, how many that take whole groups must be complete before it can run, one after the
        other: a printer's loops over the elements of a group."""
        result: list[int] = []
        for instruction in self.instructions:
            result.append(max((result[number] + self.completes(number) for number in instruction.args), default=0))
        return result

    def reduces(self, number: int) -> bool:
        """Whether an instruction makes one value of a group."""
        return self.instructions[number].operation in REDUCTIONS

    def completes(self, number: int) -> bool:
        """Whether an instruction's result is there only when its phase is complete: reductions, and what is called with
        a whole group, unless the group is there to begin with."""
        return self.reduces(number) or (self.instructions[number].operation in OF_GROUPS and not self.reads(number))

    def reads(self, number: int) -> str:
        """The buffer whose bytes are the codes that an instruction takes the values of, or ""."""
        each = self.instructions[number]
        if each.operation == "dynamic8_value":
            source = self.instructions[each.args[0]]
            if source.operation == "load" and self.buffer(source.names[0]).memory == "u8":
                return source.names[0]
        return ""

    def users(self) -> list[list[int]]:
        """For each instruction, those that take its value."""
        result: list[list[int]] = [[] for _ in self.instructions]
        for number, instruction in enumerate(self.instructions):
            for source in dict.fromkeys(instruction.args):
                result[source].append(number)
        return result

    def written(self) -> list[Buffer]:
        """Buffers that the program writes."""
        return [buffer for buffer in self.buffers if buffer.access != "in"]

    def bytes(self) -> int:
        """Bytes that must move: each buffer once in each direction that it is used in."""
        return sum(self.bytes_of(buffer) * (2 if buffer.access == "inout" else 1) for buffer in self.buffers)

    def bytes_of(self, buffer: Buffer) -> int:
        """Size of a buffer."""
        rows, columns, _ = self.space
        places = {"scalar": 1, "row": rows, "column": columns, "group": rows * self.space.groups}
        memory = MEMORY[buffer.memory]
        if memory.bits < 8:  # of the elements of a row, which ends with a byte
            return rows * memory.pitch(columns)
        return places.get(buffer.extent, rows * columns) * memory.bits // 8

    # -- text -------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"space {self.space.rows} {self.space.columns} {self.space.width}"
        for buffer in self.buffers:
            yield f"buffer {buffer.name} : {buffer.memory} {buffer.extent} {buffer.access}"
        for name in self.numbers:
            yield f"number {name}"
        for name, values in self.tables.items():
            # eight hexadecimal digits an entry: exact, and no longer than it must be
            yield f"table {name} {struct.pack(f'>{len(values)}f', *values).hex()}"
        for number, instruction in enumerate(self.instructions):
            args = [f"%{arg}" for arg in instruction.args]
            text = " ".join([instruction.operation, *args, *instruction.names])
            yield f"%{number} = {text} : {instruction.type} {instruction.extent}"
        for name, value in self.stores:
            yield f"store {name} %{value}"

    @classmethod
    def parse(cls, text: str) -> BlockProgram:
        """The program that ``str`` wrote.

        Raises:
            ProgramError: a line that is none.
        """
        program: BlockProgram | None = None
        line = ""
        try:
            for line in text.splitlines():
                program = cls._read(program, line)
        except ProgramError:
            raise
        except (ValueError, TypeError, IndexError, struct.error) as error:
            raise ProgramError(f"no line of a program: {line!r}") from error
        if program is None:
            raise ProgramError("an empty text is no program")
        return program

    @classmethod
    def _read(cls, program: BlockProgram | None, line: str) -> BlockProgram:
        """The program with one line more; many an error where the line is none."""
        word, *rest = line.split()
        if word == "space":
            return cls(Space(*map(int, rest)))
        if program is None:
            raise ProgramError(f"a program begins with its space, not with {line!r}")
        if word == "buffer":
            name, _, memory, extent, access = rest
            if memory not in MEMORY or extent not in EXTENTS or access not in ("in", "out", "inout"):
                raise ValueError
            program.buffers.append(Buffer(name, memory, extent, access))
        elif word == "number":
            program.numbers.append(rest[0])
        elif word == "table":
            data = bytes.fromhex(rest[1])
            program.tables[rest[0]] = struct.unpack(f">{len(data) // 4}f", data)
        elif word == "store":
            program.store(rest[0], int(rest[1][1:]))
        elif word.startswith("%"):
            operation, *operands = rest[1:-3]
            args = [int(operand[1:]) for operand in operands if operand.startswith("%")]
            names = [operand for operand in operands if not operand.startswith("%")]
            if program.emit(operation, args, names) != int(word[1:]):
                raise ProgramError(f"{line!r} is not the next instruction, or the same as an earlier one")
        else:
            raise ValueError
        return program

    def pretty(self) -> str:
        """The program for people: tables by their length, constants in decimals."""
        lines = []
        for line in self._lines():
            if line.startswith("table"):
                _, name, data = line.split()
                line = f"table {name}, {len(data) // 8} entries"
            elif "constant f" in line:
                head, text = line.split("constant ")
                value, rest = text.split(" ", 1)
                line = f"{head}constant {number_of(value):.9g} {rest}"
            lines.append(line)
        return "\n".join(lines)


def number_of(name: str) -> float | int:
    """The value in the name of a constant."""
    kind, text = name.split(":")
    return float.fromhex(text) if kind in ("f32", "f64") else int(text)


def _type_of_constant(name: str) -> str:
    """The type in the name of a constant."""
    kind = name.split(":")[0]
    try:
        if kind in TYPES:
            number_of(name)
            return kind
    except ValueError:
        pass
    raise ProgramError(f"a constant is {', '.join(TYPES[:-1])} or {TYPES[-1]}, got {name!r}")


def join(extents: Sequence[str]) -> str:
    """The extent of what follows from values of several extents."""
    found = set(extents) - {"scalar"}
    if not found:
        return "scalar"
    if len(found) == 1:
        return found.pop()
    return "group" if found == {"row", "group"} else "element"
