"""The text of a program that makes its gradient by rows is the program, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from kernels_support import load, program

from qgalore_compile.kernels.ir.program import ProgramError, Space
from qgalore_compile.kernels.ir.rows import RowsProgram, Term, parsed
from qgalore_compile.kernels.ops import program_of


def descent() -> RowsProgram:
    """w ← w - g, over 6 × 8."""
    made = program(Space(6, 8, 4), "w f32 element inout", "g f32 element in")
    made.store("w", made.emit("sub", (load(made, "w"), load(made, "g"))))
    terms = (Term("product", (True, False)), Term("indexed"))
    return RowsProgram(made, "g", 6, 8, terms)


def test_a_text_is_read_as_what_wrote_it() -> None:
    made = descent()
    assert parsed(str(made)) == made
    assert program_of(str(made)) == made
    assert "term product transposed straight\nterm indexed\n" in made.pretty()


@pytest.mark.parametrize("change", [("rows g 6 8", "rows g 6"), ("rows g", "gemm g"), ("indexed", "scattered"),
                                    (" transposed straight", ""), ("\nepilogue", "")])  # fmt: skip
def test_a_text_that_is_none_is_refused(change: tuple[str, str]) -> None:
    with pytest.raises(ProgramError, match=r"rows|term|epilogue"):
        RowsProgram.parse(str(descent()).replace(*change))


def test_what_is_read_is_shared_out_term_by_term() -> None:
    operands, rest = descent().share(["left", "right", "values", "mask", "index", "lr"])
    assert operands == [["left", "right"], ["values", "mask", "index"]]
    assert rest == ["lr"]


def test_a_product_s_operands_are_turned_as_the_term_says() -> None:
    left, right = Term("product", (True, False)).matrices([torch.ones(3, 6), torch.ones(3, 8)])
    assert (left.shape, right.shape) == ((6, 3), (3, 8))
