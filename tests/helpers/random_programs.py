"""Random programs for the test of printers: every extent, type and format, in place, over odd spaces."""

from __future__ import annotations

import random

from kernels_support import load, program

from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import BlockProgram, Space, join

STEPS = 25
_INPUTS = (
    "a f32 element inout", "b bf16 element inout", "h f16 element in", "c u8 element inout", "d i8 element in",
    "i i32 element inout", "packed u4 element in", "mask bool element inout", "row f32 row in", "column bf16 column in",
    "group f32 group inout", "whole i32 group inout", "scalar f32 scalar in", "step i64 scalar in",
    "l i64 element inout", "long i64 group in",
)  # fmt: skip
_OUTPUTS = (
    "o f32 element out", "ob bf16 element out", "oh f16 element out", "oc u8 element out", "oi i16 element out",
    "om bool element out", "og f32 group out",
    "ol i64 element out",
)  # fmt: skip


def random_program(seed: int) -> BlockProgram:
    """A program of some twenty-five random operations.

    Integers and bools follow from floats that every implementation computes bit for bit; sums, whose order is free, and
    library functions are scaled and stored alone.
    """
    return _Maker(random.Random(seed)).made


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        columns = chance.choice((1, 7, 8, 16, 21, 40, 45))
        space = Space(chance.choice((1, 1, 2, 5)), columns, chance.choice((1, 3, 7, 8, 16, columns)))
        # the header that float16 needs takes longer to compile than all the rest
        self.half = half = chance.random() < 0.2
        inputs, outputs = ([each for each in given if half or " f16 " not in each] for given in (_INPUTS, _OUTPUTS))
        self.made = program(space, *inputs, *outputs, numbers=("seed", "param"))
        self.made.tables["table"] = tuple(chance.uniform(-4, 4) for _ in range(16))
        self.inexact: list[int] = []
        self.values = [load(self.made, name.split()[0]) for name in inputs if chance.random() < 0.8]
        self.values.append(self.made.constant(chance.uniform(-2, 2)))
        for _ in range(STEPS):
            self.step()
        self.store()

    def pick(self, kind: str, extent: str | None = None) -> int:
        """A value of a type; a constant or a load where there is none yet."""
        instructions = self.made.instructions
        found = [value for value in self.values
                 if instructions[value].type == kind and extent in (None, instructions[value].extent)]  # fmt: skip
        if found:  # late ones rather than early ones: deep programs
            return found[int(len(found) * self.chance.random() ** 0.5)]
        if extent:
            return load(self.made, "a")
        return self.made.constant(self.chance.choice((0, 1)) if kind == "bool" else self.chance.uniform(-5, 5), kind)

    def emit(self, operation: str, *args: int, names: tuple[str, ...] = ()) -> int:
        return self.made.emit(operation, args, names)

    def bounded(self, value: int, most: float = 64.0) -> int:
        """A value within bounds, so that nothing overflows."""
        kind = self.made.instructions[value].type
        low, high = self.made.constant(-most, kind), self.made.constant(most, kind)
        return self.emit("minimum", self.emit("maximum", value, low), high)

    def step(self) -> None:
        chance, pick, emit = self.chance, self.pick, self.emit
        kind = chance.choice(("f32", "f32", "i32", "i64"))
        choice = chance.choice((
            "arithmetic", "arithmetic", "arithmetic", "unary", "compare", "logic", "where", "reduce", "reduce", "cast",
            "bits", "random", "lookup", "div", "sum", "library", "dynamic8",
        ))  # fmt: skip
        if choice == "arithmetic":
            operation = chance.choice(("add", "sub", "mul", "minimum", "maximum"))
            value = emit(operation, pick(kind), pick(kind))
            self.values.append(value if kind == "i64" else self.bounded(value))  # which wraps around
        elif choice == "unary":
            exact = ("neg", "abs", "sign")
            floats = ("floor", "ceil", "trunc", "round", "round_bf16", *(["round_f16"] if self.half else []))
            operation = chance.choice(exact + floats if kind == "f32" else exact)
            self.values.append(emit(operation, pick(kind)))
        elif choice == "div":
            away_from_zero = emit("add", emit("abs", pick("f32")), self.made.constant(0.5))
            self.values.append(emit("div", pick("f32"), away_from_zero))
        elif choice == "compare":
            self.values.append(emit(chance.choice(("lt", "le", "gt", "ge", "eq", "ne")), pick(kind), pick(kind)))
        elif choice == "logic":
            operation = chance.choice(("and", "or", "not"))
            self.values.append(emit(operation, *(pick("bool") for _ in range(1 if operation == "not" else 2))))
        elif choice == "where":
            kind = chance.choice((kind, "bool"))
            self.values.append(emit("where", pick("bool"), pick(kind), pick(kind)))
        elif choice == "reduce":
            self.values.append(emit(chance.choice(("group_min", "group_max")), pick("f32", "element")))
        elif choice == "cast":
            self.values.append(emit("i32", self.bounded(pick("f32"))))
            self.values.append(emit("i64", pick(chance.choice(("i32", "bool")))))
            self.values.append(emit("f32", pick(chance.choice(("i32", "bool")))))
            self.values.append(self.bounded(emit("f32", pick("i64"))))
            self.values.append(emit("i32", pick("i64")))
        elif choice == "bits":
            shifted = emit(chance.choice(("shl", "shr")), self.small(), self.made.constant(3, "i32"))
            self.values.append(emit(chance.choice(("bitand", "bitor", "bitxor")), shifted, pick("i32")))
            self.values.append(emit("bitxor", emit("shr", pick("i64"), self.made.constant(33, "i64")), pick("i64")))
        elif choice == "random":
            bits = emit("random_bits", self.scalar_step(), names=("seed", "param"))
            self.values.append(emit("bitand", bits, self.made.constant(63, "i32")))
        elif choice == "lookup":
            self.values.append(emit("lookup", self.small(), names=("table",)))
        elif choice == "dynamic8":
            sign, value = (chance.choice(("signed", "unsigned")),), pick("f32", "element")
            divisor = emit("add", emit("group_max", emit("abs", value)), self.made.constant(0.125))
            code = emit("dynamic8_code", value, divisor, names=sign)
            mixed = emit("bitand", emit("add", load(self.made, "c"), pick("i32")), self.made.constant(255, "i32"))
            codes = chance.choice((code, mixed, load(self.made, "c")))
            self.values += [code, emit("dynamic8_value", codes, names=sign)]
        elif choice == "sum":
            total = emit("group_sum", emit("abs", pick("f32", "element")))
            self.inexact += [total, emit("mul", total, pick("f32"))]
        else:
            operation = chance.choice(("rsqrt", "exp", "log1p", "tanh", "sigmoid", "erf", "sin"))
            value = emit("add", emit("abs", self.bounded(pick("f32"), 8.0)), self.made.constant(0.25))
            self.inexact.append(emit(operation, value))

    def small(self) -> int:
        """An integer from 0 to 15."""
        return self.emit("bitand", self.pick("i32"), self.made.constant(15, "i32"))

    def scalar_step(self) -> int:
        return load(self.made, "step")

    def store(self) -> None:
        instructions, chance = self.made.instructions, self.chance
        for buffer in self.made.written():
            wanted = MEMORY[buffer.memory].widened
            # what is inexact rounds to a neighbour in narrow formats
            pool = self.values + (self.inexact if buffer.memory == "f32" else [])
            fitting = [value for value in pool if instructions[value].type == wanted
                       and join((buffer.extent, instructions[value].extent)) == buffer.extent]  # fmt: skip
            if fitting and chance.random() < 0.9:
                self.made.store(buffer.name, chance.choice(fitting[-12:]))
