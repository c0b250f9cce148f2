"""A program's instructions have types and extents, its phases follow from reductions, and its text reads back."""

from __future__ import annotations

import math

import pytest

from qgalore_compile.kernels.ir import dynamic8
from qgalore_compile.kernels.ir.program import BlockProgram, Buffer, ProgramError, Space, join, number_of

SPACE = Space(3, 21, 8)


def program(*buffers: str) -> BlockProgram:
    """A program over ``SPACE`` with buffers spelled "name memory extent access"."""
    made = BlockProgram(SPACE, numbers=["seed", "param"], tables={"table": (0.5, 2.0)})
    made.buffers = [Buffer(*each.split()) for each in buffers]
    return made


EVERYTHING = (
    "x f32 element inout", "codes u8 element inout", "row f32 row in", "column bf16 column in", "group f32 group inout",
    "step i64 scalar in", "packed u4 element in", "mask bool element in", "made f16 element out",
)  # fmt: skip


def load(made: BlockProgram, name: str) -> int:
    return made.emit("load", names=(name,))


def kind(made: BlockProgram, number: int) -> tuple[str, str]:
    return made.instructions[number].type, made.instructions[number].extent


# -- types and extents ------------------------------------------------------------------------------------------------


def test_the_last_group_of_a_row_may_be_short() -> None:
    assert SPACE.groups == 3
    assert Space(3, 16, 8).groups == 2
    assert Space(1, 5, 8).groups == 1


def test_a_load_has_the_type_of_its_memory_and_the_extent_of_its_buffer() -> None:
    made = program(*EVERYTHING[:-1])
    found = {buffer.name: kind(made, load(made, buffer.name)) for buffer in made.buffers}
    assert found == {
        "x": ("f32", "element"), "codes": ("i32", "element"), "row": ("f32", "row"), "column": ("f32", "column"),
        "group": ("f32", "group"), "step": ("i64", "scalar"), "packed": ("i32", "element"), "mask": ("bool", "element"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ((), "scalar"),
        (("scalar", "scalar"), "scalar"),
        (("scalar", "row"), "row"),
        (("row", "group"), "group"),
        (("column", "scalar"), "column"),
        (("row", "column"), "element"),
        (("group", "column"), "element"),
        (("element", "row", "scalar"), "element"),
    ],
)
def test_a_result_varies_over_all_that_its_arguments_vary_over(extents: tuple[str, ...], expected: str) -> None:
    assert join(extents) == expected


def test_a_comparison_is_bool_whatever_it_compares() -> None:
    made = program(*EVERYTHING)
    assert kind(made, made.emit("lt", (load(made, "x"), load(made, "row")))) == ("bool", "element")
    assert kind(made, made.emit("eq", (load(made, "codes"), made.constant(3, "i32")))) == ("bool", "element")


def test_a_cast_changes_the_type_alone() -> None:
    made = program(*EVERYTHING)
    assert kind(made, made.emit("f32", (load(made, "codes"),))) == ("f32", "element")
    assert kind(made, made.emit("i32", (load(made, "row"),))) == ("i32", "row")
    assert kind(made, made.emit("bool", (load(made, "group"),))) == ("bool", "group")


def test_where_is_of_the_type_of_its_branches() -> None:
    made = program(*EVERYTHING)
    mask, three = load(made, "mask"), made.constant(3, "i32")
    assert kind(made, made.emit("where", (mask, three, load(made, "codes")))) == ("i32", "element")
    assert kind(made, made.emit("where", (mask, load(made, "row"), made.constant(0.0)))) == ("f32", "element")


def test_a_reduction_leaves_one_value_a_group() -> None:
    made = program(*EVERYTHING)
    for operation in ("group_min", "group_max", "group_sum"):
        assert kind(made, made.emit(operation, (load(made, "x"),))) == ("f32", "group")


def test_random_bits_are_elements_and_a_look_up_varies_like_its_index() -> None:
    made = program(*EVERYTHING)
    bits = made.emit("random_bits", (load(made, "step"),), ("seed", "param"))
    assert kind(made, bits) == ("i32", "element")
    index = made.emit("i32", (load(made, "row"),))
    assert kind(made, made.emit("lookup", (index,), ("table",))) == ("f32", "row")


