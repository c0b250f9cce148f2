"""Products around a loss by blocks of rows are those of the whole, and labels are what they may be."""

from __future__ import annotations

import pytest
import torch
from kernels_support import load, program
from torch import Tensor

from qgalore_compile.kernels import loss
from qgalore_compile.kernels.ir.loss import GRADIENTS, LossProgram
from qgalore_compile.kernels.ir.program import Space

T, V, D = 23, 11, 6


def halved(transposed: tuple[bool, bool], bias: bool, gives: tuple[str, ...]) -> LossProgram:
    """z ← z / 2."""
    made = program(Space(T, V, V), "z f32 element inout")
    made.store("z", made.emit("mul", (load(made, "z"), made.constant(0.5))))
    return LossProgram(made, "z", transposed, bias, gives)


@pytest.mark.parametrize("step", [1, 7, T])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [(False, True), (True, False)])
def test_gradients_by_blocks_are_those_of_the_whole(
    transposed: tuple[bool, bool], dtype: torch.dtype, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "BLOCK_BYTES", step * V * dtype.itemsize)
    hidden, weight, bias = torch.randn(T, D).to(dtype), torch.randn(D, V).to(dtype), torch.randn(V).to(dtype)
    given = [each.t().contiguous() if flag else each for each, flag in zip((hidden, weight), transposed, strict=True)]
    written = [torch.full(size, float("nan")).to(dtype) for size in ((T, D), (V, D), (V,))]
    seen: list[int] = []

    def finish(logits: Tensor, first: int) -> None:
        seen.append(first)
        assert len(logits) <= step
        logits.mul_(0.5)

    loss.in_blocks(halved(transposed, True, GRADIENTS), written, [*given, bias], finish)
    assert len(seen) == -(-T // step)
    half = 0.5 * (hidden.double() @ weight.double() + bias.double())
    expected = [half @ weight.double().t(), half.t() @ hidden.double(), half.sum(0)]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.2}
    for one, other in zip(written, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **close)


def test_a_bfloat16_sum_over_many_blocks_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 rows that add 1 each to 256: bfloat16 would stay where 1 is half of a step."""
    monkeypatch.setattr(loss, "BLOCK_BYTES", 1)
    made = halved((False, False), False, ("weight",))
    hidden, weight = torch.ones(1024, 1).bfloat16(), torch.ones(1, V).bfloat16()
    written = [torch.empty(V, 1).bfloat16()]
    loss.in_blocks(made, written, [hidden, weight], lambda logits, first: None)
    assert written[0].unique().tolist() == [1024.0]


def test_only_what_is_asked_for_is_computed() -> None:
    written = [torch.empty(V)]
    loss.in_blocks(halved((False, False), False, ("bias",)), written, [torch.ones(T, D), torch.ones(D, V)],
                   lambda logits, first: None)  # fmt: skip
    assert written[0].unique().tolist() == [T * D]


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_label_out_of_bounds_is_an_error(wrong: int) -> None:
    index = torch.tensor([0, 4, 2])
    assert loss.below(index, 5).tolist() == [0, 4, 2]
    with pytest.raises(IndexError, match=rf"label {wrong} is none of the 5"):
        loss.below(torch.tensor([0, wrong, 2]), 5)
    assert loss.below(index[:0], 5).tolist() == []
