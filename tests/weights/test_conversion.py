"""quantize_ puts INT8 weights into a model, loading keeps them, and dequantize_ takes them out again."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from int8 import Tiny, assert_same, int8, linear, storage
from torch import nn
from torch.nn.utils import prune

import qgalore_compile as qg
from qgalore_compile import Int8Weight
from qgalore_compile.weights import select_linears

# -- quantize_ --------------------------------------------------------------------------------------------------------


def quantised(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, Int8Weight)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, ["0.q_proj", "0.o_proj", "1.q_proj", "1.o_proj"]),
        ("q_proj", ["0.q_proj", "1.q_proj"]),
        ("1.q_proj", ["1.q_proj"]),
        (["o_proj", "0.q_proj"], ["0.q_proj", "0.o_proj", "1.o_proj"]),
        (re.compile(r"1\.\w_proj$"), ["1.q_proj", "1.o_proj"]),
        (lambda name, layer: layer.out_features == 20 and "0" in name, ["0.q_proj"]),
    ],
    ids=["default", "name", "path", "names", "regex", "predicate"],
)
def test_targets_choose_the_layers(targets: Any, expected: list[str]) -> None:
    model = Tiny()
    floats = copy.deepcopy(model)
    assert qg.quantize_(model, group_size=7, targets=targets) is model
    assert quantised(model) == [f"blocks.{name}.weight" for name in expected]
    for name, parameter in floats.named_parameters():
        ours = model.get_parameter(name)
        if isinstance(ours, Int8Weight):
            assert (ours.label, ours.group_size, ours.requires_grad) == (name, 7, True)
            assert_same(ours, storage(Int8Weight.from_float(parameter, 7)))
        else:
            assert torch.equal(ours, parameter)


def test_the_head_is_a_target_when_it_is_named() -> None:
    assert quantised(qg.quantize_(Tiny(), targets=["head"])) == ["head.weight"]


def test_a_model_that_is_itself_a_sequence_consists_of_blocks() -> None:
    assert [name for name, _ in select_linears(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)))] == [
        "0",
        "2",
    ]


def test_frozen_weights_stay_frozen_dtypes_stay_and_quantising_twice_changes_nothing() -> None:
    model = Tiny().bfloat16().requires_grad_(False)
    qg.quantize_(model, group_size=7)
    weight = int8(model.blocks[0]["q_proj"])
    before = storage(weight)
    qg.quantize_(model, group_size=3)
    assert model.blocks[0]["q_proj"].weight is weight
    assert_same(weight, before)
    assert (weight.requires_grad, weight.dtype) == (False, torch.bfloat16)


def test_layers_that_share_a_weight_share_it_afterwards() -> None:
    model = Tiny()
    model.blocks[1]["q_proj"].weight = model.blocks[0]["q_proj"].weight
    qg.quantize_(model)
    assert model.blocks[1]["q_proj"].weight is model.blocks[0]["q_proj"].weight
    model.bfloat16()
    weight = int8(model.blocks[1]["q_proj"])
    assert weight is model.blocks[0]["q_proj"].weight
    assert (weight.dtype, weight.label) == (torch.bfloat16, "blocks.0.q_proj.weight")


def spoilt(value: float) -> Callable[[Tiny], None]:
    def spoil(model: Tiny) -> None:
        with torch.no_grad():
            model.blocks[1]["o_proj"].weight[2, 3] = value

    return spoil


def tied(model: Tiny) -> None:
    model.head.weight = model.embed.weight


def untouched(model: Tiny) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "targets", "words"),
    [
        (untouched, "k_proj", r"'k_proj' names none.*blocks\.0\.q_proj.*pass targets="),
        (untouched, "proj", "'proj' names none"),
        (untouched, ["q_proj", "gate_proj"], "'gate_proj' names none"),
        (untouched, re.compile("gate"), "select none"),
        (untouched, lambda name, layer: False, "select none"),
        (untouched, [], "select none"),
        (tied, ["q_proj", "head"], r"head\.weight of shape \(17, 12\) is shared with embed; .*untie"),
        (spoilt(float("nan")), None, r"blocks\.1\.o_proj\.weight of shape \(12, 20\) holds NaN or Inf"),
        (spoilt(-float("inf")), None, r"blocks\.1\.o_proj\.weight of shape \(12, 20\) holds NaN or Inf"),
    ],
    ids=["no match", "part of a name", "one of two", "regex", "predicate", "empty list", "tied", "NaN", "Inf"],
)
def test_an_error_leaves_the_model_as_it_was(spoil: Callable[[Tiny], None], targets: Any, words: str) -> None:
    model = Tiny()
    spoil(model)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        qg.quantize_(model, targets=targets)
    for name, (parameter, value) in before.items():
        assert model.get_parameter(name) is parameter
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0, equal_nan=True)


def test_a_model_without_linear_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        qg.quantize_(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_a_group_size_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        qg.quantize_(Tiny(), group_size=0)


# -- layers that have no weight of their own ---------------------------------------------------------------------------

PARAMETRISATIONS: dict[str, Callable[[nn.Linear], Any]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old spectral_norm": nn.utils.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_a_parametrised_layer_stays_in_float_and_is_named_in_the_log(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Tiny()
    layer = model.blocks[0]["q_proj"]
    PARAMETRISATIONS[name](layer)
    tokens = torch.tensor([[1, 2, 3]])
    model.eval()
    before = model(tokens)
    qg.quantize_(model)
    assert quantised(model) == ["blocks.0.o_proj.weight", "blocks.1.q_proj.weight", "blocks.1.o_proj.weight"]
    torch.testing.assert_close(model(tokens), before, rtol=0.05, atol=0.05)
    assert "left in float: blocks.0.q_proj: its weight is parametrised" in caplog.text
    with pytest.raises(ValueError, match=r"blocks\.0\.q_proj: its weight is parametrised.*remove the parametrisation"):
        qg.quantize_(model, targets="0.q_proj")


def test_other_libraries_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0: its weight of dtype torch\.uint8 is quantised by another library"):
        qg.quantize_(model)
    with pytest.raises(ValueError, match="0: its weight is not initialised yet; run the model once"):
        qg.quantize_(nn.Sequential(nn.LazyLinear(4)))


class Conv1D(nn.Module):
    """As in transformers' GPT-2: a linear layer whose weight is (inputs, outputs) and no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))


