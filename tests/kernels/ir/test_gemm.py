"""A product's text reads back, and its tensors go to the parts that take them."""

from __future__ import annotations

import pytest
import torch
from kernels_support import load, program

from qgalore_compile.kernels.ir.gemm import VALUE, GemmProgram, Operand, named
from qgalore_compile.kernels.ir.program import BlockProgram, ProgramError, Space


def prologue(rows: int, columns: int) -> BlockProgram:
    made = program(
        Space(rows, columns, 8), "codes u4 element in", "scale f32 group in", f"{VALUE} bf16 element out"
    )  # fmt: skip
    made.store(VALUE, made.emit("mul", (made.emit("f32", (load(made, "codes"),)), load(made, "scale"))))
    return made


def epilogue(rows: int, columns: int) -> BlockProgram:
    made = program(
        Space(rows, columns, 8), "lr f32 scalar in", "product bf16 element in", "w f32 element inout",
        "decay f32 row in", "most f32 group out",
    )  # fmt: skip
    new = made.emit("sub", (load(made, "w"), made.emit("mul", (load(made, "lr"), load(made, "product")))))
    new = made.emit("mul", (new, load(made, "decay")))
    made.store("w", new)
    made.store("most", made.emit("group_max", (new,)))
    return made


@pytest.mark.parametrize("left", [Operand(None, False), Operand(None, True), Operand(prologue(5, 4), True)])
@pytest.mark.parametrize("right", [Operand(None, True), Operand(prologue(4, 21), False)])
def test_a_products_text_reads_back(left: Operand, right: Operand) -> None:
    gemm = GemmProgram(left, right, epilogue(5, 21), "product")
    again = GemmProgram.parse(str(gemm))
    assert again == gemm
    assert str(again) == str(gemm)
    assert gemm.pretty().startswith("gemm product\nleft ")


def test_tensors_go_to_the_parts_in_order() -> None:
    gemm = GemmProgram(Operand(prologue(5, 4), False), Operand(None, False), epilogue(5, 21), "product")
    codes, scale, right, lr, w, decay, most = (torch.tensor(float(index)) for index in range(7))
    operands, own = gemm.share([w, most], [codes, scale, right, lr, decay])
    assert operands == [([codes, scale], [right])]
    assert own == {"w": w, "most": most, "lr": lr, "decay": decay}
    assert (gemm.left.tensors(), gemm.right.tensors()) == (2, 1)


def test_a_tensor_too_few_or_too_many_is_an_error() -> None:
    one = torch.zeros(())
    with pytest.raises(ValueError, match="zip"):
        named(epilogue(5, 21), [one], [one, one, one])
    with pytest.raises(ValueError, match="zip"):
        named(epilogue(5, 21), [one, one], [one, one, one], leave=["product"])


@pytest.mark.parametrize("text", ["", "space 1 2 2", "gemm product", "gemm product\nleft straight"])
def test_what_is_no_product_is_refused(text: str) -> None:
    with pytest.raises(ProgramError, match="a product's text begins with 'gemm' and has the parts"):
        GemmProgram.parse(text)
