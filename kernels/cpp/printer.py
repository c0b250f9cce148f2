"""A :class:`BlockProgram` as C++: one pass over memory, groups spread over threads, elements over vector lanes.

The function that is printed,

    void run(void** buffers, const int64_t* pitches, const int64_t* numbers,
             int64_t row_0, int64_t row_1, int64_t group_0, int64_t group_1)

runs the program on the given rows and groups of the space.  ``pitches`` are elements (bytes for "u4") from one row of
an element buffer to the next, so that a caller may hand in a block of a matrix, shifted to where the whole would begin.

Within a group there is one loop over elements for each phase (:meth:`BlockProgram.phases`): values that a later phase
needs are kept in an array on the stack, which stays in the first-level cache.  The compiler vectorises the loops; the
arithmetic is float32 without contraction or reassociation, sums excepted.  Random bits, the dynamic 8-bit map and
rotations are calls with a whole group between the loops; for the first two there are intrinsics.  Packed codes are
taken apart before the loops and put together behind them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qgalore_compile.formats.rotation import signs
from qgalore_compile.kernels.cpp.spelling import CPP_TYPES, PRELUDE, SPELLING, integer, literal
from qgalore_compile.kernels.ir.memory import MEMORY, PACKED
from qgalore_compile.kernels.ir.program import (
    DYNAMIC8,
    OF_GROUPS,
    REDUCTIONS,
    TYPES,
    BlockProgram,
    Instruction,
    number_of,
)

_CHEAP = {"load", "constant", *TYPES, *OF_GROUPS}
"""Element instructions that are run again in a later phase rather than kept."""

_LIGHT = _CHEAP | {
    "add", "sub", "mul", "neg", "abs", "where", "and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "minimum",
    "maximum",
}  # fmt: skip
"""The same where a group leaves the first-level cache: arithmetic is done again sooner than it is read back."""
_ON_STACK = 1 << 13
"""Elements of a group up to which values of it are kept on the stack; a row of a vocabulary may be a megabyte."""

_PHILOX, _DYNAMIC8, _ROTATE, _EXP = (
    (Path(__file__).parent / f"{name}.inc").read_text() for name in ("philox", "dynamic8", "rotate", "exp")
)


def print_cpp(program: BlockProgram) -> str:
    """The C++ source of a program, complete, with an ``extern "C"`` function ``run``."""
    return "\n".join(_Printer(program).lines()) + "\n"


class _Printer:
    """Prints one program."""

    def __init__(self, program: BlockProgram) -> None:
        self.program, self.space = program, program.space
        self.phase, self.users = program.phases(), program.users()
        self.store_phase, self.until = self._schedule()
        self.last = max([*self.store_phase.values(), 0])
        self.kept = {number for number in range(len(program.instructions))
                     if not self._is_repeated(number) and self.phase[number] < self.until[number]
                     and program.instructions[number].extent == "element"}  # fmt: skip
        self.exact = self._in_bf16()
        self.random = [number for number, each in enumerate(program.instructions) if each.operation == "random_bits"]
        self.calls = [number for number, each in enumerate(program.instructions) if each.operation in OF_GROUPS]
        sources = {program.instructions[number].args[0] for number in self.calls if program.completes(number)}
        self.kept |= sources.difference(self.calls)

    def _schedule(self) -> tuple[dict[str, int], list[int]]:
        """(when each buffer is written, the last phase that each instruction is needed in).

        A buffer is written with its value, but behind everything that reads what it held: what is computed again in a
        later phase loads again, and so does what is stored later.
        """
        instructions, stores = self.program.instructions, self.program.stores
        loads = {each.names[0]: number for number, each in enumerate(instructions) if each.operation == "load"}
        writing = {name: self._known(value) for name, value in stores}
        until = list(self.phase)
        while True:
            before = dict(writing)
            for name, value in stores:
                until[value] = max(until[value], writing[name])
            for number in reversed(range(len(instructions))):
                needed = [until[user] if self._takes_again(user) else self.phase[user] for user in self.users[number]]
                until[number] = max([until[number], *needed])
            for name in writing:
                writing[name] = max(writing[name], until[loads[name]] if name in loads else 0)
            if writing == before:
                return writing, until

    def _is_repeated(self, number: int) -> bool:
        """Whether an instruction is run again where it is needed, which costs no more than a load."""
        each = self.program.instructions[number]
        again = _CHEAP if self.space.width <= _ON_STACK else _LIGHT
        return each.extent == "column" or (each.extent == "element" and each.operation in again)

    def _in_bf16(self) -> set[int]:
        """Values that bfloat16 holds as they are: rounding takes eight operations a vector, cutting one."""
        found: set[int] = set()
        for number, each in enumerate(self.program.instructions):
            loaded = each.operation == "load" and self.program.buffer(each.names[0]).memory == "bf16"
            chosen = each.operation == "where" and found.issuperset(each.args[1:])
            if loaded or chosen or each.operation == "round_bf16" or self._is_cut(each):
                found.add(number)
        return found

    def _is_cut(self, each: Instruction) -> bool:
        """Whether it is the upper half of a float32's bits."""
        if each.operation != "as_f32":
            return False
        source = self.program.instructions[each.args[0]]
        masks = [self.program.instructions[arg] for arg in source.args if source.operation == "bitand"]
        return any(mask.operation == "constant" and not int(number_of(mask.names[0])) & 0xFFFF for mask in masks)

    def _takes_again(self, number: int) -> bool:
        """Whether a repeated instruction takes its arguments again: what was called is an array."""
        return self._is_repeated(number) and self.program.instructions[number].operation not in OF_GROUPS

    # -- the source -------------------------------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        yield from self._above()
        yield from self._arguments()
        yield from self._those("scalar", "    ")
        yield f"    const int64_t groups = group_1 - group_0, columns = {self.space.columns};"
        yield "    #pragma omp parallel for schedule(static)"
        yield "    for (int64_t task = 0; task < (row_1 - row_0) * groups; ++task) {"
        yield "        const int64_t row = row_0 + task / groups, group = group_0 + task % groups;"
        yield f"        const int64_t first = group * {self.space.width};"
        if self.space.columns % self.space.width:
            yield f"        const int64_t length = columns - first < {self.space.width} ? columns - first"
            yield f"                                                     : {self.space.width};"
        else:
            yield f"        constexpr int64_t length = {self.space.width};"
        yield from self._those("row", "        ")
        yield from self._arrays()
        for phase in range(self.last + 1):
            yield from self._group_values(phase)
            yield from self._loop(phase)
            for number in self.calls:
                if self.phase[number] == phase and self.program.completes(number):
                    source = self.program.instructions[number].args[0]
                    yield self._call(number, f"{'given' if source in self.calls else 'kept'}_{source}")
        yield from self._group_values(self.last + 1)
        yield from self._behind_the_loops()
        yield "    }"
        yield "}"

    def _above(self) -> Iterator[str]:
        """The program as a comment, and the functions and tables that it uses."""
        formats = {buffer.memory for buffer in self.program.buffers}
        operations = {each.operation for each in self.program.instructions}
        more = "#include <c10/util/Half.h>\n" if "f16" in formats or "round_f16" in operations else ""
        more += "#include <memory>\n" if self.space.width > _ON_STACK else ""
        yield from (f"// {line}" for line in self.program.pretty().splitlines())
        yield PRELUDE.format(more=more) + (_PHILOX if self.random else "")
        if "exp" in operations:
            yield _EXP
        if operations & DYNAMIC8:
            yield _DYNAMIC8
        if "rotate" in operations:
            entries = ", ".join(f"{value:g}" for value in signs(self.space.width))
            yield f"static constexpr float rotation_signs[{self.space.width}] = {{{entries}}};\n{_ROTATE}"
        for name, values in self.program.tables.items():
            entries = ", ".join(literal(value, "f32") for value in values)
            yield f"static const float {name}[{len(values)}] = {{{entries}}};"

    def _arguments(self) -> Iterator[str]:
        yield (
            'extern "C" void run(void** buffers, const int64_t* pitches, const int64_t* numbers,\n'
            "                    int64_t row_0, int64_t row_1, int64_t group_0, int64_t group_1) {"
        )
        for position, buffer in enumerate(self.program.buffers):
            kind = MEMORY[buffer.memory].cpp
            const = "const " if buffer.access == "in" else ""
            yield f"    {const}{kind}* at_{buffer.name} = static_cast<{const}{kind}*>(buffers[{position}]);"
            if buffer.extent == "element":
                yield f"    const int64_t pitch_{buffer.name} = pitches[{position}];"
        for position, name in enumerate(self.program.numbers):
            yield f"    const int64_t {name} = numbers[{position}];"

    def _arrays(self) -> Iterator[str]:
        """What is kept of a group on the stack: values between loops, draws, codes one a byte."""
        room = -(-self.space.width // 64) * 64  # for whole runs of what is called
        for number in sorted(self.kept):
            kind = CPP_TYPES[self.program.instructions[number].type]
            if room <= _ON_STACK:
                yield f"        {kind} kept_{number}[{room}];"
            else:
                yield f"        static thread_local std::unique_ptr<{kind}[]> room_{number}(new {kind}[{room}]);"
                yield f"        {kind}* __restrict__ kept_{number} = room_{number}.get();"
        for number in self.calls:
            kind = {"f32": "float", "i32": "uint8_t"}[self.program.instructions[number].type]
            yield f"        {kind} given_{number}[{room}];"
        for number in self.random:
            yield from self._draws(number)
        for buffer in self.program.buffers:
            if buffer.memory == "u4":
                yield from self._nibbles(buffer.name)
            elif buffer.memory in PACKED and buffer.access != "out":
                yield from self._unpacked(buffer.name, room)
            if buffer.memory in PACKED and buffer.access != "in":
                yield f"        uint8_t {buffer.name}_new[{room}];"
        for number in self.calls:
            if name := self.program.reads(number):
                yield self._call(number, f"at_{name} + row * pitch_{name} + first")

    def _behind_the_loops(self) -> Iterator[str]:
        """Stores of groups' values, and of packed codes."""
        for name, value in self.program.stores:
            buffer = self.program.buffer(name)
            if buffer.memory in PACKED:
                yield from self._packed(name)
            if buffer.extent == "group":
                place = f"at_{name}[row * {self.space.groups} + group]"
                yield f"        {place} = {self._narrowed(value, buffer.memory)};"

    def _those(self, extent: str, indent: str) -> Iterator[str]:
        for number, each in enumerate(self.program.instructions):
            if each.extent == extent:
                yield f"{indent}const {CPP_TYPES[each.type]} v{number} = {self._expression(number)};"

    def _draws(self, number: int) -> Iterator[str]:
        each = self.program.instructions[number]
        seed, param = each.names
        # a group need not begin at a counter's first draw, and counters are taken eight at a time
        yield f"        uint32_t words_{number}[{4 * (-(-self.space.width // 8) + 8)}];"
        yield f"        const uint32_t counter_{number} = static_cast<uint32_t>(first / 8);"
        yield (
            f"        random_bits(static_cast<uint64_t>({seed}), "
            f"static_cast<uint32_t>(static_cast<int64_t>(v{each.args[0]})), static_cast<uint32_t>({param}),\n"
            f"                    static_cast<uint32_t>(row), counter_{number}, (first + length + 7) / 8 - first / 8, "
            f"words_{number});"
        )
        words = f"reinterpret_cast<const half_word*>(words_{number})"
        yield f"        const half_word* draws_{number} = {words} + first % 8;"

    def _nibbles(self, name: str) -> Iterator[str]:
        """Codes of a group, unpacked: low nibbles hold the first half of a row, so there are two plain loops."""
        half = -(-self.space.columns // 2)
        yield f"        const uint8_t* {name}_row = at_{name} + row * pitch_{name};"
        low = f"{half} - first"
        yield f"        const int64_t {name}_low = {low} < 0 ? 0 : ({low} < length ? {low} : length);"
        yield f"        uint8_t {name}_codes[{self.space.width}];"
        yield "        #pragma omp simd"
        yield f"        for (int64_t j = 0; j < {name}_low; ++j) {name}_codes[j] = {name}_row[first + j] & 15;"
        yield "        #pragma omp simd"
        yield f"        for (int64_t j = {name}_low; j < length; ++j)"
        yield f"            {name}_codes[j] = {name}_row[first + j - {half}] >> 4;"

    def _unpacked(self, name: str, room: int) -> Iterator[str]:
        """Codes of a group, each in a byte of its own."""
        memory = MEMORY[self.program.buffer(name).memory]
        mask = (1 << memory.bits) - 1
        yield f"        uint8_t {name}_codes[{room}];"
        yield f"        const uint8_t* {name}_bytes = at_{name} + row * pitch_{name} + first / {memory.lanes};"
        yield "        #pragma omp simd"
        yield f"        for (int64_t j = 0; j < (length + {memory.lanes - 1}) / {memory.lanes}; ++j) {{"
        for lane in range(memory.lanes):
            code = f"({name}_bytes[j] >> {memory.bits * lane}) & {mask}"
            yield f"            {name}_codes[{memory.lanes} * j + {lane}] = {code};"
        yield "        }"

    def _packed(self, name: str) -> Iterator[str]:
        """A group's new codes into bytes; places beyond the row hold 0."""
        memory = MEMORY[self.program.buffer(name).memory]
        codes = [f"({name}_new[{memory.lanes} * j + {lane}] << {memory.bits * lane})" for lane in range(memory.lanes)]
        yield f"        for (int64_t j = length; j % {memory.lanes}; ++j) {name}_new[j] = 0;"
        yield f"        uint8_t* {name}_to = at_{name} + row * pitch_{name} + first / {memory.lanes};"
        yield "        #pragma omp simd"
        yield f"        for (int64_t j = 0; j < (length + {memory.lanes - 1}) / {memory.lanes}; ++j)"
        yield f"            {name}_to[j] = static_cast<uint8_t>({' | '.join(codes)});"

    def _call(self, number: int, source: str) -> str:
        """What takes a group as a whole."""
        each = self.program.instructions[number]
        if each.operation == "rotate":
            back = "true" if each.names == ("back",) else "false"
            return f"        rotate<{back}, {self.space.width}>({source}, length, rotation_signs, given_{number});"
        taken = ", ".join([source, *(f"v{arg}" for arg in each.args[1:])])
        signed = "true" if each.names == ("signed",) else "false"
        return f"        {each.operation}s<{signed}>({taken}, length, given_{number});"

    def _group_values(self, phase: int) -> Iterator[str]:
        """Values of extent "group" that are known once the loops before ``phase`` are through."""
        for number, each in enumerate(self.program.instructions):
            if each.extent == "group" and self._known(number) == phase:
                yield f"        const {CPP_TYPES[each.type]} v{number} = {self._expression(number)};"

    def _known(self, number: int) -> int:
        """The phase in which a value is known: a reduction's result in the one behind its loop."""
        return self.phase[number] + self.program.completes(number)

    def _loop(self, phase: int) -> Iterator[str]:
        """One loop over the elements of a group."""
        reductions = [
            (number, each) for number, each in enumerate(self.program.instructions)
            if self.program.reduces(number) and self.phase[number] == phase
        ]  # fmt: skip
        stores = [
            (name, value) for name, value in self.program.stores
            if self.store_phase[name] == phase and self.program.buffer(name).extent == "element"
        ]  # fmt: skip
        wanted = [each.args[0] for _, each in reductions] + [value for _, value in stores]
        wanted += [number for number in self.kept if self.phase[number] == phase]
        if not wanted:
            return
        clauses = ""
        for number, each in reductions:
            start = {"group_min": "std::numeric_limits<float>::infinity()",
                     "group_max": "-std::numeric_limits<float>::infinity()", "group_sum": "0.0f"}  # fmt: skip
            kind, first = ("int32_t", "0") if self._is_of_sizes(each) else ("float", start[each.operation])
            yield f"        {kind} r{number} = {first};"
            clauses += f" reduction({each.operation[6:].replace('sum', '+')}: r{number})"
        watched = dict.fromkeys(
            each.args[0] for _, each in reductions if each.operation != "group_sum" and not self._is_of_sizes(each)
        )
        for value in watched:
            yield f"        int nan_{value} = 0;"
            clauses += f" reduction(|: nan_{value})"
        yield f"        #pragma omp simd{clauses}"
        yield "        for (int64_t j = 0; j < length; ++j) {"
        for number in self._needed(wanted, phase):
            each = self.program.instructions[number]
            earlier = number in self.kept and self.phase[number] < phase
            expression = f"kept_{number}[j]" if earlier else self._expression(number)
            yield f"            const {CPP_TYPES[each.type]} v{number} = {expression};"
            if number in self.kept and not earlier:
                yield f"            kept_{number}[j] = v{number};"
        for number, each in reductions:
            reduced = f"bits_of(v{each.args[0]})" if self._is_of_sizes(each) else f"v{each.args[0]}"
            if each.operation == "group_sum":
                yield f"            r{number} += {reduced};"
            else:
                sign = "<" if each.operation == "group_min" else ">"
                yield f"            r{number} = {reduced} {sign} r{number} ? {reduced} : r{number};"
        for value in watched:
            yield f"            nan_{value} |= v{value} != v{value};"
        for name, stored in stores:
            yield from self._store(name, stored)
        yield "        }"

    def _is_of_sizes(self, each: Instruction) -> bool:
        """Whether the largest is asked for of numbers without a sign, whose bits are in the order of the numbers, NaN
        last: two operations a vector in place of five."""
        return each.operation == "group_max" and self.program.instructions[each.args[0]].operation == "abs"

    def _needed(self, wanted: list[int], phase: int) -> list[int]:
        """Element values that a loop computes or reads back, in order."""
        found: set[int] = set()
        pending = list(wanted)
        while pending:
            number = pending.pop()
            each = self.program.instructions[number]
            if each.extent not in ("element", "column") or number in found:
                continue
            found.add(number)
            if each.operation not in OF_GROUPS and not (number in self.kept and self.phase[number] < phase):
                pending.extend(each.args)
        return sorted(found)

    def _store(self, name: str, value: int) -> Iterator[str]:
        buffer = self.program.buffer(name)
        if buffer.memory in PACKED:
            yield f"            {name}_new[j] = static_cast<uint8_t>(v{value});"
            return
        yield f"            at_{name}[row * pitch_{name} + first + j] = {self._narrowed(value, buffer.memory)};"

    # -- one instruction --------------------------------------------------------------------------------------------

    def _expression(self, number: int) -> str:
        each = self.program.instructions[number]
        if each.operation == "load":
            return self._load(each)
        if each.operation == "constant":
            value = number_of(each.names[0])
            return literal(value, each.type) if each.type in ("f32", "f64") else integer(int(value), each.type)
        if each.operation == "lookup":
            return f"{each.names[0]}[v{each.args[0]}]"
        if each.operation == "random_bits":
            return f"static_cast<int32_t>(draws_{number}[j])"
        if each.operation in OF_GROUPS:
            return f"static_cast<{CPP_TYPES[each.type]}>(given_{number}[j])"
        if each.operation == "group_sum":
            return f"r{number}"
        if self._is_of_sizes(each):
            return f"float_of(r{number})"
        if each.operation in REDUCTIONS:
            return f"nan_{each.args[0]} ? std::numeric_limits<float>::quiet_NaN() : r{number}"
        return SPELLING[self._special(each)].format(*(f"v{arg}" for arg in each.args))

    def _special(self, each: Instruction) -> str:
        """The spelling for what is known of the arguments."""
        sources = [self.program.instructions[arg] for arg in each.args]
        if each.operation in ("minimum", "maximum") and sources[1].operation == "constant":
            value = number_of(sources[1].names[0])
            return f"{each.operation} constant" if value == value else each.operation
        if each.operation == "where" and sources[0].extent != each.extent == "element":
            if each.type == "i32":
                return "where invariant"
            if self.exact.issuperset(each.args[1:]):
                return "where invariant bf16"
        if f"{each.operation} {each.type}" in SPELLING:
            return f"{each.operation} {each.type}"
        if each.operation == "round_bf16" and each.args[0] in self.exact:
            return "round_bf16 exact"
        return "f32 of bool" if each.operation == "f32" and sources[0].type == "bool" else each.operation

    def _narrowed(self, value: int, memory: str) -> str:
        """A value as memory holds it."""
        if memory == "bf16":
            return f"static_cast<uint16_t>(bits_of(v{value}) >> 16)" if value in self.exact else f"store_bf16(v{value})"
        return f"v{value}" if memory in TYPES else f"static_cast<{MEMORY[memory].cpp}>(v{value})"

    def _load(self, each: Instruction) -> str:
        name = each.names[0]
        buffer = self.program.buffer(name)
        if MEMORY[buffer.memory].bits < 8:
            return f"static_cast<int32_t>({name}_codes[j])"
        place = {
            "scalar": "0", "row": "row", "column": "first + j", "group": f"row * {self.space.groups} + group",
            "element": f"row * pitch_{name} + first + j",
        }[buffer.extent]  # fmt: skip
        loaded = f"at_{name}[{place}]"
        if buffer.memory == "bf16":
            return f"load_bf16({loaded})"
        return loaded if each.type == "bool" else f"static_cast<{CPP_TYPES[each.type]}>({loaded})"
