"""The text of a loss is the loss, and nothing else is."""

from __future__ import annotations

import pytest
from kernels_support import load, program

from qgalore_compile.kernels.ir.loss import LossProgram, parsed
from qgalore_compile.kernels.ir.program import ProgramError, Space
from qgalore_compile.kernels.ops import program_of


def halved() -> LossProgram:
    """z ← z / 2, and each row's largest, over 6 × 8."""
    made = program(Space(6, 8, 8), "z f32 element inout", "most f32 group out", "lr f32 scalar in")
    z = load(made, "z")
    made.store("z", made.emit("mul", (z, load(made, "lr"))))
    made.store("most", made.emit("group_max", (z,)))
    return LossProgram(made, "z", (False, True), True, ("hidden", "bias"))


def test_a_text_is_read_as_what_wrote_it() -> None:
    made = halved()
    assert parsed(str(made)) == made
    assert program_of(str(made)) == made
    assert made.pretty().startswith("loss z\nproduct straight transposed bias\ngives hidden bias\nepilogue\n")


@pytest.mark.parametrize(
    "change",
    [("loss z", "loss"), ("loss z", "loss y"), ("loss z", "rows z"), ("straight", "crooked"), (" bias\n", " biases\n"),
     ("gives hidden bias", "gives bias hidden"), ("hidden", "hid"), ("\nepilogue", "")],
)  # fmt: skip
def test_a_text_that_is_none_is_refused(change: tuple[str, str]) -> None:
    with pytest.raises(ProgramError, match=r"loss|product|gradients|buffer"):
        LossProgram.parse(str(halved()).replace(*change, 1))


def test_tensors_are_shared_out() -> None:
    shared = halved().share(["dx", "db", "most"], ["x", "w", "b", "lr"])
    assert shared == ({"hidden": "dx", "bias": "db"}, ["most"], ["x", "w", "b"], ["lr"])
