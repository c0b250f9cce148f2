"""Logits that a step on a CPU has some rows of at a time, as pass ``chunked_loss`` decides it."""

from __future__ import annotations

import pytest
import torch

import qgalore_compile as qg
from qgalore_compile.planning.forecast import MemoryPlan
from qgalore_compile.training.llama import Llama, LlamaConfig

V = 40_000


def planned(width: int, device: str, vocabulary: int = V, tied: bool = False) -> MemoryPlan:
    """64 tokens of a Llama of three layers."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(width, width, 2, 3, vocab_size=vocabulary))
        if tied:
            model.lm_head.weight = model.embed_tokens.weight
    return qg.plan(model, batch=1, seq=64, rank=8, device=device, compare=device == "cpu")


def logits(plan: MemoryPlan) -> int:
    """Bytes of logits and loss at most."""
    return max(moment.bytes["logits and loss"] for moment in plan.forecast.moments)


WHOLE = 4 * 64 * V


@pytest.mark.parametrize("tied", [False, True])
def test_a_block_exists_where_gradients_are_smaller(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it the head's part of a tied weight's gradient."""
    monkeypatch.setattr("qgalore_compile.planning.vocabulary.BLOCK_BYTES", WHOLE // 4)
    part = 4 * 16 * V if tied else 0
    assert logits(planned(16, "cpu", tied=tied)) == pytest.approx(WHOLE // 4 + part, rel=0.01)


@pytest.mark.parametrize(
    ("width", "device", "vocabulary"), [(96, "cpu", V), (16, "cuda", V), (16, "cpu", 1000)],
    ids=["larger gradients", "a GPU", "few logits"],
)  # fmt: skip
def test_else_they_exist_as_a_whole(width: int, device: str, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgalore_compile.planning.vocabulary.BLOCK_BYTES", 1000)
    assert logits(planned(width, device, vocabulary)) >= 4 * 64 * vocabulary


def test_other_ways_of_training_have_them_as_a_whole() -> None:
    plan = planned(16, "cpu")
    adamw = next(side for side in plan.others if side.name == "AdamW")
    assert max(moment.bytes["logits and loss"] for moment in adamw.moments) >= WHOLE
