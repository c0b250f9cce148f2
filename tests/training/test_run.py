"""The model and the optimizer of a training run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.run import Run, make_model, make_optimizer
from qgalore_compile.weights import select_linears


def test_a_seed_draws_the_same_model_in_every_dtype_on_a_cpu() -> None:
    configs = [TrainConfig.from_preset("tiny", optimizer="adamw", dtype=dtype) for dtype in ("float32", "bfloat16")]
    models = [make_model(config) for config in configs]
    assert torch.get_default_dtype() == torch.float32
    for wide, narrow in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(wide.to(torch.bfloat16), narrow)


def test_what_a_gradient_that_is_not_finite_stops_is_the_runs_choice() -> None:
    for nonfinite in ("skip_step", "skip_parameter"):
        config = TrainConfig.from_preset("tiny", nonfinite=nonfinite)
        optimizer = make_optimizer(nn.Sequential(nn.Linear(64, 32)), config)
        assert isinstance(optimizer, QGaLoreAdamW)
        assert optimizer.nonfinite == nonfinite


def test_the_rows_of_rare_bytes_stay_small_and_move_by_few_learning_rates() -> None:
    """40 eager steps of the preset that ``make train`` takes, on fewer bytes: √v of a rare byte's row must not be 0
    where m is not.  With v stored in its place an element moved by 3,200 learning rates, and rows ended at |330|."""
    config = TrainConfig.from_preset("tiny", steps=60, batch=2, seq=64, backend="eager")
    run = Run(config, load_corpus())
    embedding, lr = run.model.embed_tokens.weight, run.optimizer.param_groups[0]["lr"]
    furthest = 0.0
    for _ in range(40):
        before, rate = embedding.detach().clone(), float(lr)
        run.advance()
        moved = float((embedding.detach() - before).abs().max())
        furthest = max(furthest, moved / rate) if rate else furthest
    assert 0.5 < furthest <= 10
    assert float(embedding.detach().abs().max()) < 1


@pytest.mark.parametrize("optimizer", ["adamw", "qgalore"])
def test_what_is_not_a_block_s_matrix_may_have_a_rate_of_its_own(optimizer: str) -> None:
    config = TrainConfig.from_preset("tiny", optimizer=optimizer, lr=0.5, plain_lr=0.25)
    model = make_model(config)
    groups = make_optimizer(model, config).param_groups
    rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in model.parameters()}
    blocks = {id(linear.weight) for _, linear in select_linears(model)}
    assert {key for key, rate in rates.items() if rate == 0.5} == blocks
    assert set(rates.values()) == {0.5, 0.25}
