"""`benchmarks/common.py`: a step with its backward in one graph, under any backend."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch._dynamo.testing import CompileCounter


@pytest.fixture
def script(module: Callable[[str], Any]) -> ModuleType:
    found: ModuleType = module("common")
    return found


def test_another_backends_step_is_one_graph_and_the_process_keeps_its_setting(script: ModuleType) -> None:
    model = nn.Linear(4, 4)

    def loss_of(x: Tensor) -> Tensor:
        loss: Tensor = model(x).square().sum()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        return loss.detach()

    counter = CompileCounter()
    step = script.compile_whole(loss_of, counter)
    losses = [float(step(torch.ones(2, 4))) for _ in range(2)]
    assert losses[0] == losses[1] > 0
    assert counter.frame_count == 1
    assert not config.trace_autograd_ops


def test_backend_qgalores_step_is_left_as_it_is(script: ModuleType) -> None:
    compiled = script.compile_whole(loss := lambda x: x, "qgalore", {"outline": False})
    assert compiled._torchdynamo_orig_callable is loss
