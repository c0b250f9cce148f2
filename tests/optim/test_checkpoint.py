"""Saving and resuming: bit for bit, or refused before anything changes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from support import Toy, snapshot, tokens, toy, training_step
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import qgalore_compile as qg

SETTINGS = [
    {},
    dict(int8=False, quant=False, moments="32bit"),
    dict(quant_n_bit=8, weight_decay=0.1, max_grad_norm=0.5),
    dict(nonfinite="skip_parameter", refresh="randomized", similarity="official", seed=2**40 + 1),
    dict(dtype=torch.bfloat16),
    dict(refresh="power", moments_on_refresh="rotate"),
    dict(refresh="power", moments_on_refresh="reset", moments="32bit", similarity="official"),
]
settings_ = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def through_a_file(value: Any) -> Any:
    """torch.save, and torch.load that runs no code."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        # NaN equals NaN: a queue that is not full yet
        assert torch.equal(a[name].nan_to_num(7e7), b[name].nan_to_num(7e7)), name


def train(model: Toy, opt: qg.QGaLoreAdamW, first: int, last: int) -> None:
    step = training_step(model, opt)
    for index in range(first, last):
        step(tokens(seed=index))


def same_layout(**settings: Any) -> tuple[Toy, qg.QGaLoreAdamW]:
    """The same settings, other weights."""
    return toy(**{"update_proj_gap": 4, "queue_size": 2, **settings})


@settings_
@pytest.mark.parametrize("at", [0, 3, 4])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(settings: dict[str, Any], at: int) -> None:
    model, opt = same_layout(**settings)
    train(model, opt, 0, at)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, at, 10)

    resumed, resumed_opt = same_layout(**settings)
    train(resumed, resumed_opt, 90, 92)  # into a state that is not fresh, too
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["opt"])
    train(resumed, resumed_opt, at, 10)
    assert_same(snapshot(model, opt), snapshot(resumed, resumed_opt))
    assert repr(opt.schedule()) == repr(resumed_opt.schedule())


def test_loading_restores_exactly_what_was_saved() -> None:
    model, opt = same_layout()
    train(model, opt, 0, 5)
    saved = through_a_file(opt.state_dict())
    was = snapshot(model, opt)
    train(model, opt, 5, 9)
    opt.load_state_dict(saved)
    now = snapshot(model, opt)
    states = [name for name in was if "/" in name]
    assert_same({name: was[name] for name in states}, {name: now[name] for name in states})


def test_codes_keep_their_dtype_and_tensors_their_identity() -> None:
    """Optimizer.load_state_dict would make floats of codes and new tensors, that a compiled step would not know."""
    model, opt = same_layout()
    train(model, opt, 0, 2)
    saved = through_a_file(opt.state_dict())
    before = {(key, name): value for key, state in opt.state.items() for name, value in state.items()}
    opt.load_state_dict(saved)
    state = opt.state[model.blocks[0].weight]
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq_root", "projector")} == {torch.uint8}
    assert state["schedule"].dtype == torch.float64
    for (key, name), value in before.items():
        assert opt.state[key][name] is value


def test_lr_betas_and_other_settings_of_a_group_are_restored_and_lr_stays_its_tensor() -> None:
    _, opt = same_layout(lr=0.5, betas=(0.8, 0.9), scale=2.0, weight_decay=0.3, eps=1e-3)
    saved = through_a_file(opt.state_dict())
    _, other = same_layout(weight_decay=0.1)
    lrs = [group["lr"] for group in other.param_groups]
    other.load_state_dict(saved)
    for group, lr in zip(other.param_groups, lrs, strict=True):
        assert group["lr"] is lr
        assert (float(lr), group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-3)
    assert (other.param_groups[0]["scale"], other.param_groups[0]["weight_decay"]) == (2.0, 0.3)


def test_a_scheduler_resumes_too() -> None:
    def build() -> tuple[Toy, qg.QGaLoreAdamW, torch.optim.lr_scheduler.LRScheduler]:
        model, opt = same_layout()
        return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)

    model, opt, scheduler = build()
    for index in range(4):
        train(model, opt, index, index + 1)
        scheduler.step()
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict(), "lr": scheduler.state_dict()})
    other, other_opt, other_scheduler = build()
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    other_scheduler.load_state_dict(saved["lr"])
    for index in range(4, 8):
        for m, o, s in ((model, opt, scheduler), (other, other_opt, other_scheduler)):
            train(m, o, index, index + 1)
            s.step()
        assert float(opt.param_groups[0]["lr"]) == float(other_opt.param_groups[0]["lr"])
    assert_same(snapshot(model, opt), snapshot(other, other_opt))


