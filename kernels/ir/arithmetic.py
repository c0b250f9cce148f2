"""The arithmetic of formats (:mod:`qgalore_compile.formats.arithmetic`), recorded as instructions of a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qgalore_compile.kernels.ir.program import BlockProgram


@dataclass(frozen=True)
class Value:
    """An instruction of a program, with operators."""

    program: BlockProgram
    number: int

    @property
    def type(self) -> str:
        return self.program.instructions[self.number].type

    def _emit(self, operation: str, *others: Any) -> Value:
        args = [other if isinstance(other, Value) else constant(self, other) for other in others]
        return Value(self.program, self.program.emit(operation, [self.number, *(arg.number for arg in args)]))

    def __add__(self, other: Any) -> Value:
        return self._emit("add", other)

    def __sub__(self, other: Any) -> Value:
        return self._emit("sub", other)

    def __rsub__(self, other: Any) -> Value:
        return constant(self, other) - self

    def __mul__(self, other: Any) -> Value:
        return self._emit("mul", other)

    def __truediv__(self, other: Any) -> Value:
        return self._emit("div", other)

    def __neg__(self) -> Value:
        return self._emit("neg")

    def __lt__(self, other: Any) -> Value:
        return self._emit("lt", other)

    def __gt__(self, other: Any) -> Value:
        return self._emit("gt", other)

    def __ge__(self, other: Any) -> Value:
        return self._emit("ge", other)

    def __and__(self, other: Any) -> Value:
        return self._emit("and" if self.type == "bool" else "bitand", other)

    def __or__(self, other: Any) -> Value:
        return self._emit("or" if self.type == "bool" else "bitor", other)

    def __lshift__(self, count: int) -> Value:
        return self._emit("shl", count)

    def __rshift__(self, count: int) -> Value:
        return self._emit("shr", count)


def constant(like: Value, number: float) -> Value:
    """A number of the type of a value."""
    return Value(like.program, like.program.constant(number, like.type))


class InProgram:
    """An ``Arithmetic`` of values of one program, whose groups are the format's: rotations are of its width."""

    def __init__(self, program: BlockProgram, size: int) -> None:
        self._program, self._size = program, size

    def _emit(self, operation: str, *args: Value, names: tuple[str, ...] = ()) -> Value:
        return Value(self._program, self._program.emit(operation, [arg.number for arg in args], names))

    def _value(self, number: Any, kind: str) -> Value:
        return number if isinstance(number, Value) else Value(self._program, self._program.constant(number, kind))

    def where(self, condition: Value, first: Any, second: Any) -> Value:
        known = next((each.type for each in (first, second) if isinstance(each, Value)), None)
        kind = known or ("f32" if isinstance(first, float) else "i32")
        return self._emit("where", condition, self._value(first, kind), self._value(second, kind))

    def floor(self, x: Value) -> Value:
        return self._emit("floor", x)

    def round(self, x: Value) -> Value:
        return self._emit("round", x)

    def abs(self, x: Value) -> Value:
        return self._emit("abs", x)

    def minimum(self, x: Value, bound: Any) -> Value:
        return self._emit("minimum", x, self._value(bound, x.type))

    def maximum(self, x: Value, bound: Any) -> Value:
        return self._emit("maximum", x, self._value(bound, x.type))

    def to_int(self, x: Value) -> Value:
        return self._emit("i32", x)

    def to_float(self, x: Value) -> Value:
        return self._emit("f32", x)

    def bits(self, x: Value) -> Value:
        return self._emit("as_i32", x)

    def from_bits(self, x: Value) -> Value:
        return self._emit("as_f32", x)

    def group_max(self, x: Value) -> Value:
        return self._emit("group_max", x)

    def group_min(self, x: Value) -> Value:
        return self._emit("group_min", x)

    def rotate(self, x: Value, back: bool) -> Value:
        if self._program.space.width != self._size:  # one short group
            return x
        return self._emit("rotate", x, names=("back" if back else "forth",))

    def dynamic8_value(self, codes: Value, signed: bool) -> Value:
        return self._emit("dynamic8_value", codes, names=("signed" if signed else "unsigned",))

    def dynamic8_code(self, x: Value, divisor: Value, signed: bool) -> Value:
        return self._emit("dynamic8_code", x, divisor, names=("signed" if signed else "unsigned",))