def test_equal_instructions_are_one() -> None:
    made = program(*EVERYTHING)
    first = made.emit("add", (load(made, "x"), made.constant(1.0)))
    assert made.emit("add", (load(made, "x"), made.constant(1.0))) == first
    assert made.emit("add", (made.constant(1.0), load(made, "x"))) != first
    assert len(made.instructions) == 4


def test_equal_instructions_are_one_where_a_program_was_given_some() -> None:
    given = program("x f32 element in", "y f32 element in")
    x = load(given, "x")
    made = BlockProgram(SPACE, buffers=given.buffers, instructions=given.instructions)
    assert load(made, "x") == x
    assert load(made, "y") == x + 1
    assert load(given, "y") == x + 1
    assert BlockProgram.parse(str(made)) == made


def test_constants_keep_their_value_exactly() -> None:
    made = program()
    for value in (0.1, -1e-45, 3.4e38, math.inf, -math.inf, 2.0**-149):
        assert number_of(made.instructions[made.constant(value)].names[0]) == value
    assert math.isnan(number_of(made.instructions[made.constant(math.nan)].names[0]))
    assert number_of(made.instructions[made.constant(-7, "i32")].names[0]) == -7
    assert number_of(made.instructions[made.constant(-(2**63), "i64")].names[0]) == -(2**63)
    assert number_of(made.instructions[made.constant(0.1, "f64")].names[0]) == 0.1
    assert kind(made, made.constant(True, "bool")) == ("bool", "scalar")


def test_an_integer_that_its_type_does_not_hold_is_no_constant() -> None:
    for kind, value in (("i32", 2**31), ("i32", -(2**31) - 1), ("i64", 2**63)):
        with pytest.raises(ProgramError, match=f"{kind} does not hold {value}"):
            program().constant(value, kind)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "args", "names", "message"),
    [
        ("gelu", ("x",), (), "unknown operation 'gelu'; known: abs, "),
        ("add", ("x",), (), "add takes 2 values and 0 names, got 1, 0"),
        ("load", (), (), "load takes 0 values and 1 names, got 0, 0"),
        ("add", ("x", "codes"), (), "add takes values of one type, got f32, i32"),
        ("where", ("x", "x", "x"), (), "where takes a bool first, got f32"),
        ("where", ("mask", "x", "codes"), (), "where takes values of one type, got f32, i32"),
        ("sqrt", ("codes",), (), "sqrt takes f32 or f64, got i32"),
        ("div", ("codes", "codes"), (), "div takes f32 or f64, got i32"),
        ("and", ("codes", "codes"), (), "and takes bool, got i32"),
        ("shl", ("x", "x"), (), "shl takes i32 or i64, got f32"),
        ("group_max", ("codes",), (), "group_max reduces f32 elements, got i32, element"),
        ("group_sum", ("row",), (), "group_sum reduces f32 elements, got f32, row"),
        ("lookup", ("codes",), ("other",), "lookup needs a table and an i32, got 'other' and i32"),
        ("lookup", ("x",), ("table",), "lookup needs a table and an i32, got 'table' and f32"),
        ("random_bits", ("codes",), ("seed", "param"), "random_bits needs a scalar step"),
        ("random_bits", ("step",), ("seed", "other"), "numbers for the seed and the parameter"),
        ("load", (), ("made",), "buffer made is written only; make it 'inout'"),
        ("load", (), ("other",), "no buffer 'other'; there are x, codes, "),
        ("constant", (), ("f16:1",), "a constant is f32, f64, i32, i64 or bool, got 'f16:1'"),
        ("constant", (), ("i32:1.5",), "a constant is f32, f64, i32, i64 or bool, got 'i32:1.5'"),
        ("neg", ("mask",), (), "neg takes f32 or f64 or i32 or i64, got bool"),
        ("sub", ("mask", "mask"), (), "sub takes f32 or f64 or i32 or i64, got bool"),
        ("add", ("codes", "step"), (), "add takes values of one type, got i32, i64"),
        ("round_bf16", ("step",), (), "round_bf16 takes f32, got i64"),
        ("dynamic8_value", ("codes",), ("both",), "takes i32 element, signed or unsigned, got i32 element, both"),
        ("dynamic8_value", ("x",), ("signed",), "takes i32 element, signed or unsigned, got f32 element, signed"),
        ("dynamic8_code", ("x", "row"), ("signed",), "takes f32 element, f32 group, signed or unsigned, got f32 elem"),
    ],
)
def test_what_does_not_go_together_is_refused(
    operation: str, args: tuple[str, ...], names: tuple[str, ...], message: str
) -> None:
    made = program(*EVERYTHING)
    numbers = [load(made, name) for name in args]
    before = str(made)
    with pytest.raises(ProgramError) as raised:
        made.emit(operation, numbers, names)
    assert message in str(raised.value)
    assert str(made) == before


