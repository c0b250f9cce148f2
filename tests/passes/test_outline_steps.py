"""Whole steps whose layers are calls of one function: bit for bit those of the graph without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Interpreted, snapshot, step_of, tokens
from torch import Tensor, fx

import qgalore_compile as qg
from qgalore_compile.passes.nodes import INVOKE
from qgalore_compile.training.llama import Llama, LlamaConfig

LAYERS = 4


def steps(outline: bool, count: int = 4, micro_batches: int = 1, **settings: Any) -> tuple[dict[str, Tensor], Any]:
    """Every tensor after some steps, refreshes among them, and the final graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Llama(LlamaConfig(16, 24, num_heads=2, num_layers=LAYERS, vocab_size=17))
    qg.quantize_(model, group_size=8)
    of_optimizer = {key: settings.pop(key) for key in ("nonfinite", "max_grad_norm", "moments") & settings.keys()}
    groups = qg.param_groups(model, **{"rank": 4, "update_proj_gap": 3, "quant_group_size": 8, **settings})
    opt = qg.QGaLoreAdamW(groups, lr=0.01, **of_optimizer)
    backend = Interpreted(outline=outline)
    compiled = torch.compile(step_of(model, opt), backend=backend, fullgraph=True)
    for index in range(count):
        compiled(*(tokens(seed=10 * index + each) for each in range(micro_batches)))
    return snapshot(model, opt), backend.graphs[0].graph


def operations(graph: fx.Graph) -> int:
    return len([node for node in graph.nodes if node.op == "call_function"])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"nonfinite": "skip_step"}, id="skip-step", marks=pytest.mark.more),
        pytest.param({"nonfinite": "skip_parameter"}, id="skip-parameter"),
        pytest.param({"max_grad_norm": 0.1, "moments": "4bit", "micro_batches": 2}, id="clipped-accumulated"),
        pytest.param({"moments_on_refresh": "rotate"}, id="moments-follow"),
    ],
)
def test_results_are_those_without_it(settings: dict[str, Any]) -> None:
    expected, before = steps(False, **settings)
    found, graph = steps(True, **settings)
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name
    calls = [node.args[1] for node in graph.find_nodes(op="call_function", target=INVOKE)]
    assert max(map(calls.count, calls)) >= LAYERS
    assert operations(graph) < 0.55 * operations(before)
