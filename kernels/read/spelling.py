"""How PyTorch's operators are spelled in a :class:`BlockProgram`, and which only rearrange a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from qgalore_compile.kernels.ir.program import BlockProgram, ProgramError, number_of
from qgalore_compile.kernels.read.fx_values import aten, prims


class Spelling(NamedTuple):
    """How an operator is spelled in a program.

    ``compares``: computes in the operands' type; ``condition``: the first operand stays what it is; ``options``:
    arguments may be None; ``arithmetic``: wraps around in narrow integers.
    """

    build: Callable[[BlockProgram, list[int]], int]
    compares: bool = False
    condition: bool = False
    options: bool = False
    arithmetic: bool = False


def _plain(operation: str, **how: bool) -> Spelling:
    return Spelling(lambda program, args: program.emit(operation, args), **how)


def _shift(operation: str, **how: bool) -> Spelling:
    def build(program: BlockProgram, args: list[int]) -> int:
        count = program.instructions[args[1]]
        # C++ and GPUs shift by what is left of the number modulo the width, PyTorch shifts everything out
        if count.operation != "constant" or not 0 <= number_of(count.names[0]) < 32:
            raise ProgramError(f"{operation} is by 0 to 31 places, got %{args[1]}")
        return program.emit(operation, args)

    return Spelling(build, **how)


def _division(program: BlockProgram, args: list[int]) -> int:
    """By a scalar: one division a launch and a product an element, within a rounding of the quotient.  Not by a value
    of a group: that may be so small that its reciprocal is infinite."""
    value, divisor = (program.instructions[arg] for arg in args)
    if value.extent == "element" and divisor.extent == "scalar":
        return program.emit("mul", (args[0], program.emit("div", (program.constant(1.0), args[1]))))
    return program.emit("div", args)


def _power(program: BlockProgram, args: list[int]) -> int:
    base, exponent = args
    found = program.instructions[exponent]
    if found.operation == "constant":
        if exponent == program.constant(2.0):
            return program.emit("mul", (base, base))
        if exponent == program.constant(0.5):
            return program.emit("sqrt", (base,))
    return program.emit("pow", args)


def _clamp(program: BlockProgram, args: list[int]) -> int:
    number, low, high = (*args, -1)[:3]
    number = number if low == -1 else program.emit("maximum", (number, low))
    return number if high == -1 else program.emit("minimum", (number, high))


def _reciprocal(program: BlockProgram, args: list[int]) -> int:
    return program.emit("div", (program.constant(1.0), args[0]))


def _square(program: BlockProgram, args: list[int]) -> int:
    return program.emit("mul", (args[0], args[0]))


def _relu(program: BlockProgram, args: list[int]) -> int:
    return program.emit("maximum", (args[0], program.constant(0.0)))


VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default, aten.clone.default,
}  # fmt: skip
REDUCTIONS: dict[Any, str] = {
    aten.amin.default: "group_min", aten.amax.default: "group_max", aten.sum.dim_IntList: "group_sum",
    aten.mean.dim: "group_sum",
}  # fmt: skip
CAST = Spelling(lambda program, args: args[0], condition=True)
POINTWISE: dict[Any, Spelling] = {
    aten.add.Tensor: _plain("add", arithmetic=True), aten.add.Scalar: _plain("add", arithmetic=True),
    aten.sub.Tensor: _plain("sub", arithmetic=True), aten.sub.Scalar: _plain("sub", arithmetic=True),
    aten.mul.Tensor: _plain("mul", arithmetic=True), aten.mul.Scalar: _plain("mul", arithmetic=True),
    aten.div.Tensor: Spelling(_division), aten.div.Scalar: Spelling(_division),
    aten.neg.default: _plain("neg", arithmetic=True), aten.reciprocal.default: Spelling(_reciprocal),
    aten.square.default: Spelling(_square, arithmetic=True), aten.relu.default: Spelling(_relu),
    aten.minimum.default: _plain("minimum"), aten.maximum.default: _plain("maximum"),
    aten.clamp_min.default: _plain("maximum"), aten.clamp_max.default: _plain("minimum"),
    aten.clamp.default: Spelling(_clamp, options=True),
    aten.pow.Tensor_Scalar: Spelling(_power), aten.pow.Tensor_Tensor: _plain("pow"), aten.pow.Scalar: _plain("pow"),
    aten.where.self: _plain("where", condition=True), aten.where.ScalarOther: _plain("where", condition=True),
    prims.convert_element_type.default: CAST, aten._to_copy.default: CAST,
    aten.logical_and.default: _plain("and"), aten.logical_or.default: _plain("or"),
    aten.logical_not.default: _plain("not"),
    aten.bitwise_and.Tensor: _plain("bitand"), aten.bitwise_and.Scalar: _plain("bitand"),
    aten.bitwise_or.Tensor: _plain("bitor"), aten.bitwise_or.Scalar: _plain("bitor"),
    aten.__rshift__.Scalar: _shift("shr"), aten.bitwise_right_shift.Tensor_Scalar: _shift("shr"),
    aten.__lshift__.Scalar: _shift("shl", arithmetic=True),
    aten.abs.default: _plain("abs", arithmetic=True),  # of int8, -128 stays as it is
    **{getattr(aten, name).default: _plain(name) for name in (
        "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "tanh", "sigmoid", "erf",
        "sin", "cos", "floor", "ceil", "trunc", "round")},
    aten.sign.default: _plain("sign"), aten.sgn.default: _plain("sign"),
    **{getattr(getattr(aten, name), overload): _plain(name, compares=True)
       for name in ("lt", "le", "gt", "ge", "eq", "ne") for overload in ("Tensor", "Scalar")},
}  # fmt: skip
