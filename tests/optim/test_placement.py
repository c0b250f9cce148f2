"""Parameters and state that were moved or cast after the optimizer was built are refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import snapshot, tokens, toy, training_step
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.optim.placement import PlacementError


def cast_all(opt: qg.QGaLoreAdamW, change: Callable[[Tensor], Tensor]) -> None:
    """As resuming scripts do it."""
    for state in opt.state.values():
        for name, value in state.items():
            state[name] = change(value)


CASTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "to another device": (lambda t: t.to("meta"), r"blocks\.0\.weight: its step is torch.int64 on meta .* on cpu"),
    "to bfloat16": (lambda t: t.to(torch.bfloat16), r"blocks\.0\.weight: its step is torch.bfloat16 .* torch.int64"),
    "codes to floats": (
        lambda t: t.float() if t.dtype == torch.uint8 else t,
        r"blocks\.0\.weight: its projector is torch.float32 on cpu and must be torch.uint8",
    ),
    "floats to half": (
        lambda t: t.half() if t.dtype == torch.float32 else t,
        r"blocks\.0\.weight: its projector_scale is torch.float16 on cpu and must be torch.float32",
    ),
    "the schedule to single": (
        lambda t: t.float() if t.dtype == torch.float64 else t,
        r"blocks\.0\.weight: its schedule is torch.float32 on cpu and must be torch.float64",
    ),
}


@pytest.mark.parametrize("how", CASTS)
def test_state_that_was_moved_or_cast_is_refused_by_name_before_anything_changes(how: str) -> None:
    change, message = CASTS[how]
    model, opt = toy()
    step = training_step(model, opt)
    step(tokens())
    cast_all(opt, change)
    was = snapshot(model, opt)
    with pytest.raises(PlacementError, match=message + ".*let it load this one's state_dict"):
        step(tokens())
    now = snapshot(model, opt)
    assert all(
        torch.equal(was[name].nan_to_num(7e7), value.nan_to_num(7e7))
        for name, value in now.items()
        if not value.is_meta
    )


def test_state_of_a_later_parameter_is_looked_at_before_the_first_is_updated() -> None:
    model, opt = toy()
    opt.state[model.head.bias]["exp_avg"] = opt.state[model.head.bias]["exp_avg"].double()
    was = snapshot(model, opt)
    with pytest.raises(PlacementError, match=r"head\.bias: its exp_avg is torch.float64"):
        training_step(model, opt)(tokens())
    now = snapshot(model, opt)
    assert all(torch.equal(was[name].nan_to_num(7e7), now[name].nan_to_num(7e7)) for name in was)


def test_the_optimizer_s_own_counters_are_looked_at_too() -> None:
    model, opt = toy()
    state = opt.state[model.blocks[0].weight]
    state["skipped_steps"] = state["skipped_steps"].float()
    with pytest.raises(PlacementError, match=r"blocks\.0\.weight: its skipped_steps is torch.float32"):
        training_step(model, opt)(tokens())


def test_the_remedy_takes_a_run_on_bit_for_bit() -> None:
    model, opt = toy()
    training_step(model, opt)(tokens())
    again, fresh = toy(seed=1)
    again.load_state_dict(model.state_dict())
    fresh.load_state_dict(opt.state_dict())
    for each in ((model, opt), (again, fresh)):
        training_step(*each)(tokens(seed=2))
    was, now = snapshot(model, opt), snapshot(again, fresh)
    assert all(torch.equal(was[name].nan_to_num(7e7), now[name].nan_to_num(7e7)) for name in was)


def test_a_model_made_float64_after_the_optimizer_was_built_is_refused() -> None:
    net = nn.Linear(4, 3)
    opt = qg.QGaLoreAdamW(net.named_parameters())
    net.double()
    net(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    with pytest.raises(PlacementError, match=r"weight is torch.float64 now.*float32, bfloat16 and float16"):
        opt.step()


def test_a_model_made_bfloat16_after_the_optimizer_was_built_goes_on() -> None:
    net = nn.Linear(4, 3)
    opt = qg.QGaLoreAdamW(net.named_parameters(), lr=0.5)
    net.bfloat16()
    net(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    was = net.weight.detach().clone()
    opt.step()
    torch.testing.assert_close(net.weight.detach(), was - 0.5, rtol=0.02, atol=0.01)


def test_a_parameter_put_into_a_group_by_hand_is_refused() -> None:
    net = nn.Linear(4, 3)
    opt = qg.QGaLoreAdamW([net.weight])
    opt.param_groups[0]["params"].append(net.bias)
    net(torch.ones(2, 4)).sum().backward()
    was = net.weight.detach().clone()
    with pytest.raises(PlacementError, match=r"parameter 1 of group 0 has no state.*use add_param_group"):
        opt.step()
    assert torch.equal(net.weight, was)


TWO = {
    "one group": lambda a, b: [a, b],
    "two groups": lambda a, b: [{"params": [a]}, {"params": [b]}],
}


@pytest.mark.parametrize("how", TWO)
def test_parameters_on_two_devices_are_refused_at_construction(how: str) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"of group . is on meta, other parameters on cpu; .* must be on one device"):
        qg.QGaLoreAdamW(TWO[how](a, b))
