"""Bytes between steps are those of the very tensors that a model and its optimizer hold."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import qgalore_compile as qg
from qgalore_compile.planning.states import resident
from qgalore_compile.training.llama import Llama, LlamaConfig

SHAPE = LlamaConfig(48, 80, 2, 5, vocab_size=130)


def held(model: nn.Module, opt: qg.QGaLoreAdamW) -> int:
    """Bytes of a model's parameters and buffers and of an optimizer's state."""
    states = (tensor.nbytes for state in opt.state.values() for tensor in state.values())
    return sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers()) + sum(states)


def check(model: nn.Module, weight_format: str | None, moments: str = "8bit", **keys: Any) -> None:
    """The forecast of a model, then the model itself."""
    foreseen = resident(model, weight_format=weight_format, keys=keys, moments=moments)
    if weight_format is not None:
        qg.quantize_(model, format=weight_format)
    assert sum(foreseen.bytes.values()) == held(model, qg.QGaLoreAdamW(qg.param_groups(model, **keys), moments=moments))


@pytest.mark.parametrize("weight_format", ["int8/256", "e4m3", "nf4/64+double", "int4/128", "int6/128", None])
def test_weights_of_every_kind(weight_format: str | None) -> None:
    check(Llama(SHAPE), weight_format, rank=8)


@pytest.mark.parametrize("moments", ["8bit", "4bit", "32bit"])
@pytest.mark.parametrize("projector", [{}, {"projector_format": "nf4/64"}, {"quant": False}, {"quant_n_bit": 8}])
def test_moments_and_projectors_of_every_kind(moments: str, projector: dict[str, Any]) -> None:
    check(Llama(SHAPE).bfloat16(), "int8/256", moments, rank=12, **projector)


@pytest.mark.parametrize(
    "keys",
    [
        {"rank": 8, "rule": "fira"},
        {"rank": 8, "rule": "apollo"},
        {"rank": 8, "rule": "muon"},
        {"rank": None, "rule": "muon"},
        {"rank": 4, "rule": "factored"},
        {"rank": 4, "rule": "factored", "momentum_format": "8bit"},
        {"rank": 8, "weight_decay": 0.1, "plain": {"lr": 0.1}},
        {"rank": 8, "targets": re.compile("mlp|layers.1")},
    ],
)
def test_every_rule_and_group(keys: dict[str, Any]) -> None:
    check(Llama(SHAPE), "int8/256", **keys)


def test_a_tied_model_and_one_whose_layers_differ() -> None:
    check(Llama(LlamaConfig(48, 80, 2, 3, vocab_size=130, tied=True)), "int8/256", rank=8)
    odd = Llama(SHAPE)
    odd.layers[3].mlp.down_proj = nn.Linear(80, 48, bias=True)  # type: ignore[union-attr]
    check(odd, "int8/256", rank=8)


def test_what_does_not_train_is_counted_without_state() -> None:
    model = Llama(SHAPE)
    model.embed_tokens.requires_grad_(False)
    for layer in model.layers:
        layer.input_layernorm.requires_grad_(False)  # type: ignore[operator,union-attr]
    check(model, "int8/256", rank=8)


def test_weights_that_are_quantised_stay_in_their_format() -> None:
    model = qg.quantize_(Llama(SHAPE), format="e4m3/64")
    plan = qg.plan(model, batch=1, seq=8, rank=8, compare=False)
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=8))
    tokens = 2 * 8 * 8  # tokens and targets
    assert plan.forecast.resident == held(model, opt) + tokens


def test_nothing_is_allocated() -> None:
    """A model whose weights no machine holds."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(65_536, 262_144, 512, 9))
    plan = qg.plan(model, batch=1, seq=8, compare=False)
    assert plan.bytes["weights"] > 500e9
    assert all(p.is_meta for p in model.parameters())
