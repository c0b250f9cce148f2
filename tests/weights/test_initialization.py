"""First values drawn module by module are those of a float model that is drawn whole and then quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qgalore_compile as qg


def decoded(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: each.dequantize() if isinstance(each, qg.Int8Weight) else each for name, each in state.items()}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    own, other = decoded(found), decoded(expected)
    assert own.keys() == other.keys()
    for name in own:
        assert torch.equal(own[name], other[name]), name
    for (name, buffer), (_, like) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, like), name
    kinds = [[type(each) for each in model.parameters()] for model in (found, expected)]
    assert kinds[0] == kinds[1]


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(9, 12), nn.Linear(12, 10), nn.LayerNorm(10), nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 6))
    )


def on_meta(make: Callable[[], nn.Module], **keys: Any) -> nn.Module:
    with torch.device("meta"):
        model = make()
    return qg.quantize_(model, group_size=4, **keys)


def test_each_module_draws_what_its_reset_parameters_draws() -> None:
    torch.manual_seed(3)
    expected = plain()
    for module in expected.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(3)
    plain()  # the numbers that the construction above drew
    found = qg.initialize_(on_meta(plain))
    assert_same(found, qg.quantize_(expected, group_size=4))


def test_a_function_of_ones_own_is_applied_children_first() -> None:
    def init(module: nn.Module) -> None:
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            value.normal_() if value.is_floating_point() else value.fill_(3)

    expected = plain()
    torch.manual_seed(0)
    with torch.no_grad():
        expected.apply(init)
    torch.manual_seed(0)
    found = qg.initialize_(on_meta(plain), init=init)
    assert_same(found, qg.quantize_(expected, group_size=4))


def test_what_has_values_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    before = model[0].weight.clone()
    qg.initialize_(model)
    assert torch.equal(model[0].weight, before)
    assert not any(each.is_meta for each in model.parameters())


def test_frozen_weights_stay_frozen_and_shared_ones_shared() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    qg.quantize_(model, group_size=4)
    qg.initialize_(model)
    assert model[1].weight is model[0].weight
    assert isinstance(model[0].weight, qg.Int8Weight)
    assert not model[2].weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_a_transformers_model_draws_what_its_own_function_draws_and_gets_its_buffers(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    found = on_meta(lambda: transformers.LlamaForCausalLM(config))
    assert any(buffer.is_meta for buffer in found.buffers())
    torch.manual_seed(0)
    qg.initialize_(found)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    expected = transformers.LlamaForCausalLM(config)
    torch.manual_seed(0)
    drawn = [module for module in expected.modules() if not (tied and module is expected.lm_head)]
    with torch.no_grad():
        for module in sorted(drawn, key=lambda module: module is expected.lm_head):
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                vars(value).pop("_is_hf_initialized", None)
            expected._init_weights(module)
    assert_same(found, qg.quantize_(expected, group_size=4))


class Bare(nn.Module):
    """A parameter that nothing initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


def test_a_module_that_nothing_initialises_is_named_before_anything_is_drawn() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Bare())
    with pytest.raises(ValueError, match=r"nothing initialises 1 \(Bare\): the class has no reset_parameters"):
        qg.initialize_(model)
    assert all(each.is_meta for each in model.parameters())


@pytest.mark.parametrize("left", ["weight", "bias"])
def test_what_is_left_without_values_is_named_and_the_model_is_as_it_was(left: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = [*model.parameters()]

    def init(module: nn.Module) -> None:
        for name, value in module.named_parameters(recurse=False):
            if module is model[0] or name != left:
                value.fill_(1)

    with pytest.raises(ValueError, match=rf"1\.{left} of shape .* is left without values by what initialises Linear"):
        qg.initialize_(model, init=init)
    assert all(own is old for own, old in zip(model.parameters(), before, strict=True))


def test_an_exception_of_the_function_leaves_the_model_as_it_was() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def init(module: nn.Module) -> None:
        if module is model[1]:
            raise KeyError("mine")
        module.reset_parameters()  # type: ignore[operator]

    with pytest.raises(KeyError, match="mine"):
        qg.initialize_(model, init=init)
    assert all(each.is_meta for each in model.parameters())
