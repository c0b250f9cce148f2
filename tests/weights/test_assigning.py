"""What copy_ stores: to nearest, except for small changes of what is stored already, as a moving average makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8 import Context, assert_same, int8, storage
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import qgalore_compile as qg
from qgalore_compile import Int8Weight

Average = Callable[[nn.Module, nn.Module, float], None]


def copied(average: nn.Module, net: nn.Module, part: float) -> None:
    for mine, theirs in zip(average.parameters(), net.parameters(), strict=True):
        mine.copy_(torch.lerp(mine, theirs, part))


def by_hand(average: nn.Module, net: nn.Module, part: float) -> None:
    for mine, theirs in zip(average.parameters(), net.parameters(), strict=True):
        mine.copy_((1 - part) * mine + part * theirs)


def set_data(average: nn.Module, net: nn.Module, part: float) -> None:
    for mine, theirs in zip(average.parameters(), net.parameters(), strict=True):
        mine.data = mine.data + part * (theirs.data - mine.data)


def of_state_dicts(average: nn.Module, net: nn.Module, part: float) -> None:
    for mine, theirs in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        mine.copy_(mine * (1 - part) + theirs * part)


def loaded(average: nn.Module, net: nn.Module, part: float) -> None:
    theirs = net.state_dict()
    average.load_state_dict({key: torch.lerp(mine, theirs[key], part) for key, mine in average.state_dict().items()})


def dequantised(average: nn.Module, net: nn.Module, part: float) -> None:
    for mine, theirs in zip(average.parameters(), net.parameters(), strict=True):
        if isinstance(mine, Int8Weight):
            mine.copy_(torch.lerp(mine.dequantize(), theirs.dequantize(), part))


def nets(scale: float = 0.03) -> tuple[nn.Sequential, nn.Sequential]:
    """A quantised layer, and one ``scale`` away: 30 steps of its grid."""
    net = nn.Sequential(nn.Linear(64, 64))
    qg.quantize_(net)
    average = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight.dequantize() + scale * torch.randn(64, 64))
    return average, net


def apart(found: nn.Module, right: Tensor, start: Tensor) -> float:
    weight = found[0].weight  # type: ignore[index]
    return float((weight.dequantize().double() - right).norm() / (right - start).norm())


@pytest.mark.parametrize("average_", [copied, by_hand, set_data, of_state_dicts, loaded, dequantised])
@pytest.mark.parametrize(("part", "updates"), [(0.02, 100), (0.1, 20)])
def test_a_moving_average_in_int8_goes_where_the_one_in_float64_does(
    average_: Average, part: float, updates: int
) -> None:
    average, net = nets()
    start, live = (int8(each[0]).dequantize().double() for each in (average, net))
    with torch.no_grad():
        for _ in range(updates):
            average_(average, net, part)
    done = 1 - (1 - part) ** updates
    # to nearest the first of them stays where it began: 0.9 off
    assert apart(average, start + done * (live - start), start) < 0.1


def test_averages_of_torch_are_right_or_refused_with_a_float_copy_as_the_remedy() -> None:
    for settings in ({"avg_fn": get_ema_avg_fn(0.98)}, {}):
        average, net = nets()
        start = int8(average[0]).dequantize().double()
        model = AveragedModel(average, **settings)
        model.update_parameters(average)
        right = start
        live = int8(net[0]).dequantize().double()
        for count in range(1, 60):
            model.update_parameters(net)
            right = torch.lerp(right, live, 0.02 if settings else 1 / (count + 1))
        assert apart(model.module, right, start) < 0.2
    model = AveragedModel(average, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    model.update_parameters(net)
    before = storage(int8(model.module[0]))
    with pytest.raises(NotImplementedError, match=r"Int8Weight\('0\.weight'.*average.*floats: .*dequantize_\(model\)"):
        model.update_parameters(net)
    assert_same(int8(model.module[0]), before)


def test_a_float_copy_takes_an_average_as_any_model_does() -> None:
    _, net = nets()
    model = AveragedModel(qg.dequantize_(copy.deepcopy(net)), multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for _ in range(2):
        model.update_parameters(net)
    torch.testing.assert_close(model.module[0].weight.detach(), int8(net[0]).dequantize())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 43),
    group_size=st.sampled_from([1, 3, 16, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_what_is_on_the_grid_is_stored_as_it_is(
    context: Context, m: int, n: int, group_size: int, dtype: torch.dtype
) -> None:
    start = Int8Weight.from_float(torch.randn(m, n), group_size).to(dtype)
    assert isinstance(start, Int8Weight)
    near = Int8Weight.from_float(start.dequantize(torch.float32) + 1e-3 * torch.randn(m, n), group_size)
    for weight, source in ((start, start.dequantize()), (start, near.dequantize())):
        expected = Int8Weight.from_float(source.float(), group_size)
        with context():
            weight.copy_(source)
        if dtype in (torch.float32, torch.float64):
            assert torch.equal(weight.codes, expected.codes)
        torch.testing.assert_close(weight.scale, expected.scale)


def test_values_far_from_what_is_stored_are_rounded_to_nearest() -> None:
    average, _ = nets()
    weight, value = int8(average[0]), torch.randn(64, 64)
    weight.detach().copy_(value)
    assert_same(weight, storage(Int8Weight.from_float(value)))


def test_each_group_is_judged_alone() -> None:
    weight = Int8Weight.from_float(torch.randn(64, 128), 64)
    value = weight.dequantize()
    value[:, :64] = torch.randn(64, 64)
    value[:, 64:] += 0.3 * weight.scale[:, 1:] * torch.sign(torch.randn(64, 64))
    nearest = Int8Weight.from_float(value, 64)
    weight.copy_(value)
    differ = weight.codes != nearest.codes
    assert not differ[:, :64].any()
    assert 0.1 < float(differ[:, 64:].float().mean()) < 0.5


def test_draws_repeat_in_the_same_program_differ_between_writes_and_leave_torch_s_generator_alone() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        average, _ = nets()
        weight = int8(average[0]).detach()
        value = weight.dequantize() + 0.3 * weight.scale * torch.randn(64, 64)
        generator, found = torch.get_rng_state(), []
        for _ in range(2):
            weight.copy_(value)
            found.append(weight.codes.clone())
        assert torch.equal(generator, torch.get_rng_state())
        return found

    first, second = run(), run()
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])


def test_a_compiled_average_is_right_too() -> None:
    average, net = nets()
    start, live = (int8(each[0]).dequantize().double() for each in (average, net))
    mine, theirs = int8(average[0]).detach(), int8(net[0]).dequantize()

    def update(mine: Any, theirs: Tensor) -> None:
        mine.copy_(torch.lerp(mine.dequantize(), theirs, 0.04))

    compiled = torch.compile(update, backend="aot_eager", fullgraph=True)
    for _ in range(40):
        compiled(mine, theirs)
    assert apart(average, start + (1 - 0.96**40) * (live - start), start) < 0.2


def test_the_log_says_once_that_an_average_is_noisy_and_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    from qgalore_compile.weights import assigning

    assigning._tell.cache_clear()
    average, net = nets()
    with torch.no_grad():
        for _ in range(3):
            copied(average, net, 0.01)
    assert len(caplog.messages) == 1
    assert "moving average" in caplog.text
    assert "dequantize_" in caplog.text
