"""A program whose gradient is made by blocks of rows does what it does with the whole gradient."""

from __future__ import annotations

import pytest
import torch
from kernels_support import load, program
from torch import Tensor

from qgalore_compile.kernels import rows
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.cpp import rows as rows_cpu
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.ir.rows import RowsProgram, Term

TOKENS = 5


def descent(space: Space) -> BlockProgram:
    """w ← w - lr · g with random bits below, and each group's largest."""
    made = program(
        space, "w f32 element inout", "g f32 element in", "lr f32 scalar in", "step i64 scalar in", "most f32 group out"
    )
    made.numbers += ["seed", "param"]
    bits = made.emit("random_bits", (load(made, "step"),), ("seed", "param"))
    down = made.emit("sub", (load(made, "w"), made.emit("mul", (load(made, "lr"), load(made, "g")))))
    new = made.emit("add", (down, made.emit("mul", (made.emit("f32", (bits,)), made.constant(2.0**-20)))))
    made.store("w", new)
    made.store("most", made.emit("group_max", (new,)))
    return made


@pytest.mark.compiles
@pytest.mark.parametrize("term", [Term("indexed"), Term("product", (True, False))], ids=lambda term: term.kind)
@pytest.mark.parametrize(("m", "n", "flat"), [(37, 24, False), (37, 24, True), (40, 20, True)])
def test_blocks_are_the_whole(m: int, n: int, flat: bool, term: Term, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat groups of 8 lie in two rows of 20: blocks are of an even number of rows then."""
    made = descent(Space(1, m * n, 8) if flat else Space(m, n, 8))
    monkeypatch.setattr(rows, "BLOCK_BYTES", 7 * n * 4)
    index = torch.randint(m, (TOKENS,))
    operands = (
        [torch.randn(TOKENS, m), torch.randn(TOKENS, n)] if term.kind == "product"
        else [torch.randn(TOKENS, n), torch.ones(TOKENS, 1, dtype=torch.bool), index]
    )  # fmt: skip
    gradient = torch.empty(m, n)
    rows.filling([term], [operands], m)(gradient, 0, m)
    w, most, lr, step = torch.randn(m, n), torch.empty(m * n // 8), torch.tensor(0.1), torch.tensor(3)
    expected: list[Tensor] = [w.clone(), most.clone()]
    cpu.kernel(str(made)).run(expected, [gradient, lr, step], [11, 4])
    found = [w.clone(), most.clone()]
    rows_cpu.run(str(RowsProgram(made, "g", m, n, (term,))), found, [*operands, lr, step], [11, 4])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