def test_counters_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = same_layout(stagger=False)
    monkeypatch.setattr(torch.linalg, "svd", no_convergence)
    model(tokens()).backward()
    model.embed.weight.grad[0, 0] = torch.nan  # type: ignore[index]
    opt.step()
    _, other = same_layout(stagger=False)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert int(other.skipped_steps) == 1
    assert [record.failures for record in other.schedule()] == [1, 1]


def no_convergence(*args: Any, **kwargs: Any) -> None:
    raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")


def test_a_state_dict_that_was_loaded_is_not_shared() -> None:
    model, opt = same_layout()
    train(model, opt, 0, 2)
    saved = through_a_file(opt.state_dict())
    kept = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    train(model, opt, 2, 4)
    for key, state in kept["state"].items():
        assert_same(state, saved["state"][key])


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved_with", "message"),
    [
        (dict(rank=3), r"blocks\.0\.weight of shape \(20, 12\).*rank|blocks\.0\.weight of shape \(20, 12\).*settings"),
        (dict(quant=False), r"blocks\.0\.weight of shape \(20, 12\).*projector_scale.*quant"),
        (dict(quant_n_bit=8), r"blocks\.0\.weight of shape \(20, 12\).*projector.*settings"),
        (dict(quant_group_size=4), r"blocks\.0\.weight of shape \(20, 12\).*projector_scale.*settings"),
        (dict(queue_size=3), r"blocks\.0\.weight of shape \(20, 12\).*schedule.*settings"),
        (dict(moments="32bit"), r"blocks\.0\.weight of shape \(20, 12\).*exp_avg_absmax.*moments"),
        (dict(weight_decay=0.1), r"groups of \[2, 2, 5\].*\[2, 7\].*same groups"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    saved_with: dict[str, Any], message: str
) -> None:
    other, other_opt = toy(**saved_with)
    train(other, other_opt, 0, 2)
    saved = through_a_file(other_opt.state_dict())
    model, opt = toy()
    train(model, opt, 0, 3)
    was, keys = snapshot(model, opt), repr(opt.param_groups)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert_same(was, snapshot(model, opt))
    assert repr(opt.param_groups) == keys


@pytest.mark.parametrize("parameter", [0, 1], ids=["the first parameter", "another"])
def test_moments_that_hold_v_itself_are_refused_whatever_else_differs_and_change_nothing(parameter: int) -> None:
    """As written by versions that stored v in 8 bits, where a step count and whatever else was another too."""
    other, other_opt = toy()
    train(other, other_opt, 0, 2)
    saved = through_a_file(other_opt.state_dict())
    state = saved["state"][parameter]
    state["exp_avg_sq"], state["exp_avg_sq_absmax"] = (state.pop(f"exp_avg_sq_root{part}") for part in ("", "_absmax"))
    del saved["state"][0]["step"]
    model, opt = toy()
    train(model, opt, 0, 3)
    was, keys = snapshot(model, opt), repr(opt.param_groups)
    message = (
        rf"(?s)blocks\.{parameter}\.weight: .*hold v itself \(exp_avg_sq_absmax\).*earlier versions.*stores √v "
        r"\(exp_avg_sq_root_absmax\).*load the model's weights alone and begin with fresh moments, or end the run"
    )
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert_same(was, snapshot(model, opt))
    assert repr(opt.param_groups) == keys


def test_the_last_parameter_s_misfit_leaves_the_first_one_alone_too() -> None:
    model, opt = toy()
    train(model, opt, 0, 2)
    saved = through_a_file(opt.state_dict())
    train(model, opt, 2, 4)
    last = saved["param_groups"][-1]["params"][-1]
    saved["state"][last]["exp_avg"] = torch.zeros(3)
    was = snapshot(model, opt)
    with pytest.raises(ValueError, match=r"head\.bias of shape \(17,\).*exp_avg.*\(3,\)"):
        opt.load_state_dict(saved)
    assert_same(was, snapshot(model, opt))


def test_a_state_of_another_dtype_is_refused() -> None:
    """Optimizer.load_state_dict of another optimizer may have made floats of the codes."""
    model, opt = toy()
    saved = through_a_file(opt.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].float()
    was = snapshot(model, opt)
    with pytest.raises(ValueError, match=r"blocks\.0\.weight of shape \(20, 12\).*exp_avg.*float32.*uint8"):
        opt.load_state_dict(saved)
    assert_same(was, snapshot(model, opt))


@pytest.mark.parametrize(("fixed", "queue_size"), [(4, 5), (4, 11), (5, 5), (5, 10)])
def test_a_schedule_of_an_earlier_layout_is_refused_even_where_its_length_fits(fixed: int, queue_size: int) -> None:
    """Four numbers stood before the queue, later five; ten do."""
    model, opt = toy()
    saved = through_a_file(opt.state_dict())
    for key in saved["param_groups"][0]["params"]:
        saved["state"][key]["schedule"] = torch.zeros(fixed + queue_size, dtype=torch.float64)
    saved["param_groups"][0]["queue_size"] = queue_size
    train(model, opt, 0, 2)
    was, keys = snapshot(model, opt), repr(opt.param_groups)
    with pytest.raises(ValueError, match=r"blocks\.0\.weight.*schedule.*settings of the saved one"):
        opt.load_state_dict(saved)
    assert_same(was, snapshot(model, opt))
    assert repr(opt.param_groups) == keys


@pytest.mark.parametrize("trigger", ["similarity", "energy"])
def test_a_run_resumed_before_its_first_refresh_keeps_its_slots(trigger: str) -> None:
    settings = {"trigger": trigger, "update_proj_gap": 3, "queue_size": 2, "similarity_threshold": 0.0}
    model, opt = toy(**settings)
    train(model, opt, 0, 1)  # the second weight has a stand-in
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, 1, 9)
    resumed, resumed_opt = toy(seed=1, **settings)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["opt"])
    train(resumed, resumed_opt, 1, 9)
    assert_same(snapshot(model, opt), snapshot(resumed, resumed_opt))
    assert repr(opt.schedule()) == repr(resumed_opt.schedule())


