"""Programs as Triton do what ``evaluate`` does; the kernels run in Triton's interpreter, on NumPy."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernels_support import FORMATS, assert_like, evaluated, every_format, filled, load, program
from random_programs import random_program

pytest.importorskip("triton")

from interpreted import ODD, assert_same, kernel_of, ran

from qgalore_compile import formats, rng
from qgalore_compile.kernels.ir.program import POINTWISE, BlockProgram, Buffer, Space
from qgalore_compile.kernels.triton.ahead import compile_kernel
from qgalore_compile.kernels.triton.kernels import load as load_kernel
from qgalore_compile.kernels.triton.kernels import region_kernel
from qgalore_compile.kernels.triton.printer import print_region
from qgalore_compile.kernels.triton.targets import Target

pytestmark = pytest.mark.triton

SPACES = [Space(3, 45, 11), Space(2, 40, 8), Space(1, 40, 4), Space(5, 24, 24), Space(3, 64, 16), Space(2, 21, 16)]


# -- operations -------------------------------------------------------------------------------------------------------

ROUNDED_ALIKE = ("add", "sub", "mul", "div", "neg", "abs", "floor", "ceil", "trunc", "round_bf16", "round_f16", "f32",
                 "where")  # fmt: skip
"""Where the sign of a zero is PyTorch's, too."""
LIBRARY = {"sqrt": 1e-7, "rsqrt": 2.5e-7, "exp": 3e-7, "exp2": 3e-7, "expm1": 1e-6, "log": 3e-7, "log2": 3e-7,
           "log10": 3e-7, "log1p": 5e-7, "tanh": 1e-6, "sigmoid": 5e-7, "erf": 1e-6, "sin": 3e-7, "cos": 3e-7,
           "pow": 2e-5}  # fmt: skip
"""Relative errors.  That of a power is the exponent's, 2**-24 times its logarithm: at most 128."""


