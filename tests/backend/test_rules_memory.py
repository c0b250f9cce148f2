"""A steady step by a rule that reads its gradient allocates nothing as large as that: blocks of it alone."""

from __future__ import annotations

import pytest
import torch
from support import step_of
from torch import nn
from torch.profiler import ProfilerActivity, profile

import qgalore_compile as qg

SIZE, TOKENS = 1024, 32


@pytest.mark.parametrize("rule", ["galore", "fira", "apollo", "factored"])
def test_no_tensor_of_the_gradient_s_size_is_allocated(rule: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
    qg.quantize_(net, targets=["0"])
    keys = {"rank": 16, "rule": rule, "update_proj_gap": 1000, "targets": ["0"]}
    opt = qg.QGaLoreAdamW(qg.param_groups(net, **keys), nonfinite="skip_parameter")
    compiled = torch.compile(step_of(net, opt), backend="qgalore", options={"strict": True})
    x = torch.randn(TOKENS, SIZE)
    for _ in range(2):  # the first one finds the subspace
        compiled(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        compiled(x)
    largest = max(event.cpu_memory_usage for event in run.events())
    assert 0 < largest <= SIZE * SIZE * 4 // 2
