"""A loss that is computed by blocks of rows leaves what it leaves as a whole."""

from __future__ import annotations

import pytest
import torch
from kernels_support import evaluate_loss, load, program
from torch import Tensor

from qgalore_compile.kernels import loss
from qgalore_compile.kernels.cpp import loss as loss_cpu
from qgalore_compile.kernels.ir.loss import GRADIENTS, LossProgram
from qgalore_compile.kernels.ir.program import BlockProgram, Space

D = 6


def softmax(rows: int, columns: int, memory: str = "f32") -> BlockProgram:
    """z ← softmax(z) · scale, scale a number a row; and log Σ exp z of each row."""
    made = program(Space(rows, columns, columns), f"z {memory} element inout", "scale f32 row in", "lse f32 group out")
    z = load(made, "z")
    most = made.emit("group_max", (z,))
    powers = made.emit("exp", (made.emit("sub", (z, most)),))
    total = made.emit("group_sum", (powers,))
    made.store("z", made.emit("mul", (made.emit("div", (powers, total)), load(made, "scale"))))
    made.store("lse", made.emit("add", (most, made.emit("log", (total,)))))
    return made


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("rows", "columns", "memory"), [(23, 40, "f32"), (9, 9001, "f32"), (23, 40, "bf16")],
    ids=["short rows", "rows too long for the stack", "bfloat16"],
)  # fmt: skip
def test_blocks_are_the_whole(rows: int, columns: int, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = str(LossProgram(softmax(rows, columns, memory), "z", (False, True), True, GRADIENTS))
    dtype = torch.float32 if memory == "f32" else torch.bfloat16
    read = [torch.randn(rows, D), torch.randn(columns, D), torch.randn(columns)]
    read = [*(each.to(dtype) for each in read), torch.rand(rows)]

    def outputs() -> list[Tensor]:
        sizes = ((rows, D), (columns, D), (columns,))
        return [*(torch.empty(size, dtype=dtype) for size in sizes), torch.empty(rows, 1)]

    expected, found = outputs(), outputs()
    evaluate_loss(made, expected, read, [])
    monkeypatch.setattr(loss, "BLOCK_BYTES", 4 * columns * dtype.itemsize)
    loss_cpu.run(made, found, read, [])
    close = {"rtol": 1e-4, "atol": 1e-5} if memory == "f32" else {"rtol": 0.03, "atol": 0.03}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)
