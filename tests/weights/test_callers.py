"""Tools of PyTorch that take a module's weights apart: right with INT8 weights, or refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from int8 import assert_same, float_twin, int8, linear, storage
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import qgalore_compile as qg
from qgalore_compile import Int8Weight

X = torch.linspace(-1, 1, 39).reshape(3, 13)


def quantised(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, Int8Weight)]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Invertible(Doubled):
    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


# -- what would leave floats -------------------------------------------------------------------------------------------


def test_a_swap_that_would_put_floats_into_an_int8_weight_is_refused() -> None:
    layer, floats = linear(), nn.Parameter(torch.ones(8, 13))
    weight, before = int8(layer), storage(int8(layer))
    with pytest.raises(TypeError, match=r"would put a Parameter of floats into Int8Weight\('0\.weight'.*weight\.copy_"):
        torch.utils.swap_tensors(weight, floats)
    assert layer.weight is weight
    assert_same(weight, before)
    assert type(floats) is nn.Parameter


def test_int8_weights_swap_with_each_other_and_into_a_float_parameter() -> None:
    first, second = linear(), linear()
    was, were = storage(int8(first)), storage(int8(second))
    torch.utils.swap_tensors(first.weight, second.weight)
    assert_same(first.weight, were)
    assert_same(second.weight, was)
    layer = nn.Linear(13, 8)
    torch.utils.swap_tensors(layer.weight, first.weight)
    assert_same(layer.weight, were)


def test_a_module_that_swaps_its_parameters_keeps_them_int8_or_says_why_not() -> None:
    model = nn.Sequential(linear())
    was = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        weight, codes = int8(model[0]), int8(model[0]).codes.clone()
        model.half().double().to("cpu")
        assert model[0].weight is weight
        assert weight.dtype == torch.float64
        assert torch.equal(weight.codes, codes)
        with pytest.raises(RuntimeError, match=r"Couldn't swap Linear\.weight") as error:
            model._apply(lambda t: t.dequantize() if isinstance(t, Int8Weight) else t)
        assert "would no longer be INT8" in str(error.value.__cause__)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(was)
    assert quantised(model) == ["0.weight"]


@pytest.mark.parametrize(
    "register",
    [lambda x: parametrize.register_parametrization(x, "weight", Invertible()), nn.utils.parametrizations.orthogonal],
    ids=["right inverse", "orthogonal"],
)
def test_a_parametrisation_that_stores_floats_is_refused_and_the_layer_stays_as_it_was(
    register: Callable[[nn.Module], Any],
) -> None:
    layer = linear()
    weight, before = int8(layer), storage(int8(layer))
    with pytest.raises(TypeError, match=r"register it before quantize_, or .*qgalore_compile\.dequantize_\(model\)"):
        register(layer)
    assert layer._parameters["weight"] is weight
    assert not parametrize.is_parametrized(layer)
    assert_same(weight, before)
    register(qg.dequantize_(layer))


REMOVALS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any], str]] = {
    "parametrisation": (
        lambda x: parametrize.register_parametrization(x, "weight", Doubled()),
        lambda x: parametrize.remove_parametrizations(x, "weight"),
        "a float parameter.*leave_parametrized=False",
    ),
    "weight_norm": (
        nn.utils.parametrizations.weight_norm,
        lambda x: parametrize.remove_parametrizations(x, "weight"),
        "a float parameter",
    ),
    "spectral_norm": (
        nn.utils.parametrizations.spectral_norm,
        lambda x: parametrize.remove_parametrizations(x, "weight"),
        "a float parameter",
    ),
    "old weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm, "a float parameter"),
    "old spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, "a float parameter"),
    "pruning": (
        lambda x: prune.l1_unstructured(x, "weight", amount=0.5),
        lambda x: prune.remove(x, "weight"),
        "INT8 again, which has no exact code for the zeros",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REMOVALS)
def test_a_removal_whose_result_is_no_int8_weight_is_refused_and_the_layer_goes_on(name: str) -> None:
    register, remove, words = REMOVALS[name]
    model = nn.Sequential(linear()).eval()
    register(model[0])
    before, names = model(X), quantised(model)
    assert len(names) == 1
    with pytest.raises(NotImplementedError, match=f"as {words}"):
        remove(model[0])
    assert quantised(model) == names
    assert torch.equal(model(X), before)
    remove(qg.dequantize_(model)[0])  # type: ignore[index]  # the remedy
    assert isinstance(model[0].weight, nn.Parameter)
    torch.testing.assert_close(model(X), before)


def test_a_parametrisation_can_be_taken_off_without_its_result() -> None:
    layer = linear()
    before = storage(int8(layer))
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert_same(layer.weight, before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
def test_a_float_checkpoint_that_is_assigned_keeps_a_parametrised_weight_int8(norm: Callable[..., Any]) -> None:
    model, source = nn.Sequential(linear()), nn.Sequential(nn.Linear(13, 8))
    norm(model[0])
    norm(source[0])
    names = quantised(model)
    assert len(names) == 1
    model.load_state_dict(source.state_dict(), assign=True)
    assert quantised(model) == names
    assert_same(model.get_parameter(names[0]), storage(Int8Weight.from_float(source.get_parameter(names[0]), 5)))


# -- what is right -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REMOVALS)
def test_a_parametrised_int8_weight_has_the_gradient_of_the_float_one(name: str) -> None:
    layer = linear()
    twin = float_twin(layer)
    for each in (layer, twin):
        torch.manual_seed(0)  # spectral_norm's first vectors
        REMOVALS[name][0](each)
        each(X).square().sum().backward()
    for (ours_name, ours), (theirs_name, theirs) in zip(layer.named_parameters(), twin.named_parameters(), strict=True):
        assert ours_name == theirs_name
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_functional_calls_and_their_gradients_are_those_of_the_float_model() -> None:
    layer = linear()
    twin = float_twin(layer)

    def loss(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        return lambda parameters, x: torch.func.functional_call(module, parameters, (x,)).square().sum()

    ours, theirs = ({key: p.detach() for key, p in each.named_parameters()} for each in (layer, twin))
    for transform in (lambda f: torch.func.grad(f), lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))):
        torch.testing.assert_close(transform(loss(layer))(ours, X), transform(loss(twin))(theirs, X))
    assert quantised(layer) == ["weight"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by jvp itself; the category is the release's
def test_directional_derivatives_are_those_of_the_float_model() -> None:
    layer = linear()
    twin = float_twin(layer)
    results = []
    for each in (layer, twin):
        parameters = {key: p.detach() for key, p in each.named_parameters()}
        tangents = {key: torch.linspace(0, 1, p.numel()).reshape(p.shape) for key, p in parameters.items()}
        call = lambda given, each=each: torch.func.functional_call(each, given, (X,))  # noqa: E731
        results.append(torch.func.jvp(call, (parameters,), (tangents,)))
    torch.testing.assert_close(*results)


def test_stacked_models_are_floats_of_their_own() -> None:
    layers = [linear(), linear()]
    stacked, _ = torch.func.stack_module_state(layers)
    for position, layer in enumerate(layers):
        assert torch.equal(stacked["weight"][position], int8(layer).dequantize())
        assert quantised(layer) == ["weight"]


@pytest.mark.parametrize("init_", [nn.init.zeros_, nn.init.normal_, nn.init.kaiming_uniform_])
def test_an_initialisation_is_refused_and_changes_nothing(init_: Callable[[Tensor], Tensor]) -> None:
    layer = linear()
    before = storage(int8(layer))
    with pytest.raises(NotImplementedError, match=r"to assign values use weight\.copy_"):
        init_(layer.weight)
    assert_same(layer.weight, before)


def test_folding_a_batch_norm_gives_a_float_layer_beside_the_int8_one() -> None:
    layer, norm = linear().eval(), nn.BatchNorm1d(8).eval()
    with torch.no_grad():
        assert norm.running_mean is not None
        norm.running_mean.fill_(0.3)
    folded = nn.utils.fuse_linear_bn_eval(layer, norm)
    torch.testing.assert_close(folded(X), norm(layer(X)))
    assert quantised(layer) == ["weight"]
    assert not quantised(folded)