def test_an_instruction_takes_values_that_are_there() -> None:
    made = program(*EVERYTHING)
    x = load(made, "x")
    for missing in (x + 1, -1):
        with pytest.raises(ProgramError, match=f"add takes earlier instructions, got %{missing}"):
            made.emit("add", (x, missing))


# -- stores -----------------------------------------------------------------------------------------------------------


def test_a_store_needs_a_buffer_that_may_be_written() -> None:
    made = program("x f32 element in")
    with pytest.raises(ProgramError, match="buffer x is read only; make it 'out' or 'inout'"):
        made.store("x", load(made, "x"))


def test_a_store_converts_floats_but_not_to_integers() -> None:
    made = program(*EVERYTHING)
    x = load(made, "x")
    made.store("made", x)
    with pytest.raises(ProgramError, match=f"%{x} is f32, but codes holds u8; cast it first"):
        made.store("codes", x)
    made.store("codes", made.emit("i32", (x,)))


def test_a_store_does_not_drop_an_extent() -> None:
    made = program(*EVERYTHING)
    x = load(made, "x")
    with pytest.raises(ProgramError, match=f"%{x} is one for each element, group one for each group"):
        made.store("group", x)
    made.store("group", load(made, "row"))
    made.store("x", load(made, "column"))


def test_a_buffer_is_stored_once() -> None:
    made = program(*EVERYTHING)
    made.store("x", load(made, "x"))
    with pytest.raises(ProgramError, match="buffer x is stored twice"):
        made.store("x", load(made, "row"))


@pytest.mark.parametrize("extent", ["scalar", "row", "column"])
def test_a_store_is_to_groups_or_elements_which_alone_are_independent(extent: str) -> None:
    made = program(f"x f32 {extent} inout")
    with pytest.raises(ProgramError, match=f"only groups and elements are stored.*x is one for each {extent}"):
        made.store("x", load(made, "x"))


def test_packed_nibbles_are_read_only() -> None:
    made = program("packed u4 element inout")
    with pytest.raises(ProgramError, match="packed holds u4, which is read only; store u8 codes"):
        made.store("packed", load(made, "packed"))


# -- phases, users, bytes ---------------------------------------------------------------------------------------------


def softmax(made: BlockProgram) -> int:
    x = load(made, "x")
    exp = made.emit("exp", (made.emit("sub", (x, made.emit("group_max", (x,)))),))
    return made.emit("div", (exp, made.emit("group_sum", (exp,))))


def test_a_phase_is_what_waits_for_a_reduction() -> None:
    made = program(*EVERYTHING)
    result = softmax(made)
    assert made.phases()[result] == 2
    assert {made.instructions[number].operation: phase for number, phase in enumerate(made.phases())} == {
        "load": 0, "group_max": 0, "sub": 1, "exp": 1, "group_sum": 1, "div": 2,
    }  # fmt: skip


def test_a_phase_waits_for_the_dynamic_map_of_a_group_unless_memory_holds_its_codes() -> None:
    made = program(*EVERYTHING)
    value = dynamic8.decode(made, load(made, "codes"), load(made, "group"), signed=True)
    codes, absmax = dynamic8.encode(made, value, signed=True)
    again = dynamic8.decode(made, codes, absmax, signed=True)
    assert [made.phases()[number] for number in (value, codes, again)] == [0, 1, 3]


