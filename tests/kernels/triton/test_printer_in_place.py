"""Programs in Triton that write where they read; the kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from kernels_support import assert_like, evaluated, filled, load, program

pytest.importorskip("triton")

import interpreted
from interpreted import ODD, kernel_of, ran

from qgalore_compile.formats.packing import pack
from qgalore_compile.kernels.ir.program import Space

pytestmark = pytest.mark.triton


def test_buffers_that_swap_their_values_do() -> None:
    made = program(ODD, "a f32 element inout", "b f32 element inout", "s f32 group inout", "t f32 group inout")
    for one, other in (("a", "b"), ("s", "t")):
        made.store(one, load(made, other))
        made.store(other, load(made, one))
    found = ran(made, tensors := filled(made), rows=2)
    for one, other in (("a", "b"), ("s", "t")):
        assert torch.equal(found[one], tensors[other])
        assert torch.equal(found[other], tensors[one])


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_an_output_may_be_the_storage_of_an_input(rows: int) -> None:
    """As Inductor has it where nobody else reads an input."""
    made = program(
        ODD, "x f32 element in", "s f32 group in", "y f32 element out", "t f32 group out", "c u8 element inout"
    )
    x, s, c = (load(made, name) for name in "xsc")
    made.store("y", made.emit("div", (made.emit("add", (x, s)), made.emit("group_max", (made.emit("abs", (x,)),)))))
    made.store("t", made.emit("add", (s, made.emit("group_min", (made.emit("f32", (c,)),)))))
    made.store("c", made.emit("bitxor", (c, made.constant(255, "i32"))))
    tensors = filled(made)
    expected = evaluated(made, tensors)
    shared = {**tensors, "y": tensors["x"], "t": tensors["s"]}
    interpreted.launch(kernel_of(made, rows), shared, {})
    for name in "ytc":
        assert torch.equal(shared[name], expected[name]), name


@pytest.mark.parametrize("space", [ODD, Space(2, 32, 8)], ids=["odd", "whole"])
@pytest.mark.parametrize("extent", ["scalar", "group", "element"])
def test_what_is_to_stay_is_not_written(extent: str, space: Space) -> None:
    """Else a thread would hold the old codes of a weight until it stores the new ones."""
    made = program(space, f"flag bool {extent} in", "x f32 element inout", "c u8 element inout", "y f32 element out")
    flag, x, c = (load(made, name) for name in ("flag", "x", "c"))
    made.store("x", made.emit("where", (flag, made.emit("neg", (x,)), x)))
    made.store("c", made.emit("where", (flag, made.emit("bitxor", (c, made.constant(255, "i32"))), c)))
    made.store("y", made.emit("where", (flag, x, made.constant(0.0))))
    for flags in ({}, {"flag": torch.zeros(())}, {"flag": torch.ones(())}) if extent == "scalar" else ({},):
        tensors = filled(made, **flags)
        assert_like(ran(made, tensors), evaluated(made, tensors), made)
    source = kernel_of(made).source
    stores = [line for line in source.splitlines() if "tl.store(" in line]
    assert ["mask=v0" in line for line in stores] == [True, True, False]


@pytest.mark.parametrize("space", [Space(3, 21, 8), Space(2, 32, 8)], ids=["odd", "whole"])
@pytest.mark.parametrize("memory", ["p4", "p2"])
@pytest.mark.parametrize("extent", ["scalar", "group", "element"])
def test_codes_that_share_bytes_stay_where_they_are_to_stay(extent: str, memory: str, space: Space) -> None:
    """As all of a weight does in a step whose gradient is not finite."""
    made = program(space, f"flag bool {extent} in", f"c {memory} element inout")
    flag, c = load(made, "flag"), load(made, "c")
    made.store("c", made.emit("where", (flag, made.emit("bitxor", (c, made.constant(3, "i32"))), c)))
    generator = torch.Generator().manual_seed(0)
    shape = {"scalar": (), "group": (space.rows, space.groups), "element": (space.rows, space.columns)}[extent]
    codes = torch.randint(0, 4, (space.rows, space.columns), generator=generator)
    for flags in (torch.zeros(shape), torch.ones(shape), torch.randint(0, 2, shape, generator=generator)):
        changes = flags.bool()
        if extent == "group":
            changes = changes.repeat_interleave(space.width, 1)[:, : space.columns]
        tensors = {"flag": flags.bool(), "c": pack(codes, memory)}
        expected = pack(torch.where(changes, codes ^ 3, codes), memory)
        assert torch.equal(ran(made, tensors)["c"], expected)


def test_a_choice_between_two_buffers_is_written_whole() -> None:
    made = program(ODD, "flag bool scalar in", "x f32 element inout", "y f32 element inout")
    flag, x, y = (load(made, name) for name in ("flag", "x", "y"))
    made.store("x", made.emit("where", (flag, x, y)))
    made.store("y", made.emit("where", (flag, made.emit("neg", (y,)), x)))
    for value in (0, 1):
        tensors = filled(made, flag=torch.tensor(value))
        assert_like(ran(made, tensors), evaluated(made, tensors), made)
