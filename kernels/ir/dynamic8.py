"""bitsandbytes' dynamic 8-bit code in a :class:`BlockProgram`: two operations, and what they mean in other ones.

``dynamic8_value`` is the map's entry of a code, ``dynamic8_code`` the code of an element divided by its block's
absolute maximum; each has "signed" or "unsigned" as its name.  :func:`expanded` is their one definition, which a
printer may use as it stands, or spell otherwise with equal results (``dynamic8.inc``).

The arithmetic is that of :mod:`qgalore_compile.formats`, which explains it, with one difference: an element's decade is
found by six comparisons instead of by a logarithm, since comparisons vectorise everywhere.  Codes are the same: at the
edge of a decade the code does not depend on which side the element is taken for.  Values are within a rounding.
"""

from __future__ import annotations

from qgalore_compile.kernels.ir.program import DYNAMIC8, BlockProgram

_DECADES = 6


def decode(program: BlockProgram, codes: int, absmax: int, *, signed: bool) -> int:
    """f32 elements from codes (i32 elements) and the blocks' absolute maxima (f32 groups)."""
    if program.instructions[codes].extent == "element":
        value = program.emit("dynamic8_value", (codes,), (_name(signed),))
    else:  # a tensor of one element
        value = _value(program, codes, signed=signed)
    return program.emit("mul", (value, absmax))


def encode(program: BlockProgram, value: int, *, signed: bool) -> tuple[int, int]:
    """(codes as i32 elements, absolute maxima as f32 groups) of f32 elements."""
    emit, zero, one = program.emit, program.constant(0.0), program.constant(1.0)
    absmax = emit("group_max", (emit("abs", (value,)),))
    divisor = emit("where", (emit("gt", (absmax, zero)), absmax, one))
    return emit("dynamic8_code", (value, divisor), (_name(signed),)), absmax


def expanded(program: BlockProgram) -> BlockProgram:
    """The program without the two operations; itself where it has none."""
    if not any(each.operation in DYNAMIC8 for each in program.instructions):
        return program
    made = BlockProgram(program.space, program.buffers, program.numbers, program.tables)
    numbers: list[int] = []
    for each in program.instructions:
        args = [numbers[arg] for arg in each.args]
        if each.operation in DYNAMIC8:
            expand = _value if each.operation == "dynamic8_value" else _code
            numbers.append(expand(made, *args, signed=each.names == ("signed",)))
        else:
            numbers.append(made.emit(each.operation, args, each.names))
    made.stores = [(name, numbers[value]) for name, value in program.stores]
    return made


def _name(signed: bool) -> str:
    return "signed" if signed else "unsigned"


def _value(program: BlockProgram, codes: int, *, signed: bool) -> int:
    """Not a look-up: a gather of 16 elements took 45 cycles on a Xeon (Sapphire Rapids), twice this."""
    emit, constant = program.emit, program.constant
    code, first = emit("f32", (codes,)), 1.0 if signed else 2.0
    entry = emit("sub", (code, constant(127.0))) if signed else emit("add", (code, constant(1.0)))
    size = emit("abs", (entry,)) if signed else entry
    power, inverse = constant(10.0**-_DECADES), constant(1 / first)
    for decade in range(1, _DECADES + 1):
        higher = emit("ge", (size, constant(first * 2**decade)))
        power = emit("where", (higher, constant(10.0 ** (decade - _DECADES)), power))
        inverse = emit("where", (higher, constant(1 / (first * 2**decade)), inverse))
    place = emit("mul", (emit("mul", (emit("add", (size, constant(0.5))), constant(0.9))), inverse))
    value = emit("mul", (emit("sub", (place, constant(0.8))), power))
    value = emit("where", (emit("ge", (size, constant(first * 2 ** (_DECADES + 1)))), constant(1.0), value))
    value = emit("where", (emit("lt", (size, constant(first))), constant(0.0), value))
    if signed:
        value = emit("where", (emit("lt", (entry, constant(0.0))), emit("neg", (value,)), value))
    return value


def _code(program: BlockProgram, value: int, divisor: int, *, signed: bool) -> int:
    emit, constant = program.emit, program.constant
    zero, one, unit = constant(0.0), constant(1.0), emit("div", (value, divisor))
    size = emit("minimum", (emit("abs", (unit,)), one))
    first = 1.0 if signed else 2.0  # entries of the lowest decade
    power, width = constant(10.0**_DECADES), constant(first)
    above = [emit("gt", (size, constant(10.0 ** (decade - _DECADES)))) for decade in range(_DECADES)]
    for decade, higher in enumerate(above, 1):
        power = emit("where", (higher, constant(10.0 ** (_DECADES - decade)), power))
        width = emit("where", (higher, constant(first * 2**decade), width))
    scaled = emit("mul", (emit("add", (emit("mul", (size, power)), constant(0.8))), constant(1 / 0.9)))
    position = emit("sub", (emit("mul", (scaled, width)), constant(0.5)))
    to_zero = 0.5 - (0.175 if signed else 0.125) / 0.9
    seam = emit("sub", (width, emit("where", (above[0], constant(0.3), constant(to_zero)))))
    twice = emit("mul", (width, constant(2.0)))
    # selections, not `maximum` and `minimum`: what becomes of NaN does not matter here, and costs vectorisation
    nearest, most = emit("round", (position,)), emit("sub", (twice, one))
    inside = emit("where", (emit("gt", (nearest, width)), nearest, width))
    inside = emit("where", (emit("lt", (inside, most)), inside, most))
    entry = emit("where", (emit("lt", (position, seam)), emit("sub", (width, one)), inside))
    beyond = emit("ge", (position, emit("sub", (twice, constant(0.75)))))
    entry = emit("where", (emit("and", (above[-1], beyond)), twice, entry))
    middle = constant(127.0)
    if signed:
        below = emit("sub", (middle, emit("minimum", (entry, middle))))
        codes = emit("where", (emit("lt", (unit, zero)), below, emit("add", (entry, middle))))
    else:
        codes = emit("sub", (entry, one))
    return emit("i32", (codes,))
