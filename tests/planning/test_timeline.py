"""Over a step: layers that are left out of the recording, what comes of gradients, and the program that is compiled."""

from __future__ import annotations

import pytest
import torch

import qgalore_compile as qg
from qgalore_compile.planning import timeline
from qgalore_compile.training.llama import Llama, LlamaConfig, find_preset


def meta(config: LlamaConfig, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """A model on the meta device."""
    with torch.device("meta"):
        return Llama(config).to(dtype)


@pytest.mark.parametrize("depth", [8, 11])
@pytest.mark.parametrize("nonfinite", ["skip_step", "skip_parameter"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_few_layers_tell_of_all(depth: int, nonfinite: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks() -> tuple[int, int, str]:
        model = meta(LlamaConfig(64, 96, 4, depth))
        plan = qg.plan(model, batch=2, seq=32, rank=16, nonfinite=nonfinite, device=device, compare=False)
        return plan.peak, plan.forecast.steady_peak, str(plan.forecast.at)

    few = peaks()
    monkeypatch.setattr("qgalore_compile.planning.planner.recorded_layers", lambda depth: depth)
    assert peaks() == few
    assert timeline.recorded_layers(depth) < depth


# What Inductor's program for these steps holds above weights and states, counted by benchmarks/live_bytes.py.
COUNTED = [
    ("60m", 3, 4, 256, torch.float32, {}, 126_492_684),
    ("60m", 3, 1, 32, torch.float32, {}, 9_941_236),
    ("60m", 3, 1, 32, torch.bfloat16, {"nonfinite": "skip_parameter"}, 2_584_349),
    ("60m", 3, 1, 64, torch.float32, {"rule": "apollo"}, 17_570_872),
    ("60m", 3, 1, 64, torch.float32, {"rule": "fira"}, 17_571_032),
]


@pytest.mark.parametrize(("preset", "layers", "batch", "seq", "dtype", "keys", "counted"), COUNTED)
def test_the_program_that_is_compiled(
    preset: str, layers: int, batch: int, seq: int, dtype: torch.dtype, keys: dict[str, str], counted: int
) -> None:
    known = find_preset(preset)
    config = LlamaConfig(known.model.hidden_size, known.model.intermediate_size, known.model.num_heads, layers)
    plan = qg.plan(meta(config, dtype), batch=batch, seq=seq, rank=known.rank, device="cpu", compare=False, **keys)  # type: ignore[arg-type]
    held = plan.forecast.resident
    assert plan.forecast.steady_peak == pytest.approx(held + counted, rel=0.03)


def test_seven_billion_on_a_gpu() -> None:
    """16,202,312,192 bytes were allocated on an H100 (benchmarks/results/memory-7b-nvidia-h100-80gb-hbm3.json)."""
    known = find_preset("7b")
    model = meta(LlamaConfig(4096, 11008, 32, 32, vocab_size=32_000, max_seq_len=2048))
    plan = qg.plan(model, batch=1, seq=256, rank=known.rank, compare=False)
    assert plan.device == "cuda"
    assert plan.peak == pytest.approx(16_202_312_192, rel=0.03)
    assert plan.cards[24]
    assert not plan.cards[16]


def test_updates_at_once_hold_less_and_full_gradients_more() -> None:
    plan = qg.plan(meta(LlamaConfig(256, 512, 4, 6)), batch=1, seq=16, rank=64, device="cuda")
    peaks = {side.name: side.peak for side in (plan.forecast, *plan.others)}
    assert peaks["qgalore, updates at once"] < peaks["qgalore"] < peaks["GaLore"] < peaks["AdamW"]
    assert peaks["8-bit Adam"] < peaks["AdamW"]
    assert peaks["QLoRA"] < peaks["LoRA"]
    assert {side.by_category["gradients"] for side in plan.others if side.name == "AdamW"} != {0}


def test_categories_add_up_to_the_whole() -> None:
    plan = qg.plan(meta(LlamaConfig(64, 96, 4, 3)), batch=2, seq=16, rank=16)
    for side in (plan.forecast, *plan.others):
        assert sum(side.by_category.values()) == side.total == side.peak + side.process
        assert all(size >= 0 for moment in side.moments for size in moment.bytes.values())


def test_layers_that_are_computed_again_hold_less() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50)
            self.blocks = torch.nn.ModuleList(Block() for _ in range(6))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return self.head(x)  # type: ignore[no-any-return]

    with torch.device("meta"):
        model = Model()
    kept, again = (
        qg.plan(model, batch=8, seq=64, rank=8, checkpointing=on, compare=False).forecast.steady_peak
        for on in (False, True)
    )
    assert again < 0.7 * kept
