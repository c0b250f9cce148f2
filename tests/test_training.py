"""The model and the optimizer of a training run."""

from __future__ import annotations

import torch
from torch import nn

from qgalore_compile.optim import QGaLoreAdamW
from qgalore_compile.train_config import TrainConfig
from qgalore_compile.training import make_model, make_optimizer


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