def test_matrices_outside_of_linear_layers_are_named_with_what_helps() -> None:
    with pytest.raises(ValueError, match=r"no nn\.Linear.*h\.0\.weight \(Conv1D, 2-D\).*group of your own") as error:
        qg.quantize_(nn.ModuleDict({"h": nn.ModuleList([Conv1D()])}))
    assert "targets= with names" not in str(error.value)
    with pytest.raises(ValueError, match=r"linear layers \(lm_head\)\. Its other matrices.*h\.0\.weight \(Conv1D"):
        qg.quantize_(nn.ModuleDict({"h": nn.ModuleList([Conv1D()]), "lm_head": nn.Linear(8, 6)}))


def test_adapters_beside_a_base_layer_are_no_default_targets() -> None:
    wrapped = nn.ModuleDict(
        {"base_layer": nn.Linear(8, 8), "lora_A": nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})}
    )
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"q_proj": wrapped})])
    assert quantised(qg.quantize_(model)) == ["layers.0.q_proj.base_layer.weight"]


def test_what_was_taken_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qgalore_compile"):
        qg.quantize_(Tiny())
    assert caplog.messages == ["INT8: 4 weights, 68 % of the parameters"]


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True], ids=["set", "swapped"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_float_checkpoint_keeps_the_weights_int8(assign: bool, swap: bool) -> None:
    source, model = Tiny(), copy.deepcopy(qg.quantize_(Tiny(), group_size=7))
    was = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.load_state_dict(source.state_dict(), assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(was)
    assert len(quantised(model)) == 4
    for name in quantised(model):
        weight = model.get_parameter(name)
        assert isinstance(weight, nn.Parameter)
        assert_same(weight, storage(Int8Weight.from_float(source.get_parameter(name), 7)))


def test_to_empty_keeps_the_weights_int8_and_they_can_be_loaded() -> None:
    source = qg.quantize_(Tiny(), group_size=7)
    model = qg.quantize_(Tiny(), group_size=7).to("meta").to_empty(device="cpu")
    assert quantised(model) == quantised(source)
    model.load_state_dict(source.state_dict())
    for name in quantised(model):
        assert_same(model.get_parameter(name), storage(int8(source.get_submodule(name.removesuffix(".weight")))))


def test_vectors_of_parameters_go_out_and_come_back() -> None:
    model, other = qg.quantize_(Tiny(), group_size=7), qg.quantize_(Tiny(), group_size=7)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach(), other.parameters())
    assert quantised(other) == quantised(model)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.detach() + 0, theirs.detach() + 0)


# -- dequantize_ -------------------------------------------------------------------------------------------------------


def test_dequantize_puts_floats_back_shared_frozen_and_with_gradients(caplog: pytest.LogCaptureFixture) -> None:
    model = Tiny().bfloat16()
    model.blocks[1]["q_proj"].weight = model.blocks[0]["q_proj"].weight
    model.blocks[0]["o_proj"].weight.requires_grad_(False)
    qg.quantize_(model, group_size=7)
    tokens = torch.tensor([[1, 2]])
    model(tokens).sum().backward()
    gradient, before = model.blocks[0]["q_proj"].weight.grad, model(tokens)
    assert qg.dequantize_(model) is model
    assert quantised(model) == []
    weight = model.blocks[0]["q_proj"].weight
    assert (type(weight), weight.dtype, weight.requires_grad) == (nn.Parameter, torch.bfloat16, True)
    assert weight is model.blocks[1]["q_proj"].weight
    assert weight.grad is gradient
    assert not model.blocks[0]["o_proj"].weight.requires_grad
    assert torch.equal(model(tokens), before)
    assert "build it anew" in caplog.text
    assert not any(layer._load_state_dict_pre_hooks for layer in model.modules())
    weight.data.mul_(2)  # an ordinary parameter


def test_dequantizing_frozen_weights_or_none_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    qg.dequantize_(qg.dequantize_(qg.quantize_(Tiny().requires_grad_(False))))
    assert caplog.text == ""


def test_an_optimizer_built_before_holds_the_int8_weights_still() -> None:
    layer = linear()
    held = layer.weight
    qg.dequantize_(layer)
    assert isinstance(held, Int8Weight)
    assert layer.weight is not held
