"""Programs as C++ do what ``evaluate`` does.  Every test compiles once or not at all, or says how often."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Mapping, Sequence

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernels_support import Tensors, assert_like, compiled, evaluated, every_format, filled, load, program
from random_programs import random_program
from torch import Tensor

from qgalore_compile import formats, rng
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.cpp.printer import print_cpp
from qgalore_compile.kernels.ir.program import POINTWISE, BlockProgram, Buffer, Space

ODD = Space(3, 21, 8)


# -- operations -------------------------------------------------------------------------------------------------------

EXACT = ("add", "sub", "mul", "div", "minimum", "maximum", "neg", "abs", "sign", "floor", "ceil", "trunc",
         "round", "lt", "le", "gt", "ge", "eq", "ne", "round_bf16", "round_f16", "bool")  # fmt: skip
# PyTorch's vectorised square root is not always the nearest number, so it is here
LIBRARY = ("sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "tanh", "sigmoid", "erf", "sin",
           "cos", "pow")  # fmt: skip
OF_INTEGERS = ("add", "sub", "mul", "minimum", "maximum", "neg", "abs", "sign", "lt", "le", "gt", "ge", "eq", "ne",
               "bitand", "bitor", "bitxor", "f32", "bool")  # fmt: skip
OF_DOUBLES = ("add", "sub", "mul", "div", "minimum", "maximum", "neg", "abs", "sign", "floor", "ceil", "trunc", "lt",
              "le", "gt", "ge", "eq", "ne", "f32", "bool")  # fmt: skip
OF_BOOLS = ("and", "or", "not", "eq", "ne", "f32", "f64", "i32", "i64")


def all_operations(space: Space) -> BlockProgram:
    """Every operation on floats, integers and bools, on elements and with a constant on the right."""
    made = program(
        space, "x f32 element in", "y f32 element in", "i i32 element in", "j i32 element in", "p bool element in",
        "q bool element in", "r f32 row in", "flag bool scalar in", "m i64 element in", "n i64 element in",
        "d f64 element in", "e f64 element in",
    )  # fmt: skip
    x, y, i, j, p, q, r, flag, m, n, d, e = (load(made, buffer.name) for buffer in made.buffers)
    found: list[tuple[str, int]] = []
    for operations, (one, other), constant in (
        (EXACT + LIBRARY, (x, y), made.constant(0.75)),
        (OF_INTEGERS, (i, j), made.constant(3, "i32")),
        (OF_INTEGERS, (m, n), made.constant(-(2**63), "i64")),
        (OF_DOUBLES, (d, e), made.constant(0.1, "f64")),
        (OF_BOOLS, (p, q), made.constant(1, "bool")),
    ):
        for operation in operations:
            both = [one, other][: POINTWISE[operation]]
            found.append((operation, made.emit(operation, both)))
            if len(both) == 2 and operation in ("minimum", "maximum", "sub", "lt", "pow", "bitand"):
                found.append((operation, made.emit(operation, (one, constant))))
    small = made.emit("bitand", (i, made.constant(15, "i32")))
    found += [("shl", made.emit("shl", (small, made.constant(4, "i32")))), ("shr", made.emit("shr", (small, small)))]
    # casts of floats that int32 cannot hold are undefined in C++
    bounded = made.emit("maximum", (made.emit("minimum", (r, made.constant(99.0))), made.constant(-99.0)))
    found.append(("i32", made.emit("i32", (bounded,))))
    found.append(("f32", made.emit("f32", (x,))))
    found += [("as_i32", made.emit("as_i32", (x,))), ("as_f32", made.emit("as_f32", (i,)))]
    found += [(kind, made.emit(kind, (value,))) for kind, value in (("i64", i), ("i32", m), ("f64", m), ("f64", x))]
    for condition in (p, flag):
        for branches in ((x, y), (i, j), (p, q), (m, n), (d, e)):
            found.append(("where", made.emit("where", (condition, *branches))))
    assert {name for name, _ in found} == set(POINTWISE)
    for number, (name, value) in enumerate(found):
        made.buffers.append(Buffer(f"{name}_{number}", made.instructions[value].type, "element", "out"))
        made.store(f"{name}_{number}", value)
    return made


def test_every_operation_is_pytorchs_also_for_special_values() -> None:
    special = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 1e-40, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor([one for one in special for _ in special])
    y = torch.tensor([other for _ in special for other in special])
    made = all_operations(Space(3, len(x) + 30, 25))
    size = (3, len(x) + 30)
    xs, ys = torch.randn(size) * 3, torch.randn(size) * 3
    xs[1, : len(x)], ys[1, : len(x)] = x, y
    integers = torch.randint(-(2**31), 2**31, size)
    tensors = filled(
        made, x=xs, y=ys, i=integers, j=integers.roll(1, -1), flag=torch.tensor(True), d=xs.double() * 1.1,
        e=ys.double(),
    )  # fmt: skip
    found, expected = compiled(made, tensors), evaluated(made, tensors)
    for buffer in made.written():
        one, other = found[buffer.name], expected[buffer.name]
        if buffer.name.rsplit("_", 1)[0] in LIBRARY:
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-6, equal_nan=True), buffer.name
        else:
            assert torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7)), buffer.name
            assert torch.equal(one.isnan(), other.isnan()), buffer.name


def test_reductions_propagate_nan_and_infinities() -> None:
    made = program(ODD, "x f32 element in", *(f"{each} f32 group out" for each in ("min", "max", "sum")))
    for each in ("min", "max", "sum"):
        made.store(each, made.emit(f"group_{each}", (load(made, "x"),)))
    x = torch.randn(3, 21)
    x[0, 3], x[1, 20], x[1, 0], x[2, :8] = torch.nan, torch.inf, -torch.inf, torch.nan
    tensors = filled(made, x=x)
    found = compiled(made, tensors)
    assert_like(found, evaluated(made, tensors), made)
    assert found["min"].isnan().tolist() == [[True, False, False], [False] * 3, [True, False, False]]
    assert found["max"][1, 2] == torch.inf
    assert found["min"][1, 0] == -torch.inf


def test_the_largest_size_of_a_group_propagates_nan_and_infinities() -> None:
    made = program(ODD, "x f32 element in", "most f32 group out")
    made.store("most", made.emit("group_max", (made.emit("abs", (load(made, "x"),)),)))
    x = torch.randn(3, 21) * 1e-3
    x[0, 3], x[0, 20], x[1, 20], x[2, 0], x[2, 1], x[2, 8:16] = torch.nan, -1e-40, -torch.inf, -torch.nan, 3e38, -0.0
    tensors = filled(made, x=x)
    found, expected = compiled(made, tensors)["most"], evaluated(made, tensors)["most"]
    assert torch.equal(found.nan_to_num(-1.0, -2.0), expected.nan_to_num(-1.0, -2.0))
    assert found.isnan().tolist() == [[True, False, False], [False] * 3, [True, False, False]]


def test_constants_that_are_nan_or_infinite_propagate() -> None:
    made = program(Space(1, 4, 4), "x f32 element in", *(f"o{index} f32 element out" for index in range(4)))
    x = load(made, "x")
    for index, (operation, value) in enumerate(
        (("minimum", torch.nan), ("maximum", torch.nan), ("minimum", -torch.inf), ("add", torch.inf))
    ):
        made.store(f"o{index}", made.emit(operation, (x, made.constant(value))))
    tensors = filled(made)
    assert_like(compiled(made, tensors), evaluated(made, tensors), made)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_every_format_is_loaded_and_stored() -> None:
    made = every_format(ODD)
    made.buffers += program(ODD, "packed u4 element in", "nibbles u8 element out").buffers
    made.store("nibbles", load(made, "packed"))
    tensors = filled(made, packed=formats.pack_int4(torch.randint(0, 16, (3, 21), dtype=torch.uint8)))
    tensors["in_element_bf16"][0, 0], tensors["in_element_f16"][0, 0] = torch.nan, torch.inf
    found = compiled(made, tensors)
    assert_like(found, evaluated(made, tensors), made, tolerance=1e-6)
    assert torch.equal(found["nibbles"], formats.unpack_int4(tensors["packed"], 21))
    assert torch.equal(found["out_element_bf16"].view(torch.int16), tensors["in_element_bf16"].view(torch.int16))


def test_float32_rounds_to_bf16_and_f16_like_pytorch() -> None:
    made = program(Space(1, 4096, 256), "x f32 element in", "b bf16 element out", "h f16 element out")
    x = load(made, "x")
    made.store("b", x)
    made.store("h", x)
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    bits[:64] = (bits[:64] & ~0xFFFF) | 0x8000  # ties
    tensors = filled(made, x=bits.view(torch.float32))
    found = compiled(made, tensors)
    for name, dtype in (("b", torch.bfloat16), ("h", torch.float16)):
        torch.testing.assert_close(found[name], tensors["x"].to(dtype), rtol=0, atol=0, equal_nan=True)


def test_what_is_bf16_already_is_chosen_and_stored_as_it_is() -> None:
    """Two compiles: a condition from outside the loop and one of each element."""
    for extent in ("scalar", "element"):
        made = program(
            Space(3, 45, 11), "ok bool " + extent + " in", "x f32 element in", "old bf16 element inout",
            "twice f32 element out",
        )  # fmt: skip
        new = made.emit("round_bf16", (load(made, "x"),))
        chosen = made.emit("where", (load(made, "ok"), new, load(made, "old")))
        made.store("old", made.emit("round_bf16", (chosen,)))
        made.store("twice", made.emit("round_bf16", (made.emit("add", (chosen, load(made, "old"))),)))
        tensors = filled(made)
        tensors["x"][0, :3] = torch.tensor([torch.nan, torch.inf, 1e-40])
        tensors["old"][1, :3] = torch.tensor([torch.nan, -torch.inf, 1e-40])
        found, expected = compiled(made, tensors), evaluated(made, tensors)
        for name in ("old", "twice"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)


def test_random_bits_are_those_of_rng_also_where_a_group_begins_within_a_counter() -> None:
    """Two compiles."""
    for space in (Space(3, 45, 11), Space(1, 600, 256)):
        made = program(space, "step i64 scalar in", "bits i32 element out", numbers=("seed", "param"))
        made.store("bits", made.emit("random_bits", (load(made, "step"),), ("seed", "param")))
        for seed, step, param in ((0, 0, 0), (-1, 2**31 - 1, 2**31 - 1), (2**63 - 1, 12345, 7), (-(2**63), 1, 1)):
            tensors = filled(made, step=torch.tensor(step))
            found = compiled(made, tensors, {"seed": seed, "param": param})["bits"]
            assert torch.equal(found, rng.random_bits(space[:2], seed=seed, step=step, param=param))


# -- in place ---------------------------------------------------------------------------------------------------------


def test_what_a_later_phase_reads_is_what_was_there_before() -> None:
    """Codes that are cast in one phase, read again in the next, and stored between."""
    made = program(ODD, "codes u8 element inout", "x f32 element inout", "y f32 element inout", "out f32 element out")
    codes, x = load(made, "codes"), load(made, "x")
    wide = made.emit("f32", (codes,))
    made.store("codes", made.emit("bitxor", (codes, made.constant(1, "i32"))))
    made.store("out", made.emit("sub", (wide, made.emit("group_min", (wide,)))))
    # y is read after a reduction, so it is written last; what it takes is read from x, which is written first
    made.store("x", made.emit("mul", (x, made.constant(2.0))))
    made.store("y", x)
    y = load(made, "y")
    made.buffers += program(ODD, "z f32 element out").buffers
    made.store("z", made.emit("sub", (y, made.emit("group_max", (y,)))))
    tensors = filled(made)
    assert_like(compiled(made, tensors), evaluated(made, tensors), made)


def test_buffers_that_swap_their_values_do() -> None:
    made = program(ODD, "a f32 element inout", "b f32 element inout", "s f32 group inout", "t f32 group inout")
    for one, other in (("a", "b"), ("s", "t")):
        made.store(one, load(made, other))
        made.store(other, load(made, one))
    tensors = filled(made)
    found = compiled(made, tensors)
    for one, other in (("a", "b"), ("s", "t")):
        assert torch.equal(found[one], tensors[other])
        assert torch.equal(found[other], tensors[one])


def normalised(space: Space) -> BlockProgram:
    """Elements less their group's mean over its largest, in place; with random bits and a column."""
    made = program(
        space, "x f32 element inout", "c bf16 column in", "r f32 row in", "most f32 group out", "step i64 scalar in",
        numbers=("seed", "param"),
    )  # fmt: skip
    bits = made.emit("f32", (made.emit("random_bits", (load(made, "step"),), ("seed", "param")),))
    value = made.emit("add", (load(made, "x"), made.emit("mul", (bits, made.constant(2.0**-16)))))
    value = made.emit("add", (value, made.emit("mul", (load(made, "c"), load(made, "r")))))
    most = made.emit("group_max", (made.emit("abs", (value,)),))
    value = made.emit("div", (value, most))
    total = made.emit("group_sum", (made.emit("abs", (value,)),))
    made.store("x", made.emit("mul", (value, total)))
    made.store("most", most)
    return made


