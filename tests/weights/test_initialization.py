"""First values drawn module by module are those of a float model that is drawn whole and then quantised."""

from __future__ import annotations

import contextlib
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
    with pytest.raises(ValueError, match=r"nothing gives values to 1\.gain: give init, a function"):
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

    with pytest.raises(ValueError, match=rf"nothing gives values to 1\.{left}: give init"):
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


def test_what_is_written_in_part_is_named_and_the_model_is_as_it_was() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"weight of shape \(3, 3\) is left without some of its values"):
        qg.initialize_(model, init=lambda layer: (layer.bias.zero_(), layer.weight[0].zero_()))
    assert model.weight.is_meta


class Branch(nn.Module):
    """A block whose own function writes below it, as GPT-2's and T5's do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down.weight, std=0.01)
        nn.init.zeros_(self.up.bias)
        self.mask.fill_(True)  # type: ignore[operator]


def test_a_parent_may_write_what_lies_below_it() -> None:
    torch.manual_seed(0)
    expected = nn.Sequential(Branch(), Branch())
    torch.manual_seed(0)
    for branch in expected:
        for module in (branch.up, branch.down, branch):
            module.reset_parameters()  # type: ignore[operator]
    torch.manual_seed(0)
    found = qg.initialize_(on_meta(lambda: nn.Sequential(Branch(), Branch())))
    assert_same(found, qg.quantize_(expected, group_size=4))


def test_flags_that_nothing_sets_are_named() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())

    with torch.device("meta"):
        model = Masked()
    with pytest.raises(ValueError, match="nothing gives values to mask"):
        qg.initialize_(model)


@pytest.mark.parametrize("fails", [False, True])
def test_a_function_that_draws_all_leaves_alone_what_has_values(fails: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = nn.Parameter(torch.empty(4, device="meta"))
    before = {name: value.clone() for name, value in model.named_parameters() if not value.is_meta}

    def init(module: nn.Module) -> None:
        for value in module.parameters(recurse=False):
            value.normal_()
        if fails and not model[1].bias.is_meta:
            raise KeyError("mine")

    with contextlib.suppress(KeyError):
        qg.initialize_(model, init=init)
    assert model[1].bias.is_meta == fails
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert not any(hasattr(value, "_is_hf_initialized") for value in now.values())


def test_torchs_own_transformer_draws_below_itself() -> None:
    def transformer() -> nn.Module:
        return nn.Transformer(8, 2, 1, 1, 8, batch_first=True)

    with torch.device("meta"):
        model = transformer()
    torch.manual_seed(0)
    found = qg.initialize_(model)
    spread = nn.init.calculate_gain("linear") * (6 / 16) ** 0.5  # xavier_uniform_ of 8 × 8
    weight = found.encoder.layers[0].linear1.weight.detach()  # type: ignore[union-attr,index]
    assert float(weight.abs().max()) > 8**-0.5  # nn.Linear's own draws end there
    assert float(weight.abs().max()) <= spread


@pytest.mark.parametrize("family", ["T5", "CLIP", "GPT2"])
def test_transformers_models_that_write_below_themselves_are_drawn(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    if family == "T5":
        model = transformers.T5ForConditionalGeneration
        config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    elif family == "CLIP":
        model = transformers.CLIPTextModel
        config = transformers.CLIPTextConfig(
            vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
        )
    else:
        model, config = (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2),
        )
    everything = {} if family == "GPT2" else {"targets": lambda name, linear: "head" not in name}
    if family == "GPT2":
        with torch.device("meta"):
            found = model(config)
    else:
        found = on_meta(lambda: model(config), **everything)
    torch.manual_seed(0)
    qg.initialize_(found)
    assert all(bool(each.isfinite().all()) for each in decoded(found).values())
    assert not any(each.is_meta for each in (*found.parameters(), *found.buffers()))
