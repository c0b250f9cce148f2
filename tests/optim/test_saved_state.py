"""A state dict whose shapes fit and whose values cannot be: refused in words, and nothing is loaded of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Toy, snapshot, tokens, toy, training_step

import qgalore_compile as qg
from qgalore_compile.subspace.scheduler import Schedule

Saved = dict[str, Any]


def trained(**settings: Any) -> tuple[Toy, qg.QGaLoreAdamW]:
    model, opt = toy(update_proj_gap=2, queue_size=2, **settings)
    step = training_step(model, opt)
    for index in range(5):
        step(tokens(seed=index))
    return model, opt


def in_group(key: str, value: object, group: int = 0) -> Callable[[Saved], None]:
    def change(saved: Saved) -> None:
        saved["param_groups"][group][key] = value

    return change


def in_state(key: str, value: float, place: int = 0, parameter: int = 0) -> Callable[[Saved], None]:
    def change(saved: Saved) -> None:
        saved["state"][parameter][key].view(-1)[place] = value

    return change


def in_schedule(field: str, value: float) -> Callable[[Saved], None]:
    return in_state("schedule", value, list(Schedule.__dataclass_fields__).index(field))


CANNOT_BE = [
    # settings
    (in_group("lr", math.nan), "saved parameter group 0.*lr.*NaN"),
    (in_group("lr", "fast", 1), "saved parameter group 1.*lr must be a number, got 'fast'"),
    (in_group("eps", None), "eps must be a number, got None"),
    (in_group("weight_decay", -1.0), "weight_decay must not be negative"),
    (in_group("betas", (0.9, 2.0)), r"betas must be in \[0, 1\)"),
    (in_group("betas", (0.9, "0.99")), "betas must be two numbers"),
    (in_group("betas", 0.9), "betas must be two numbers.*got 0.9"),
    (in_group("scale", math.inf), "scale must be a finite number"),
    (in_group("update_proj_gap", 0), "update_proj_gap must be an integer of at least 1"),
    (in_group("refresh", "magic"), "refresh must be one of"),
    (in_group("seed", -(2**70)), "seed must be an integer"),
    (in_group("rank", 3), "saved state has rank=3"),
    (in_group("quant_n_bit", 8), "quant_n_bit=8.*settings of the saved one"),
    (in_group("quant", False), "quant=False.*settings of the saved one"),
    (in_group("moments", "32bit"), "moments='32bit'.*settings of the saved one"),
    (in_group("amsgrad", False), "unknown key 'amsgrad'"),
    # numbers
    (in_state("projector_scale", math.nan), r"blocks\.0\.weight: the saved projector_scale holds NaN or Inf"),
    (in_state("projector_scale", -1.0), "projector_scale holds -1, which must not be negative"),
    (in_state("projector_offset", math.inf), "projector_offset holds NaN or Inf"),
    (in_state("exp_avg_absmax", math.inf), "exp_avg_absmax holds NaN or Inf"),
    (in_state("exp_avg_sq_root_absmax", -0.5), "exp_avg_sq_root_absmax holds -0.5"),
    (in_state("step", -1), "step holds -1, which must not be negative"),
    (in_state("exp_avg_sq", -1e-9, parameter=3), "exp_avg_sq holds -1e-09, which must not be negative"),
    # schedules
    (in_schedule("clock", math.nan), "schedule counts nan.*whole numbers"),
    (in_schedule("next", 2.5), "schedule counts .*2.5.*whole numbers"),
    (in_schedule("gap", 0), "schedule has gap 0, which must be at least 1"),
    (in_schedule("gap", -3), "schedule has gap -3"),
    (in_schedule("last", 1e6), "tells of turns after its clock"),
    (in_schedule("next", 2.0**52), "it would never come"),
    (in_schedule("refreshes", 0), "schedule has refreshes 0 and the last of them at"),
    (in_schedule("slot", -2), "schedule has slot -2"),
    (in_schedule("energy", -0.5), "negative energy"),
    (in_schedule("queue", math.inf), "infinite energy or similarity"),
]


@pytest.mark.parametrize(("change", "message"), CANNOT_BE, ids=[message for _, message in CANNOT_BE])
def test_a_value_that_cannot_be_is_refused_and_nothing_is_loaded(change: Callable[[Saved], None], message: str) -> None:
    model, opt = trained()
    saved = copy.deepcopy(opt.state_dict())
    change(saved)
    training_step(model, opt)(tokens(seed=9))
    was, keys = snapshot(model, opt), repr(opt.param_groups)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    now = snapshot(model, opt)
    assert all(torch.equal(was[name].nan_to_num(7e7), now[name].nan_to_num(7e7)) for name in was)
    assert repr(opt.param_groups) == keys


def test_parameters_of_one_shape_in_another_order_are_refused() -> None:
    """What fits by shape would give each of two weights the other's moments."""
    _, opt = toy()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][1]["param_names"].reverse()
    with pytest.raises(ValueError, match="parameters are this optimizer's in another order, beginning with"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        {},
        {"state": {}},
        {"param_groups": [], "state": None},
        {"param_groups": [{}], "state": {}},
        {"param_groups": {"0": 1}, "state": {}},
        {"param_groups": [], "state": {0: 1}},
    ],
    ids=str,
)
def test_what_is_no_state_dict_is_refused_in_words(given: object) -> None:
    _, opt = toy()
    with pytest.raises(ValueError, match="no state_dict of an optimizer"):
        opt.load_state_dict(given)  # type: ignore[arg-type]


def test_a_state_that_is_no_tensor_is_refused_by_name() -> None:
    _, opt = toy()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg"] = [1, 2]
    with pytest.raises(ValueError, match=r"blocks\.0\.weight.*exp_avg is a list, no tensor"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize(
    "settings",
    [dict(stagger=False), dict(similarity="official"), dict(trigger="energy"), dict(moments="32bit", quant=False)],
    ids=str,
)
def test_every_state_that_training_leaves_is_taken(settings: dict[str, Any]) -> None:
    model, opt = toy(update_proj_gap=2, queue_size=2, **settings)
    step = training_step(model, opt)
    for index in range(12):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        step(tokens(seed=index))
    model(tokens()).backward()
    for parameter in model.parameters():
        parameter.grad[0] = math.inf  # type: ignore[index]
    opt.step()  # leaves a norm that is not finite
    assert not torch.isfinite(opt.last_grad_norm)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
