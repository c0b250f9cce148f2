"""Second moments are those of what the layers were given, whatever form the batches have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from int8 import Tiny
from torch import Tensor, nn

from qgalore_compile.exports.calibration import second_moments
from qgalore_compile.exports.tensors import identity
from qgalore_compile.weights import quantize_, select_linears

BATCHES = [torch.arange(6).view(2, 3), torch.tensor([[16, 9]])]


def test_they_are_the_mean_of_the_inputs_products() -> None:
    model = Tiny()
    block: Any = model.blocks[0]
    moments = second_moments(model, [("q", block["q_proj"]), ("o", block["o_proj"])], BATCHES)
    with torch.no_grad():
        first = torch.cat([model.embed(batch).view(-1, 12) for batch in BATCHES])
        second = torch.relu(block["q_proj"](first))
    for layer, x in ((block["q_proj"], first), (block["o_proj"], second)):
        torch.testing.assert_close(moments[identity(layer.weight)], x.mT @ x / 8)


@pytest.mark.parametrize(
    "form", [lambda b: (b,), lambda b: [b], lambda b: {"tokens": b}], ids=["tuple", "list", "dict"]
)
def test_a_batch_may_be_arguments(form: Any) -> None:
    model = Tiny()
    layers = select_linears(model)
    plain, formed = second_moments(model, layers, BATCHES), second_moments(model, layers, map(form, BATCHES))
    assert plain.keys() == formed.keys()
    assert all(torch.equal(plain[key], formed[key]) for key in plain)


def test_the_model_runs_without_dropout_and_gradients_and_is_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].eval()
    model[1].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    seen: list[bool] = []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    linear: Any = model[1]
    moments = second_moments(model, [("1", linear)], [torch.ones(4, 3)])
    assert torch.equal(moments[identity(linear.weight)], torch.ones(3, 3))
    assert seen == [False]
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not linear._forward_pre_hooks


def test_layers_that_share_a_weight_share_a_moment() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    first: Any = model[0]
    second: Any = model[1]
    second.weight = first.weight
    x = torch.randn(5, 3)
    moments = second_moments(model, [("0", first), ("1", second)], [x])
    both = torch.cat([x, first(x).detach()])
    assert len(moments) == 1
    torch.testing.assert_close(moments[identity(first.weight)], both.mT @ both / 10)


def test_int8_and_bfloat16_layers_are_seen() -> None:
    model = quantize_(Tiny().bfloat16(), group_size=5)
    moments = second_moments(model, select_linears(model), BATCHES)
    assert {moment.dtype for moment in moments.values()} == {torch.float32}
    assert len(moments) == 4


class Branch(nn.Module):
    """A model whose second layer is there and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


def test_what_cannot_be_told_is_refused_and_no_hook_stays() -> None:
    model = Branch()
    layers = [("used", model.used), ("unused", model.unused)]
    with pytest.raises(ValueError, match="calibration has no batch"):
        second_moments(model, layers, [])
    with pytest.raises(ValueError, match="unused was not called by the calibration batches"):
        second_moments(model, layers, [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="used: its inputs on the calibration batches hold NaN or Inf"):
        second_moments(model, layers[:1], [torch.full((1, 2), torch.inf)])
    with pytest.raises(RuntimeError):
        second_moments(model, layers, [torch.ones(1, 5)])
    assert not model.used._forward_pre_hooks
    assert model.training
