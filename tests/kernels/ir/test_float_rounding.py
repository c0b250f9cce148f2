"""Stochastic rounding to short floats in a program is eager's bit for bit: evaluated, in C++ and in Triton."""

from __future__ import annotations

import pytest
import torch
from kernels_support import Tensors, compiled, evaluated, filled, load, program
from torch import Tensor

from qgalore_compile import rng
from qgalore_compile.formats import rounding
from qgalore_compile.kernels.ir import float_rounding
from qgalore_compile.kernels.ir.program import BlockProgram, Space

SPACE = Space(8, 1001, 256)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
SCALARS = {"seed": -3, "param": 5}
STEP = 2**33 + 7
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.39e38, 65504.0, 65519.9, -65520.0, 6e-5, 1e-42]


def rounding_program(memory: str) -> BlockProgram:
    """A weight that a scalar may leave as it is, and what is written otherwise."""
    made = program(
        SPACE, "x f32 element in", "step i64 scalar in", "ok bool scalar in", f"w {memory} element inout",
        f"new {memory} element out", numbers=("seed", "param"),
    )  # fmt: skip
    noise = made.emit("random_bits", (load(made, "step"),), ("seed", "param"))
    new = float_rounding.spell(made, load(made, "x"), noise, DTYPES[memory])
    made.store("new", new)
    made.store("w", made.emit("where", (load(made, "ok"), new, load(made, "w"))))
    return made


def numbers() -> Tensor:
    """Special values, and floats of random bits: of every size there is, NaN among them."""
    bits = torch.randint(-(2**31), 2**31, SPACE[:2], dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x[4:] = torch.randn(4, SPACE.columns) * 2.0 ** torch.randint(-26, 4, (4, SPACE.columns))
    x[0, : len(SPECIAL)] = torch.tensor(SPECIAL)
    return x


def check(made: BlockProgram, memory: str, found: Tensors, tensors: Tensors) -> None:
    noise = rng.random_bits(SPACE[:2], seed=SCALARS["seed"], step=STEP, param=SCALARS["param"])
    expected = rounding.round_to(tensors["x"], DTYPES[memory], noise)
    torch.testing.assert_close(found["new"], expected, rtol=0, atol=0, equal_nan=True)
    kept = expected if bool(tensors["ok"]) else tensors["w"]
    torch.testing.assert_close(found["w"], kept, rtol=0, atol=0, equal_nan=True)


def inputs(made: BlockProgram, ok: bool) -> Tensors:
    return filled(made, x=numbers(), step=torch.tensor(STEP), ok=torch.tensor(ok))


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("memory", DTYPES)
def test_the_evaluator_rounds_as_eager_does(memory: str, ok: bool) -> None:
    made = rounding_program(memory)
    tensors = inputs(made, ok)
    check(made, memory, evaluated(made, tensors, SCALARS), tensors)


@pytest.mark.parametrize("memory", DTYPES)
def test_cpp_rounds_as_eager_does(memory: str) -> None:
    """One compile a format."""
    made = rounding_program(memory)
    for ok in (True, False):
        tensors = inputs(made, ok)
        check(made, memory, compiled(made, tensors, SCALARS), tensors)


@pytest.mark.triton
@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("memory", DTYPES)
def test_triton_rounds_as_eager_does(memory: str, ok: bool) -> None:
    pytest.importorskip("triton")
    import interpreted

    from qgalore_compile.kernels.triton.kernels import region_kernel

    made = rounding_program(memory)
    tensors = inputs(made, ok)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    interpreted.launch(region_kernel(made), copies, SCALARS)
    check(made, memory, copies, tensors)


def test_what_is_cut_for_bfloat16_is_stored_without_rounding_it_again() -> None:
    from qgalore_compile.kernels.cpp.printer import print_cpp

    assert "store_bf16(v" not in print_cpp(rounding_program("bf16")).split("at_w[")[-1]
