"""Weights in any format: what holds for ``Int8Weight`` holds for the others, and what is no format of weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from formats_support import draws
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.formats import Format, FormatError
from qgalore_compile.weights import QuantizedWeight, write_back_

TEXTS = ("e4m3/32", "nf4/64+double", "int6/32", "int4/32", "e2m1/32+rotated", "e5m2/16+pow2")
EVERY = pytest.mark.parametrize("text", TEXTS)
M, N = 24, 77
"""Rows end in a short group, and in a byte that is half full."""


def linear(text: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A Linear with a weight in a format, labelled "0.weight"."""
    layer = qg.quantize_(nn.Sequential(nn.Linear(N, M, bias=bias).to(dtype)), format=text)[0]  # type: ignore[index]
    assert isinstance(layer, nn.Linear)
    return layer


def weight_of(layer: nn.Module) -> QuantizedWeight:
    assert isinstance(layer.weight, QuantizedWeight)
    return layer.weight


def parts(weight: Tensor) -> list[Tensor]:
    assert isinstance(weight, QuantizedWeight)
    return [part.clone() for part in weight.parts]


def assert_stores(weight: Tensor, expected: list[Tensor]) -> None:
    assert isinstance(weight, QuantizedWeight)
    assert len(weight.parts) == len(expected)
    assert all(map(torch.equal, weight.parts, expected))


# -- reading ----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_and_its_gradients_are_those_of_the_decoded_weight(text: str, dtype: torch.dtype) -> None:
    layer = linear(text, dtype=dtype)
    twin = nn.Linear(N, M, dtype=dtype)
    form = Format.parse(text)
    with torch.no_grad():
        twin.weight.copy_(form.decode(weight_of(layer).parts, (M, N), dtype))
        twin.bias.copy_(layer.bias)
    x = torch.randn(3, 5, N, dtype=dtype)
    found = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [each(one) for each, one in zip((layer, twin), found, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(found[0].grad, found[1].grad)  # type: ignore[arg-type]
    assert torch.equal(layer.weight.grad, twin.weight.grad)  # type: ignore[arg-type]
    assert type(layer.weight.grad) is Tensor


@EVERY
def test_the_transpose_reads_as_such_and_keeps_the_storage(text: str) -> None:
    weight = weight_of(linear(text)).detach()
    assert isinstance(weight.t(), QuantizedWeight)
    assert weight.t().shape == (N, M)
    assert torch.equal(weight.t().dequantize(), weight.dequantize().t())
    assert weight.t().codes.data_ptr() == weight.codes.data_ptr()


@EVERY
def test_bytes_are_the_format_s_bits(text: str) -> None:
    layer = qg.quantize_(nn.Sequential(nn.Linear(4096, 8, bias=False)), format=text)[0]  # type: ignore[index]
    weight = weight_of(layer)
    assert weight.nbytes == sum(part.nbytes for part in weight.parts)
    assert 8 * weight.nbytes / weight.numel() == pytest.approx(Format.parse(text).bits, rel=5e-3)


@EVERY
def test_its_text_names_it_its_shape_and_its_format(text: str) -> None:
    weight = weight_of(linear(text))
    assert f"'0.weight', shape=({M}, {N}), format='{Format.parse(text)}', dtype=torch.float32" in repr(weight)
    assert type(weight.data) is QuantizedWeight
    assert not isinstance(weight, qg.Int8Weight)


# -- copies and files -------------------------------------------------------------------------------------------------


def saved(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@EVERY
@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), saved],
    ids=["deepcopy", "pickle", "file"],
)
def test_a_copy_is_the_same_weight_with_storage_of_its_own(text: str, through: Callable[[Tensor], Tensor]) -> None:
    weight = weight_of(linear(text, dtype=torch.bfloat16))
    twin = through(weight)
    assert isinstance(twin, nn.Parameter)
    assert isinstance(twin, QuantizedWeight)
    assert_stores(twin, parts(weight))
    assert (twin.format, twin.dtype, twin.label, twin.requires_grad) == (
        weight.format,
        torch.bfloat16,
        "0.weight",
        True,
    )
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parts, weight.parts, strict=True))


@EVERY
def test_a_state_dict_that_was_saved_loads(text: str) -> None:
    layer, other = linear(text), linear(text)
    state = saved(layer.state_dict())
    assert isinstance(state, dict)
    other.load_state_dict(state)
    assert_stores(other.weight, parts(layer.weight))


@EVERY
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_float_state_dict_loads_into_the_format(text: str, assign: bool) -> None:
    layer, source = linear(text), nn.Linear(N, M)
    expected = Format.parse(text).encode(source.weight.detach())
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert_stores(layer.weight, expected)
    assert isinstance(layer.weight, nn.Parameter)
    assert weight_of(layer).label == "0.weight"


@EVERY
@pytest.mark.parametrize("given", [*TEXTS, "int8/256"])
def test_a_weight_in_another_format_is_stored_in_its_own(text: str, given: str) -> None:
    target, source = linear(text), linear(given)
    value = weight_of(source).dequantize()
    target.load_state_dict(source.state_dict())
    expected = parts(source.weight) if text == given else Format.parse(text).encode(value)
    assert_stores(target.weight, expected)


@EVERY
def test_a_float_layer_loads_what_a_weight_stands_for(text: str) -> None:
    target, source = nn.Linear(N, M), linear(text)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight.detach(), weight_of(source).dequantize())