def launch(
    kernel: cpu.Kernel, tensors: Tensors, numbers: Sequence[int], rows: tuple[int, int], groups: tuple[int, int],
    blocks: Mapping[str, tuple[Tensor, int, int]] | None = None,
) -> None:  # fmt: skip
    """Run a program on some rows and groups; a buffer among ``blocks`` is there from a row and column on."""
    names = [buffer.name for buffer in kernel.program.buffers]
    addresses = kernel.addresses(range(len(names)), [tensors[name] for name in names])
    pitches = list(kernel.pitches)
    for name, (block, row, column) in (blocks or {}).items():
        place, pitch = names.index(name), block.stride(0)
        pitches[place] = pitch
        addresses[place] = block.data_ptr() - (row * pitch + column) * block.element_size()
    held = (ctypes.c_int64 * len(pitches))(*pitches)
    kernel.launch(kernel.pack(*addresses), held, cpu.packed(numbers), *rows, *groups)


def test_blocks_of_rows_and_groups_are_parts_of_the_whole() -> None:
    space = Space(7, 45, 11)
    made = normalised(space)
    tensors = filled(made)
    numbers = {"seed": 1, "param": 2}
    whole = compiled(made, tensors, numbers)
    kernel = cpu.kernel(str(made))
    parts = {name: tensor.clone() for name, tensor in tensors.items()}
    found = torch.zeros(7, 45)
    blocks = [(r, g) for r in (0, 3, 6) for g in (0, 2, 4)]
    random.Random(0).shuffle(blocks)
    for row, group in blocks:
        rows, groups = (row, min(row + 3, 7)), (group, min(group + 2, space.groups))
        place = (slice(*rows), slice(group * 11, min(groups[1] * 11, 45)))
        block = tensors["x"][place].clone()  # of another pitch than the matrix
        launch(kernel, parts, [1, 2], rows, groups, {"x": (block, row, group * 11)})
        found[place] = block
    assert torch.equal(found, whole["x"])
    assert torch.equal(parts["most"], whole["most"])


# -- any program ------------------------------------------------------------------------------------------------------


@settings(max_examples=settings().max_examples // 12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_any_program_does_what_evaluate_does(seed: int) -> None:
    """One compile an example."""
    made = random_program(seed)
    torch.manual_seed(seed)
    tensors, numbers = filled(made), {"seed": seed, "param": 3}
    found, expected = compiled(made, tensors, numbers), evaluated(made, tensors, numbers)
    assert_like(found, expected, made)
    kernel, parts = cpu.kernel(str(made)), {name: tensor.clone() for name, tensor in tensors.items()}
    places = [(row, group) for row in range(made.space.rows) for group in range(made.space.groups)]
    random.Random(seed).shuffle(places)
    for row, group in places:
        launch(kernel, parts, [numbers[name] for name in made.numbers], (row, row + 1), (group, group + 1))
    for name, tensor in found.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_equal_texts_are_one_kernel_and_the_source_tells_the_program() -> None:
    made = normalised(Space(7, 45, 11))
    assert cpu.kernel(str(made)) is cpu.kernel(str(BlockProgram.parse(str(made))))
    source = print_cpp(made)
    assert source == print_cpp(BlockProgram.parse(str(made)))
    for line in made.pretty().splitlines():
        assert f"// {line}" in source