def test_users_take_a_value_and_are_counted_once() -> None:
    made = program(*EVERYTHING)
    x = load(made, "x")
    square = made.emit("mul", (x, x))
    assert made.users() == [[square], []]


def test_bytes_are_those_that_move() -> None:
    made = program(*EVERYTHING)
    sizes = {buffer.name: made.bytes_of(buffer) for buffer in made.buffers}
    assert sizes == {
        "x": 3 * 21 * 4, "codes": 3 * 21, "row": 3 * 4, "column": 21 * 2, "group": 9 * 4, "step": 8,
        "packed": 3 * 11, "mask": 3 * 21, "made": 3 * 21 * 2,
    }  # fmt: skip
    assert made.bytes() == sum(sizes.values()) + sizes["x"] + sizes["codes"] + sizes["group"]
    assert [buffer.name for buffer in made.written()] == ["x", "codes", "group", "made"]


# -- text -------------------------------------------------------------------------------------------------------------


def everything() -> BlockProgram:
    """A program of every kind of line."""
    made = program(*EVERYTHING)
    absmax_of = made.emit("mul", (softmax(made), load(made, "row")))
    codes, absmax = dynamic8.encode(made, absmax_of, signed=True)
    bits = made.emit("f32", (made.emit("random_bits", (load(made, "step"),), ("seed", "param")),))
    bits = made.emit("mul", (bits, made.constant(1e6)))
    kept = made.emit("where", (load(made, "mask"), codes, load(made, "packed")))
    made.store("codes", kept)
    made.store("group", absmax)
    made.store("x", made.emit("add", (bits, made.emit("lookup", (load(made, "packed"),), ("table",)))))
    made.store("made", made.emit("minimum", (load(made, "column"), made.constant(math.inf))))
    return made


def test_a_programs_text_reads_back() -> None:
    made = everything()
    again = BlockProgram.parse(str(made))
    assert again == made
    assert str(again) == str(made)


def test_a_tables_entries_read_back_exactly() -> None:
    made = BlockProgram(SPACE, tables={"table": (0.1, -0.0, 1e-40, math.inf)})
    rounded = BlockProgram.parse(str(made)).tables["table"]
    assert rounded[1:] == (-0.0, pytest.approx(1e-40, rel=1e-4), math.inf)
    assert str(BlockProgram.parse(str(made))) == str(made)


def test_the_pretty_text_is_for_people() -> None:
    made = everything()
    lines = made.pretty().splitlines()
    assert lines[0] == "space 3 21 8"
    assert "table table, 2 entries" in lines
    assert any("constant 1000000 : f32 scalar" in line for line in lines)
    assert not any("0x" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty text is no program"),
        ("buffer x : f32 element in", "a program begins with its space, not with 'buffer x : f32 element in'"),
        ("space 1 2 2\nwhatever", "no line of a program: 'whatever'"),
        ("space 1 2", "no line of a program: 'space 1 2'"),
        ("space 1 2 2\n\n", "no line of a program: ''"),
        ("space 1 2 2\nbuffer x : f32", "no line of a program: 'buffer x : f32'"),
        ("space 1 2 2\nbuffer x : f8 element in", "no line of a program: 'buffer x : f8 element in'"),
        ("space 1 2 2\nbuffer x : f32 plane in", "no line of a program: 'buffer x : f32 plane in'"),
        ("space 1 2 2\nbuffer x : f32 element", "no line of a program: 'buffer x : f32 element'"),
        ("space 1 2 2\ntable t xyz", "no line of a program: 'table t xyz'"),
        ("space 1 2 2\n%0 = load x : f32 element", "no buffer 'x'"),
        ("space 1 2 2\nbuffer x : f32 element in\n%1 = load x : f32 element", "is not the next instruction"),
        ("space 1 2 2\n%0 = sqrt %3 : f32 scalar", "sqrt takes earlier instructions, got %3"),
        ("space 1 2 2\nbuffer x : f32 element out\nstore x %4", "no instruction %4"),
    ],
)
def test_what_is_no_program_is_refused_with_the_line(text: str, message: str) -> None:
    with pytest.raises(ProgramError) as raised:
        BlockProgram.parse(text)
    assert message in str(raised.value)
