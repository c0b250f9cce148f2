"""Whether a machine can do a run at all, said before anything begins."""

from __future__ import annotations

import pytest
import torch

from qgalore_compile.training import machine
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.machine import check_device, check_memory, least_bytes, memory_of


@pytest.mark.parametrize("name", ["warp", "cuda:99", "meta", "", "cpu:x", "-1"])
def test_a_device_that_is_not_there_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^--device {name}: .*; this machine has cpu"):
        check_device(name)
    assert check_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "options",
    [{"batch": 2**31 - 1}, {"vocab_size": 2**31 - 1}, {"accumulate": 2**31 - 1}, {"preset": "7b", "batch": 10**6}],
    ids=str,
)
def test_an_absurd_size_is_refused_in_words(options: dict[str, int]) -> None:
    config = TrainConfig.from_preset(**{"preset": "tiny", **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs at least [\d,.]+ GB, and cpu has .*--batch \d+.*one of them smaller"):
        check_memory(config, torch.device("cpu"))


def test_every_preset_that_a_large_machine_trains_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_of", lambda device: 80 * 10**9)
    for preset in ("tiny", "35m", "60m", "130m", "350m", "1b", "7b"):
        check_memory(TrainConfig.from_preset(preset, dtype="bfloat16"), torch.device("cpu"))


def test_what_is_needed_is_counted_by_hand() -> None:
    """tiny: weights of 984,000 elements; of 2 × 16 tokens 2 layers of 192, 256 logits, and two int64."""
    config = TrainConfig.from_preset("tiny", batch=2, seq=16)
    assert least_bytes(config) == 984_000 * 4 + 32 * ((2 * 192 + 256) * 4 + 16)
    adamw = TrainConfig.from_preset("tiny", batch=2, seq=16, optimizer="adamw", accumulate=3)
    assert least_bytes(adamw) == 984_000 * 12 + 32 * ((2 * 192 + 256) * 4 + 48)


def test_memory_is_the_machine_s_or_a_container_s() -> None:
    assert 2**28 < memory_of(torch.device("cpu")) < 2**50
