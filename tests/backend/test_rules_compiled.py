"""A step by any rule is fused throughout, forms no gradient of a projected weight, and is the eager one."""

from __future__ import annotations

from typing import Any

import pytest
from formats_support import batch, made
from kernels_support import EVALUATOR
from support import Interpreted, training_step

import qgalore_compile as qg
from qgalore_compile.kernels import lowering
from qgalore_compile.optim.rules import RULES

SETTINGS: tuple[dict[str, Any], ...] = (
    {"weights": None, "moments": "32bit", "quant": False},
    {"weights": "int8/32", "moments": "8bit"},
    {"weights": "nf4/64", "moments": "4bit", "weight_decay": 0.1, "rank": 1},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: f"{each['weights']}-{each['moments']}")
@pytest.mark.parametrize("rule", RULES)
def test_every_layer_is_fused_without_a_gradient_and_a_step_is_the_eager_one(
    rule: str, settings: dict[str, Any]
) -> None:
    keys = dict(settings)
    net, opt = made(keys.pop("weights"), rule=rule, **keys)
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
