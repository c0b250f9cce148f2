"""What Inductor makes of layers that are calls of one function: code once a layer, and the same step."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from support import assert_same_step, decoded, step_of, tokens
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import qgalore_compile as qg
from qgalore_compile.subspace.scheduler import Schedule
from qgalore_compile.training.llama import Llama, LlamaConfig

LAYERS = 4


def refresh_all(opt: qg.QGaLoreAdamW) -> None:
    """Let every subspace fall due: a projector that a layer's backward has changed is read by its update."""
    for state in opt.state.values():
        if "schedule" in state:
            schedule = Schedule.from_tensor(state["schedule"])
            state["schedule"].copy_(dataclasses.replace(schedule, slot=-1, next=schedule.clock).to_tensor())


@pytest.mark.compiles
@pytest.mark.parametrize("nonfinite", ["skip_parameter", pytest.param("skip_step", marks=pytest.mark.more)])
@inductor_config.patch(fx_graph_cache=False)  # the run's cache has no code to show
def test_a_layer_is_compiled_once_and_steps_as_it_does_without(nonfinite: str) -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(16, 24, num_heads=2, num_layers=LAYERS, vocab_size=17))
    qg.quantize_(model, group_size=8)
    groups = qg.param_groups(model, rank=4, update_proj_gap=5, quant_group_size=8)
    opt = qg.QGaLoreAdamW(groups, lr=0.01, nonfinite=nonfinite)
    step = step_of(model, opt)
    step(tokens())
    refresh_all(opt)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    before = decoded(model, opt)
    compiled = torch.compile(step, backend="qgalore", fullgraph=True, options={"outline": True, "strict": True})
    loss, (code,) = run_and_get_code(compiled, tokens(seed=2))
    found = decoded(model, opt)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    torch.testing.assert_close(loss, step(tokens(seed=2)))
    assert_same_step(before, found, decoded(model, opt), tolerance=0.02)
    calls = [re.findall(rf" = qgalore_layer_{index}\(", code) for index in range(code.count("\ndef qgalore_layer_"))]
    assert max(map(len, calls)) == LAYERS  # the forward
    assert sorted(map(len, calls))[-2] > 1  # the backward of layers between others, with its updates
