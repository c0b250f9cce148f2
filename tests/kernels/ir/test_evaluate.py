"""The oracle of all printers, against plain torch and float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels_support import evaluated, filled, load, program
from torch import Tensor

from qgalore_compile import formats, rng
from qgalore_compile.kernels.ir.evaluate import evaluate
from qgalore_compile.kernels.ir.program import POINTWISE, TYPES, BlockProgram, Space

ODD = Space(3, 21, 8)
SPACES = [ODD, Space(1, 5, 8), Space(4, 16, 8), Space(2, 7, 1)]


def by_group(x: Tensor, space: Space) -> list[list[Tensor]]:
    """x (rows, columns) as its groups, the last of a row possibly short."""
    return [list(row.split(space.width)) for row in x]


def spread(per_group: Tensor, space: Space) -> Tensor:
    """One value for each element from one for each group."""
    return torch.stack([row[torch.arange(space.columns) // space.width] for row in per_group])


@pytest.mark.parametrize("space", SPACES)
def test_a_reduction_is_over_the_elements_of_a_group(space: Space) -> None:
    made = program(space, "x f32 element in", *(f"{each} f32 group out" for each in ("low", "high", "total")))
    for name, operation in (("low", "group_min"), ("high", "group_max"), ("total", "group_sum")):
        made.store(name, made.emit(operation, (load(made, "x"),)))
    tensors = filled(made, x=torch.randn(space.rows, space.columns) - 3)  # the neutral 0 of a fill is the largest
    found = evaluated(made, tensors)
    groups = by_group(tensors["x"].double(), space)
    for name, reduce in (("low", torch.amin), ("high", torch.amax), ("total", torch.sum)):
        expected = torch.stack([torch.stack([reduce(group) for group in row]) for row in groups])
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_values_of_every_extent_meet_in_the_right_places(space: Space) -> None:
    made = program(
        space, "x f32 element in", "row f32 row in", "column f32 column in", "group f32 group in", "one f32 scalar in",
        "out f32 element out", "by_row f32 group out",
    )  # fmt: skip
    value = load(made, "x")
    for name in ("row", "column", "group", "one"):
        value = made.emit("add", (made.emit("mul", (value, made.constant(10.0))), load(made, name)))
    made.store("out", value)
    made.store("by_row", load(made, "row"))
    t = filled(made)
    found = evaluated(made, t)
    expected = t["x"]
    for part in (t["row"][:, None], t["column"], spread(t["group"], space), t["one"]):
        expected = expected * 10 + part
    torch.testing.assert_close(found["out"], expected)
    assert torch.equal(found["by_row"], t["row"][:, None].expand(space.rows, space.groups))


@pytest.mark.parametrize("space", SPACES)
def test_an_int8_write_back_is_that_of_the_formats(space: Space) -> None:
    made = program(
        space, "codes u8 element inout", "scale f32 group inout", "offset f32 group inout", "x f32 element in",
        "step f32 scalar in", numbers=("seed", "param"),
    )  # fmt: skip
    emit, constant = made.emit, made.constant
    old = emit("f32", (load(made, "codes"),))
    old = emit("add", (emit("mul", (old, load(made, "scale"))), load(made, "offset")))
    new = emit("sub", (old, emit("mul", (load(made, "x"), constant(0.1)))))
    low = emit("group_min", (new,))
    scale = emit("div", (emit("sub", (emit("group_max", (new,)), low)), constant(255.0)))
    level = emit("sub", (new, low))
    level = emit("div", (level, emit("where", (emit("gt", (scale, constant(0.0))), scale, constant(1.0)))))
    floor = emit("floor", (level,))
    noise = emit("f32", (emit("random_bits", (load(made, "step"),), ("seed", "param")),))
    up = emit("mul", (emit("sub", (level, floor)), constant(65536.0)))
    up = emit("lt", (emit("add", (noise, constant(0.5))), up))
    code = emit("add", (floor, emit("f32", (up,))))
    code = emit("minimum", (emit("maximum", (code, constant(0.0))), constant(255.0)))
    for name, value in (("codes", emit("i32", (code,))), ("scale", scale), ("offset", low)):
        made.store(name, value)
    stored = formats.quantize_int8(torch.randn(space.rows, space.columns), space.width)
    step = torch.tensor(7.0)
    t = filled(made, codes=stored.codes, scale=stored.scale, offset=stored.offset, step=step)
    found = evaluated(made, t, {"seed": -3, "param": 5})
    weight = formats.dequantize_int8(*stored[:3], space.width) - 0.1 * t["x"]
    bits = rng.random_bits((space.rows, space.columns), seed=-3, step=step, param=5)
    expected = formats.quantize_int8(weight, space.width, noise=bits)
    for name in ("codes", "scale", "offset"):
        assert torch.equal(found[name], getattr(expected, name)), name


def test_adam_is_that_of_float64_numpy() -> None:
    made = program(ODD, *(f"{name} f32 element inout" for name in "mv"), "g f32 element in", "n f32 element out")
    emit, constant = made.emit, made.constant
    g = load(made, "g")
    m = emit("add", (emit("mul", (load(made, "m"), constant(0.9))), emit("mul", (g, constant(0.1)))))
    v = emit("mul", (emit("mul", (g, g)), constant(0.001)))
    v = emit("add", (emit("mul", (load(made, "v"), constant(0.999))), v))
    made.store("m", m)
    made.store("v", v)
    made.store("n", emit("div", (m, emit("add", (emit("sqrt", (v,)), constant(1e-8))))))
    t = filled(made, v=torch.rand(ODD[:2]))
    found = evaluated(made, t)
    m64, v64, g64 = (t[name].numpy().astype(np.float64) for name in "mvg")
    m64, v64 = 0.9 * m64 + 0.1 * g64, 0.999 * v64 + 0.001 * g64**2
    for name, expected in (("m", m64), ("v", v64), ("n", m64 / (np.sqrt(v64) + 1e-8))):
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("columns", [1, 2, 7, 16, 21])
def test_packed_nibbles_are_planar(columns: int) -> None:
    made = program(Space(3, columns, 8), "packed u4 element in", "out u8 element out")
    made.store("out", load(made, "packed"))
    codes = torch.randint(0, 16, (3, columns), dtype=torch.uint8)
    found = evaluated(made, filled(made, packed=formats.pack_int4(codes)))
    assert torch.equal(found["out"], codes)


@pytest.mark.parametrize("memory", ["bf16", "f16"])
def test_narrow_floats_round_in_memory_and_where_told_to(memory: str) -> None:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[memory]
    made = program(ODD, f"x {memory} element in", f"stored {memory} element out", "rounded f32 element out")
    third = made.emit("div", (load(made, "x"), made.constant(3.0)))
    made.store("stored", third)
    made.store("rounded", made.emit(f"round_{memory}", (third,)))
    t = filled(made)
    found = evaluated(made, t)
    assert torch.equal(found["stored"], (t["x"].float() / 3).to(dtype))
    assert torch.equal(found["rounded"], found["stored"].float())


def test_all_pointwise_operations_are_known() -> None:
    for operation, count in POINTWISE.items():
        for kind in TYPES:
            made = BlockProgram(ODD)
            args = [made.constant(2 + index, kind) for index in range(count)]
            if operation == "where":
                args[0] = made.constant(1, "bool")
            try:
                made.emit(operation, args)
            except ValueError:
                continue
            evaluate(made, {})
            break
        else:
            pytest.fail(f"{operation} takes no type")


def test_integers_of_64_bits_are_computed_in_64_bits_and_those_of_32_wrap_around() -> None:
    made = program(ODD, *(f"{name} {kind} element in" for name, kind in (("a", "i64"), ("b", "i64"), ("c", "i32"))),
                   *(f"{name} {kind} element out" for name, kind in (("wide", "i64"), ("cut", "i32"), ("f", "f32"),
                                                                     ("less", "bool"))))  # fmt: skip
    a, b, c = (load(made, name) for name in "abc")
    product = made.emit("mul", (a, b))
    made.store("wide", made.emit("add", (product, made.constant(2**40, "i64"))))
    made.store("cut", made.emit("mul", (c, made.emit("i32", (product,)))))
    made.store("f", made.emit("f32", (product,)))
    made.store("less", made.emit("lt", (a, b)))
    a64, b64 = (np.random.default_rng(seed).integers(-(2**40), 2**40, ODD[:2]) for seed in (0, 1))
    c32 = np.random.default_rng(2).integers(-(2**31), 2**31, ODD[:2]).astype(np.int32)
    found = evaluated(made, filled(made, a=torch.from_numpy(a64), b=torch.from_numpy(b64), c=torch.from_numpy(c32)))
    np.testing.assert_array_equal(found["wide"].numpy(), a64 * b64 + 2**40)
    np.testing.assert_array_equal(found["cut"].numpy(), c32 * (a64 * b64).astype(np.int32))
    np.testing.assert_array_equal(found["f"].numpy(), (a64 * b64).astype(np.float32))
    np.testing.assert_array_equal(found["less"].numpy(), a64 < b64)


def test_outputs_are_written_after_everything_is_read() -> None:
    made = program(ODD, "a f32 element inout", "b f32 element inout")
    made.store("a", load(made, "b"))
    made.store("b", load(made, "a"))
    t = filled(made)
    found = evaluated(made, t)
    assert torch.equal(found["a"], t["b"])
    assert torch.equal(found["b"], t["a"])