@EVERY
def test_dequantize_gives_a_float_model_that_stays_one(text: str) -> None:
    model = qg.quantize_(nn.Sequential(nn.Linear(N, M)), format=text)
    expected = weight_of(model[0]).dequantize()  # type: ignore[index]
    qg.dequantize_(model)
    assert type(model[0].weight) is nn.Parameter  # type: ignore[index]
    assert torch.equal(model[0].weight.detach(), expected)  # type: ignore[index]
    source = nn.Sequential(nn.Linear(N, M))
    model.load_state_dict(source.state_dict(), assign=True)
    assert type(model[0].weight) is nn.Parameter  # type: ignore[index]


# -- writing ----------------------------------------------------------------------------------------------------------


@EVERY
def test_copying_quantises_to_nearest_and_through_the_transpose_too(text: str) -> None:
    value, form = torch.randn(M, N), Format.parse(text)
    one, other = (weight_of(linear(text)) for _ in range(2))
    with torch.no_grad():
        one.copy_(value)
        other.t().copy_(value.t())
    for weight in (one, other):
        assert_stores(weight, form.encode(value))


@pytest.mark.parametrize("text", ["e4m3/32", "int6/32", "int4/32", "e2m1/32+rotated", "nf4/64"])
def test_a_moving_average_goes_where_the_one_in_float64_does(text: str) -> None:
    """To nearest every update would be lost; of 4 bits one that changes a group by less than a step is not."""
    average, net = (linear(text) for _ in range(2))
    start, live = (weight_of(each).dequantize().double() for each in (average, net))
    for _ in range(100):
        with torch.no_grad():
            average.weight.copy_(torch.lerp(weight_of(average).dequantize(), weight_of(net).dequantize(), 0.02))
    right = start + (1 - 0.98**100) * (live - start)
    moved = weight_of(average).dequantize().double() - start
    along = float((moved * (right - start)).sum() / (right - start).square().sum())
    assert along == pytest.approx(1.0, abs=0.1)


@EVERY
def test_write_back_rounds_by_the_draws_and_stays_where_ok_is_false(text: str) -> None:
    weight, value, noise = weight_of(linear(text)), torch.randn(M, N), draws((M, N))
    before = parts(weight)
    write_back_(weight, value, noise, torch.tensor(False))
    assert_stores(weight, before)
    write_back_(weight, value, noise, torch.tensor(True))
    assert_stores(weight, Format.parse(text).encode(value, noise))
    with pytest.raises(ValueError, match="not into its transpose"):
        write_back_(weight.detach().t(), value.t(), None, torch.tensor(True))  # type: ignore[arg-type]


@EVERY
def test_another_dtype_changes_what_it_stands_for_and_no_code(text: str) -> None:
    layer = linear(text)
    before = parts(layer.weight)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert_stores(layer.weight, before)
    assert layer.weight.detach().double().dtype == torch.float64
    assert type(layer.weight.detach().int()) is Tensor


@EVERY
@pytest.mark.parametrize(
    "change",
    [lambda w: w.add_(1), lambda w: w.zero_(), lambda w: w[0].fill_(0), lambda w: w.normal_(), lambda w: w.mul_(2)],
    ids=["add", "zero", "fill a row", "normal", "mul"],
)
def test_every_other_change_in_place_is_refused_and_changes_nothing(
    text: str, change: Callable[[Tensor], Tensor]
) -> None:
    weight = weight_of(linear(text))
    before = parts(weight)
    with torch.no_grad(), pytest.raises((NotImplementedError, RuntimeError), match=r"0\.weight|QuantizedWeight"):
        change(weight)
    assert_stores(weight, before)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "float32",
        "bfloat16",
        "dynamic8",
        "dynamic8+rows",
        "dynamic4",
        "moment4",
        "int4+planar",
        "e4m3+flat",
        "int4+pow2row",
        "official8",
    ],
)
def test_what_is_no_format_of_weights_is_refused_and_the_model_stays(text: str) -> None:
    model = nn.Sequential(nn.Linear(N, M))
    with pytest.raises(FormatError, match=r"is no format of weights: those have groups in rows.*such as 'int8/256'"):
        qg.quantize_(model, format=text)
    assert type(model[0].weight) is nn.Parameter


def test_an_unknown_format_is_told_what_there_is() -> None:
    with pytest.raises(ValueError, match="there is no format 'int7'; there are int8"):
        qg.quantize_(nn.Sequential(nn.Linear(N, M)), format="int7")


def test_a_group_stands_in_the_format_s_text() -> None:
    with pytest.raises(ValueError, match="group_size=64 and format='nf4': give the group in the format's text"):
        qg.quantize_(nn.Sequential(nn.Linear(N, M)), format="nf4", group_size=64)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    model = nn.Sequential(nn.Linear(N, M))
    with torch.no_grad():
        model[0].weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"0\.weight.*holds NaN or Inf"):
        qg.quantize_(model, format="e4m3")


@pytest.mark.parametrize("text", ["int8", "int8/32"])
def test_int8_is_the_class_of_its_own(text: str) -> None:
    layer = linear(text)
    assert type(layer.weight.detach()) is qg.Int8Weight
    assert weight_of(layer).format == Format.parse(text)
