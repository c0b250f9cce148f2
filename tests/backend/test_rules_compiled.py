"""A step by any rule is fused throughout, forms no gradient of a projected weight, and is the eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formats_support import batch, made
from kernels_support import EVALUATOR
from support import Interpreted, step_of, training_step

import qgalore_compile as qg
from qgalore_compile.kernels import lowering
from qgalore_compile.optim.rules import RULES

SETTINGS: tuple[dict[str, Any], ...] = (
    {"weights": None, "moments": "32bit", "quant": False},
    {"weights": "int8/32", "moments": "8bit"},
    {"weights": "nf4/64+double", "moments": "4bit", "weight_decay": 0.1, "rank": 1},
)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        pytest.param(
            rule, each, id=f"{rule}-{each['weights']}-{each['moments']}",
            marks=[pytest.mark.more] if (at + of) % 3 else [],  # each rule once
        )
        for at, rule in enumerate(RULES) for of, each in enumerate(SETTINGS)
    ],
)  # fmt: skip
def test_every_layer_is_fused_without_a_gradient_and_a_step_is_the_eager_one(
    rule: str, settings: dict[str, Any]
) -> None:
    keys = dict(settings)
    net, opt = made(keys.pop("weights"), rule=rule, **keys)
    opt.nonfinite = "skip_parameter"  # updates come at once, or a gradient might be smaller than its factors
    step = training_step(net, opt)
    step(batch())
    with lowering.registered(EVALUATOR):
        found = qg.check(step, batch(1), backend=Interpreted(strict=True))  # strict: what is not fused is an error
        layers = qg.explain(step, batch(1)).layers
    assert found.ok, found
    assert {error.name: error.moved for error in found.errors}["model.blocks.0.weight"] > 0
    projected = [layer for layer in layers if layer["projected"]]
    assert len(projected) == 2
    assert all(layer["reassociated"] for layer in projected)
    assert all(layer["update_function"].startswith("generated") for layer in projected)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: f"{each['weights']}-{each['moments']}")
def test_so_is_a_step_of_muon_with_all_of_the_gradient(settings: dict[str, Any]) -> None:
    keys = {**settings, "rank": None}
    weights = keys.pop("weights")  # doubly quantised ones are left to Inductor in an update at full rank
    net, opt = made(weights and weights.removesuffix("+double"), rule="muon", **keys)
    opt.nonfinite = "skip_parameter"
    step = training_step(net, opt)
    step(batch())
    with lowering.registered(EVALUATOR):
        found = qg.check(step, batch(1), backend=Interpreted(strict=True))
        layers = qg.explain(step, batch(1)).layers
    assert found.ok, found
    mine = [layer for layer in layers if "blocks" in layer["name"]]
    assert [layer["projected"] for layer in mine] == [False, False]
    if keys["moments"] == "4bit":  # drawn for, so that no size is too small for a kernel
        assert all(layer["update_function"] == "generated, 1 kernel" for layer in mine)


def test_a_kernel_reads_rows_however_inductor_lays_out_what_it_computes() -> None:
    """Of a tall weight Muon's momentum is transposed, and what follows from a transpose lies as that does, whatever the
    strides in the graph: a weight was written with elements in another order."""
    torch.manual_seed(0)
    net = torch.nn.Linear(144, 480, bias=False)
    opt = qg.QGaLoreAdamW([{"params": [net.weight], "rank": None, "rule": "muon"}], lr=0.01, moments="32bit")
    found = qg.check(step_of(net, opt), torch.randn(32, 144))
    assert found.ok, found