def test_another_model_s_state_is_refused() -> None:
    _, opt = toy()
    wide = Toy(width=16)
    other = qg.QGaLoreAdamW(qg.param_groups(wide, rank=4, quant_group_size=8))
    with pytest.raises(ValueError, match=r"blocks\.0\.weight of shape \(20, 12\)"):
        opt.load_state_dict(other.state_dict())


def test_a_state_without_one_of_the_parameters_is_refused() -> None:
    _, opt = toy()
    saved = opt.state_dict()
    saved["state"] = {key: value for key, value in saved["state"].items() if key != 1}
    with pytest.raises(ValueError, match=r"blocks\.1\.weight of shape \(12, 20\)"):
        opt.load_state_dict(saved)


# -- copies -----------------------------------------------------------------------------------------------------------


@settings_
def test_model_and_optimizer_copied_together_go_on_alike(settings: dict[str, Any]) -> None:
    model, opt = same_layout(**settings)
    train(model, opt, 0, 3)
    other, other_opt = copy.deepcopy((model, opt))
    was = snapshot(model, opt)
    train(other, other_opt, 3, 8)
    assert_same(was, snapshot(model, opt))  # nothing is shared
    train(model, opt, 3, 8)
    assert_same(snapshot(model, opt), snapshot(other, other_opt))
    assert (other_opt.nonfinite, other_opt.max_grad_norm) == (opt.nonfinite, opt.max_grad_norm)


def test_a_pickled_optimizer_goes_on_alike() -> None:
    model, opt = same_layout(int8=False, max_grad_norm=0.1, nonfinite="skip_parameter")
    train(model, opt, 0, 3)
    other, other_opt = pickle.loads(pickle.dumps((model, opt)))
    train(other, other_opt, 3, 5)
    train(model, opt, 3, 5)
    assert_same(snapshot(model, opt), snapshot(other, other_opt))


def test_a_copy_takes_new_groups() -> None:
    opt = copy.deepcopy(qg.QGaLoreAdamW([torch.nn.Parameter(torch.ones(3, 3))], betas=(0.8, 0.9)))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert opt.param_groups[1]["betas"] == (0.8, 0.9)


# -- torch.distributed.checkpoint's names ------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_state_by_names_has_one_entry_a_parameter_and_resumes_bit_for_bit(flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = same_layout()
    train(model, opt, 0, 3)
    opt.skipped_steps.fill_(5)
    weights, state = get_state_dict(model, opt, options=options)
    if not flat:
        assert state["state"].keys() == dict(model.named_parameters()).keys()
    other, other_opt = same_layout()
    saved = through_a_file({"model": weights, "optimizer": state})
    set_state_dict(
        other, other_opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )
    assert_same(snapshot(model, opt), snapshot(other, other_opt))
    assert (float(other_opt.last_grad_norm), int(other_opt.skipped_steps)) == (float(opt.last_grad_norm), 5)
    train(model, opt, 3, 6)
    train(other, other_opt, 3, 6)
    assert_same(snapshot(model, opt), snapshot(other, other_opt))