def floats() -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of all special values, halves and random numbers."""
    special = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 4194303.5, -4194303.5, 8388609.0, 1e-40,
               1e30, -1e30, 3.4e38, torch.inf, -torch.inf, torch.nan]  # fmt: skip
    x = torch.tensor([one for one in special for _ in special])
    y = torch.tensor([other for _ in special for other in special])
    return torch.cat([x, torch.randn(500) * 3]), torch.cat([y, torch.randn(500) * 3])


def pointwise(kind: str, operations: tuple[str, ...], constant: float) -> BlockProgram:
    """Operations on two buffers of a type, and with a constant on the right."""
    made = program(Space(1, 1, 1), f"x {kind} element in", f"y {kind} element in", "p bool element in")
    x, y, p = (load(made, buffer.name) for buffer in made.buffers)
    right = made.constant(constant, kind)
    for operation in operations:
        several = {1: [(x,)], 2: [(x, y), (x, right)], 3: [(p, x, y), (p, x, right)]}[POINTWISE[operation]]
        for index, args in enumerate(several):
            value = made.emit(operation, args)
            made.buffers.append(Buffer(f"{operation}_{index}", made.instructions[value].type, "element", "out"))
            made.store(f"{operation}_{index}", value)
    return made


OF_FLOATS = ("add", "sub", "mul", "div", "minimum", "maximum", "neg", "abs", "sign", "floor", "ceil", "trunc", "round",
             "lt", "le", "gt", "ge", "eq", "ne", "f32", "bool", "where", "round_bf16", "round_f16",
             "as_i32")  # fmt: skip
OF_INTEGERS = ("add", "sub", "mul", "minimum", "maximum", "neg", "abs", "sign", "lt", "le", "gt", "ge", "eq", "ne",
               "bitand", "bitor", "bitxor", "f32", "i32", "i64", "bool", "where")  # fmt: skip
OF_DOUBLES = ("add", "sub", "mul", "div", "minimum", "maximum", "neg", "abs", "sign", "floor", "ceil", "trunc",
              "lt", "le", "gt", "ge", "eq", "ne", "f32", "f64", "bool", "where")  # fmt: skip
DOUBLE_LIBRARY = ("sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log1p", "pow")
OF_BOOLS = ("and", "or", "not", "eq", "ne", "f32", "i32", "i64", "bool", "where")
OF_SMALL = ("shl", "shr")
OF_BITS = ("as_f32",)


def test_the_tables_below_name_every_operation() -> None:
    assert {*OF_FLOATS, *OF_DOUBLES, *LIBRARY, *OF_INTEGERS, *OF_BOOLS, *OF_SMALL, *OF_BITS} == set(POINTWISE)


@pytest.mark.parametrize(
    ("kind", "operations", "constant"),
    [("f32", OF_FLOATS, 0.75), ("f64", OF_DOUBLES, 0.1), ("i32", OF_INTEGERS, 3), ("i64", OF_INTEGERS, 5 << 33),
     ("i32", OF_SMALL, 4), ("i32", OF_BITS, 4), ("bool", OF_BOOLS, 1)],
    ids=["floats", "doubles", "integers", "long integers", "shifts", "bits", "bools"],
)  # fmt: skip
def test_exact_operations_are_pytorchs_bit_for_bit(kind: str, operations: tuple[str, ...], constant: float) -> None:
    made = pointwise(kind, operations, constant)
    x, y = floats()
    if kind == "f64":
        x, y = x.double() * 1.1, y.double()
    if kind in ("i32", "i64"):
        most = 1 << {"i32": 31, "i64": 62}[kind]
        x, y = (torch.randint(-most, most, x.shape) for _ in range(2))
        if operations is OF_SMALL:
            x, y = x & 15, y & 15
    if kind == "bool":
        x, y = torch.rand(len(x)) < 0.5, torch.rand(len(x)) < 0.5
    made.space = Space(1, len(x), 25)
    tensors = filled(made, x=x, y=y)
    found, expected = ran(made, tensors), evaluated(made, tensors)
    for buffer in made.written():
        operation = buffer.name[: buffer.name.rindex("_")]
        assert_same(found[buffer.name], expected[buffer.name], buffer.name, zeros=operation in ROUNDED_ALIKE)


def test_library_functions_are_pytorchs_within_a_few_roundings() -> None:
    made = pointwise("f32", tuple(LIBRARY), 3.0)
    x, y = floats()
    made.space = Space(1, len(x), 25)
    tensors = filled(made, x=x, y=y)
    found = ran(made, tensors)
    for buffer in made.written():
        operation, index = buffer.name.rsplit("_", 1)
        args = [x.double(), y.double() if index == "0" else torch.tensor(3.0, dtype=torch.float64)]
        exact = getattr(torch, operation)(*args[: POINTWISE[operation]]).float()
        one, tolerance = found[buffer.name].flatten(), LIBRARY[operation]
        if operation in ("sin", "cos"):  # of what has no digits behind the point, whatever one likes
            one, exact = (torch.where(x.abs() < 1e4, each, 0) for each in (one, exact))
        torch.testing.assert_close(
            one, exact, rtol=tolerance, atol=1e-7 if operation in ("sin", "cos", "exp", "exp2", "pow") else 1e-37,
            equal_nan=True, msg=lambda text, name=buffer.name: f"{name}: {text}",
        )  # fmt: skip


def test_library_functions_of_float64_are_numpys() -> None:
    """Those of bias corrections: a logarithm of a number near 1 is off by what the number was rounded by."""
    made = pointwise("f64", DOUBLE_LIBRARY, 3.0)
    x, y = torch.rand(200, dtype=torch.float64) * 2 + 0.01, torch.rand(200, dtype=torch.float64)
    x[:50] *= 1e-9
    made.space = Space(1, len(x), 25)
    found = ran(made, filled(made, x=x, y=y))
    for buffer in made.written():
        operation, index = buffer.name.rsplit("_", 1)
        args = [x, y if index == "0" else torch.tensor(3.0, dtype=torch.float64)][: POINTWISE[operation]]
        exact = getattr(torch, operation)(*args)
        torch.testing.assert_close(found[buffer.name].flatten(), exact, rtol=1e-14, atol=1e-15, msg=buffer.name)


def test_round_is_to_even_at_every_half() -> None:
    made = pointwise("f32", ("round",), 0.0)
    x = torch.cat([torch.arange(-300, 300) + 0.5, 2.0 ** torch.arange(10, 25) + 0.5, torch.tensor([0.49999997])])
    made.space = Space(1, len(x), 64)
    tensors = filled(made, x=x)
    assert_same(ran(made, tensors)["round_0"], x.round()[None], "round", zeros=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_constants_that_are_nan_or_infinite_propagate(value: float) -> None:
    made = pointwise("f32", ("add", "mul", "minimum", "maximum", "where"), value)
    x, y = floats()
    made.space = Space(1, len(x), 16)
    tensors = filled(made, x=x, y=y)
    found, expected = ran(made, tensors), evaluated(made, tensors)
    for buffer in made.written():
        assert_same(found[buffer.name], expected[buffer.name], buffer.name, zeros=False)


# -- groups -----------------------------------------------------------------------------------------------------------


def reducing(space: Space) -> BlockProgram:
    """Each group's least, largest and sum, and elements less their group's largest."""
    made = program(space, "x f32 element in", *(f"{each} f32 group out" for each in ("min", "max", "sum")))
    x = load(made, "x")
    for each in ("min", "max", "sum"):
        made.store(each, made.emit(f"group_{each}", (x,)))
    made.buffers += program(space, "less f32 element out").buffers
    made.store("less", made.emit("sub", (x, made.emit("group_max", (x,)))))
    return made


@pytest.mark.parametrize("space", SPACES, ids=lambda space: "x".join(map(str, space)))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_reductions_take_the_columns_of_a_group_and_no_other(space: Space, sign: float) -> None:
    """Of one sign: what a short group lacks, zeros say, would show as its least or its largest."""
    made = reducing(space)
    tensors = filled(made, x=sign * (torch.rand(space[:2]) + 1))
    assert_like(ran(made, tensors), evaluated(made, tensors), made)


def test_reductions_propagate_nan_and_infinities() -> None:
    made = reducing(ODD)
    x = torch.randn(3, 21)
    x[0, 3], x[1, 20], x[1, 0], x[2, :8] = torch.nan, torch.inf, -torch.inf, torch.nan
    found = ran(made, tensors := filled(made, x=x))
    assert_like(found, evaluated(made, tensors), made)
    assert found["min"].isnan().tolist() == [[True, False, False], [False] * 3, [True, False, False]]
    assert (found["max"][1, 2], found["min"][1, 0]) == (torch.inf, -torch.inf)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [ODD, Space(2, 32, 8)], ids=["odd", "whole"])
def test_every_format_is_loaded_and_stored(space: Space) -> None:
    made = every_format(space)
    tensors = filled(made)
    tensors["in_element_bf16"][0, 0], tensors["in_element_f16"][0, 0] = torch.nan, torch.inf
    found = ran(made, tensors)
    assert_like(found, evaluated(made, tensors), made)
    for kind in FORMATS:
        for extent in ("element", "group"):
            assert_same(found[f"out_{extent}_{kind}"], tensors[f"in_{extent}_{kind}"], f"{extent} {kind}")


@pytest.mark.parametrize(
    "space",
    # halves that begin with a group; within one; within one of a width that is no power of two; at an odd column
    [
        Space(3, 64, 16),
        Space(3, 32, 32),
        Space(2, 48, 12),
        Space(2, 60, 24),
        Space(2, 64, 24),
        Space(3, 45, 8),
        Space(5, 1, 8),
    ],
    ids=lambda space: "x".join(map(str, space)),
)
def test_packed_nibbles_are_loaded_wherever_the_second_half_of_a_row_begins(space: Space) -> None:
    made = program(space, "packed u4 element in", "codes u8 element out")
    made.store("codes", load(made, "packed"))
    codes = torch.randint(0, 16, space[:2], dtype=torch.uint8)
    found = ran(made, filled(made, packed=formats.pack_int4(codes)))
    assert torch.equal(found["codes"], codes)


@pytest.mark.parametrize("entries", [1, 2, 5, 16, 256])
@pytest.mark.parametrize("extent", ["element", "group"])
def test_a_table_of_any_length_is_looked_up(entries: int, extent: str) -> None:
    made = program(ODD, f"index u8 {extent} in", f"out f32 {extent} out")
    made.tables["table"] = tuple(torch.randn(entries).tolist())
    made.store("out", made.emit("lookup", (load(made, "index"),), ("table",)))
    size = (3, 21) if extent == "element" else (3, 3)
    tensors = filled(made, index=torch.randint(0, entries, size))
    assert torch.equal(ran(made, tensors)["out"], evaluated(made, tensors)["out"])


# -- random bits ------------------------------------------------------------------------------------------------------


def drawing(space: Space) -> BlockProgram:
    made = program(space, "step i64 scalar in", "bits i32 element out", numbers=("seed", "param"))
    made.store("bits", made.emit("random_bits", (load(made, "step"),), ("seed", "param")))
    return made


@pytest.mark.parametrize("space", SPACES, ids=lambda space: "x".join(map(str, space)))
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_random_bits_are_those_of_rng_however_the_space_is_tiled(space: Space, rows: int) -> None:
    made = drawing(space)
    tensors = filled(made, step=torch.tensor(12345))
    found = ran(made, tensors, {"seed": 1, "param": 7}, rows)["bits"]
    assert torch.equal(found, rng.random_bits(space[:2], seed=1, step=12345, param=7))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 + 5, 2**63 - 1, -(2**63)])
def test_random_bits_take_all_of_a_seed_a_step_and_a_parameter(seed: int) -> None:
    made = drawing(Space(2, 16, 8))
    for step, param in ((0, 0), (1, 1), (2**31 - 1, 2**31 - 1)):
        found = ran(made, filled(made, step=torch.tensor(step)), {"seed": seed, "param": param})["bits"]
        assert torch.equal(found, rng.random_bits((2, 16), seed=seed, step=step, param=param))


def test_a_parameters_number_is_a_pointer_and_a_seed_an_integer() -> None:
    kernel = region_kernel(drawing(ODD))
    assert kernel.signature == {"step": "*i64", "bits": "*i32", "seed": "i64", "param": "*i32"}
    assert kernel.params == {"param"}


# -- the source -------------------------------------------------------------------------------------------------------


def scaled(space: Space, *buffers: str) -> BlockProgram:
    made = program(space, "x f32 element in", "s f32 group in", "y f32 element out", *buffers)
    value = made.emit("mul", (load(made, "x"), load(made, "s")))
    for buffer in made.buffers[3:]:
        value = made.emit("add", (value, made.emit("f32", (load(made, buffer.name),))
                                  if buffer.memory == "u4" else load(made, buffer.name)))  # fmt: skip
    made.store("y", value)
    return made


@pytest.mark.parametrize(
    ("made", "flat"),
    [
        (scaled(Space(6, 48, 8)), True),
        (scaled(Space(6, 48, 8), "z f32 scalar in"), True),
        (scaled(Space(6, 45, 8)), False),  # a short group: the next row does not follow
        (scaled(Space(6, 48, 8), "z f32 row in"), False),
        (scaled(Space(6, 48, 8), "z f32 column in"), False),
        (scaled(Space(6, 48, 8), "z u4 element in"), False),
        (drawing(Space(6, 48, 8)), False),
    ],
    ids=["groups", "scalar", "short", "row", "column", "nibbles", "random bits"],
)
def test_rows_are_divided_out_only_where_something_asks_for_them(made: BlockProgram, flat: bool) -> None:
    source = print_region(made, 4)
    assert ("at // 6" not in source) == flat
    tensors, numbers = filled(made), {"seed": 1, "param": 2}
    assert_like(ran(made, tensors, numbers, 4), evaluated(made, tensors, numbers), made)


def test_the_source_needs_triton_alone(tmp_path: Path) -> None:
    made = drawing(ODD)
    source = region_kernel(made).source
    path = tmp_path / "alone.py"
    path.write_text(source)
    assert callable(runpy.run_path(str(path))["region"])  # Triton reads a function's source from its file
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import triton", "import triton.language as tl"]
    for line in made.pretty().splitlines():
        assert f"# {line}" in source


def test_equal_programs_have_equal_sources() -> None:
    made = reducing(ODD)
    assert print_region(made, 4) == print_region(BlockProgram.parse(str(made)), 4)


# -- any program ------------------------------------------------------------------------------------------------------


@settings(max_examples=settings().max_examples * 2 // 5, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(seed=st.integers(0, 2**32 - 1), rows=st.sampled_from([None, 1, 2, 16]))
def test_any_program_does_what_evaluate_does(seed: int, rows: int | None) -> None:
    made = random_program(seed)
    torch.manual_seed(seed)
    tensors, numbers = filled(made), {"seed": seed, "param": 3}
    found = ran(made, tensors, numbers, rows)
    assert_like(found, evaluated(made, tensors, numbers), made)
    kernel = kernel_of(made, rows)
    assert not any("fp64" in each for each in kernel.signature.values())
    assert "float64" not in kernel.source


# -- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_operation_compiles_and_none_of_it_computes_in_fp64(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six compiles a target.  NVIDIA's own sine and cosine reduce large angles in fp64."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    angles = ("sin", "cos")
    others = tuple(each for each in LIBRARY if each not in angles)
    for kind, operations in (
        ("f32", OF_FLOATS + others), ("f32", angles), ("i32", OF_INTEGERS + OF_SMALL + OF_BITS), ("bool", OF_BOOLS),
        ("i64", OF_INTEGERS + OF_SMALL), ("f64", OF_DOUBLES + DOUBLE_LIBRARY),
    ):  # fmt: skip
        made = pointwise(kind, operations, 1)
        made.space = Space(4, 256, 32)
        kernel = region_kernel(made)
        binary = compile_kernel(
            load_kernel(kernel), kernel.signature, {}, Target.named(target), kernel.warps, kernel.stages
        )
        if operations is not angles and kind != "f64":
            assert not re.search(r"\b(add|mul|fma|div)\.\w*\.?f64|\bv_\w+_f64", binary.text)
