"""The optimizer in use: learning rates and their schedules, hooks, closures, accumulation, groups added later."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import snapshot, tokens, toy, training_step
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import qgalore_compile as qg

weights = pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])


def vector(size: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def step_once(opt: torch.optim.Optimizer) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones(p.shape)
    opt.step()


# -- what a step moves, and what not ----------------------------------------------------------------------------------


@weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_after_one_step_every_trainable_parameter_has_moved(int8: bool, dtype: torch.dtype, moments: str) -> None:
    model, opt = toy(int8=int8, dtype=dtype, moments=moments, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_step(model, opt)(tokens())
    for name, p in model.named_parameters():
        old = before[name]
        if isinstance(p, qg.Int8Weight):
            old, p = old.dequantize(), p.dequantize()
        assert not torch.equal(p, old), name
        assert bool(p.isfinite().all()), name


@weights
def test_training_on_one_batch_lowers_its_loss(int8: bool) -> None:
    model, opt = toy(int8=int8)
    step = training_step(model, opt)
    losses = [float(step(tokens())) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@weights
def test_a_parameter_without_gradient_stays_bit_for_bit_with_its_state(int8: bool) -> None:
    model, opt = toy(int8=int8, weight_decay=0.1)
    training_step(model, opt)(tokens())
    left_out = {"blocks.0.weight", "embed.weight", "norm.bias"}
    model(tokens(seed=2)).backward()
    for name in left_out:
        model.get_parameter(name).grad = None
    was = snapshot(model, opt)
    opt.step()
    now = snapshot(model, opt)
    for entry in was:
        owner = entry.partition("/")[0]
        if owner in left_out or owner.rpartition(".")[0] in left_out:
            assert torch.equal(was[entry].nan_to_num(7e7), now[entry].nan_to_num(7e7)), entry
    assert not torch.equal(was["head.weight"], now["head.weight"])


@weights
def test_frozen_parameters_stay_bit_for_bit(int8: bool) -> None:
    model, opt = toy(int8=int8, weight_decay=0.1)
    for name in ("blocks.0.weight", "embed.weight"):
        model.get_parameter(name).requires_grad_(False)
    was = snapshot(model, opt)
    for seed in range(3):
        training_step(model, opt)(tokens(seed=seed))
    now = snapshot(model, opt)
    frozen = [name for name in was if name.startswith(("blocks.0.weight", "embed.weight"))]
    assert len(frozen) > 10
    assert all(torch.equal(was[name].nan_to_num(7e7), now[name].nan_to_num(7e7)) for name in frozen)


def test_a_step_without_any_gradient_changes_nothing() -> None:
    model, opt = toy()
    was = snapshot(model, opt)
    opt.step()
    now = snapshot(model, opt)
    assert all(torch.equal(was[name].nan_to_num(7e7), now[name].nan_to_num(7e7)) for name in was)


def test_all_state_exists_before_the_first_step_and_stays_the_same_tensors() -> None:
    model, opt = toy()
    before = {(key, name): value for key, state in opt.state.items() for name, value in state.items()}
    training_step(model, opt)(tokens())
    after = {(key, name): value for key, state in opt.state.items() for name, value in state.items()}
    assert before.keys() == after.keys()
    assert all(value is after[key] for key, value in before.items())


def test_moments_of_projected_parameters_are_shaped_like_r_and_take_a_byte() -> None:
    model, opt = toy(rank=4)
    right, left = (opt.state[model.blocks[i].weight] for i in (0, 1))
    assert right["exp_avg"].shape == right["exp_avg_sq_root"].shape == (20, 4)
    assert left["exp_avg"].shape == left["exp_avg_sq_root"].shape == (4, 20)
    assert right["exp_avg"].dtype == torch.uint8
    assert right["projector"].shape == (4, 6)  # (4, 12), two codes a byte


# -- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_two_micro_batches_of_8_equal_one_of_16_to_rounding(max_grad_norm: float | None) -> None:
    # eps far above rounding, so that an element whose gradient is rounding alone does not decide
    settings: dict[str, Any] = dict(int8=False, quant=False, moments="32bit", eps=1e-4, max_grad_norm=max_grad_norm)
    whole, whole_opt = toy(**settings)
    parts, parts_opt = toy(**settings)
    for seed in range(3):
        batch = tokens(16, seed=seed)
        one = training_step(whole, whole_opt)(batch)
        two = training_step(parts, parts_opt)(batch[:8], batch[8:])
        torch.testing.assert_close(one, two)
        for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert [record.refreshes for record in parts_opt.schedule()] == [1, 1]  # one clock tick a step, not a micro-batch


def test_accumulation_into_int8_weights_differs_by_codes_one_apart() -> None:
    whole, whole_opt = toy(eps=1e-4)
    parts, parts_opt = toy(eps=1e-4)
    batch = tokens(16)
    training_step(whole, whole_opt)(batch)
    training_step(parts, parts_opt)(batch[:8], batch[8:])
    for a, b in zip(whole.blocks, parts.blocks, strict=True):
        apart = (a.weight.codes.int() - b.weight.codes.int()).abs()
        assert int(apart.max()) <= 1
        assert int((apart > 0).sum()) <= 5  # of 240


# -- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), 0])
def test_lr_becomes_a_tensor_of_each_group_s_own(lr: float | Tensor) -> None:
    opt = qg.QGaLoreAdamW([{"params": [vector()]}, {"params": [vector()]}, {"params": [vector()], "lr": 0.5}], lr=lr)
    tensors = [group["lr"] for group in opt.param_groups]
    assert all(t.dtype == torch.float32 and t.shape == () for t in tensors)
    assert [float(t) for t in tensors] == [float(lr), float(lr), 0.5]
    tensors[0].fill_(9.0)
    assert [float(t) for t in tensors[1:]] == [float(lr), 0.5]
    assert float(lr) != 9.0


def test_a_tensor_lr_acts_as_the_float_does() -> None:
    p, q = vector(), vector()
    step_once(qg.QGaLoreAdamW([p], lr=0.25))
    step_once(qg.QGaLoreAdamW([q], lr=torch.tensor(0.25)))
    assert torch.equal(p, q)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.75))


def test_an_lr_of_zero_moves_no_float_weight() -> None:
    p = vector()
    step_once(qg.QGaLoreAdamW([p], lr=0.0, weight_decay=0.5))
    assert torch.equal(p, torch.ones(3))


def plateau(opt: torch.optim.Optimizer) -> Any:
    return schedulers.ReduceLROnPlateau(opt, factor=0.5, patience=1)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda opt: schedulers.CosineAnnealingLR(opt, T_max=10),
    "warm restarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, T_0=3),
    "lambda": lambda opt: schedulers.LambdaLR(opt, lambda step: 1 / (step + 1)),
    "multiplicative": lambda opt: schedulers.MultiplicativeLR(opt, lambda step: 0.9),
    "step": lambda opt: schedulers.StepLR(opt, step_size=2, gamma=0.1),
    "exponential": lambda opt: schedulers.ExponentialLR(opt, gamma=0.9),
    "polynomial": lambda opt: schedulers.PolynomialLR(opt, total_iters=6),
    "warm-up, then cosine": lambda opt: schedulers.SequentialLR(
        opt,
        [schedulers.LinearLR(opt, start_factor=0.1, total_iters=3), schedulers.CosineAnnealingLR(opt, T_max=6)],
        milestones=[3],
    ),
    "chained": lambda opt: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(opt, factor=0.5, total_iters=4), schedulers.ExponentialLR(opt, gamma=0.9)]
    ),
    "plateau": plateau,
    "one cycle without momentum": lambda opt: schedulers.OneCycleLR(
        opt, max_lr=0.1, total_steps=12, cycle_momentum=False
    ),
    "cyclic without momentum": lambda opt: schedulers.CyclicLR(
        opt, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False
    ),
}


def eight_steps(opt: torch.optim.Optimizer, make: Callable[[torch.optim.Optimizer], Any]) -> None:
    scheduler = make(opt)
    for _ in range(8):
        step_once(opt)
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_set_the_lr_that_they_set_for_adamw_and_warn_of_nothing(
    make: Callable[[torch.optim.Optimizer], Any],
) -> None:
    """The tensors stay the same ones, so a compiled step sees each new value."""
    groups = [{"params": [vector()]}, {"params": [vector()], "lr": 0.5}]
    opt = qg.QGaLoreAdamW(groups, lr=0.1)
    reference = torch.optim.AdamW([{"params": [vector()]}, {"params": [vector()], "lr": 0.5}], lr=0.1)
    tensors = [group["lr"] for group in opt.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eight_steps(opt, make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eight_steps(reference, make)
    expected = [group["lr"] for group in reference.param_groups]
    assert [float(group["lr"]) for group in opt.param_groups] == pytest.approx(expected, rel=1e-5)
    assert all(group["lr"] is tensor for group, tensor in zip(opt.param_groups, tensors, strict=True))
    assert "step" not in vars(opt)  # no wrapper, which Dynamo could not trace


def test_a_scheduled_lr_is_what_the_next_step_takes() -> None:
    p = vector()
    opt = qg.QGaLoreAdamW([p], lr=1.0)
    scheduler = schedulers.LambdaLR(opt, lambda step: [1.0, 0.25][min(step, 1)])
    step_once(opt)
    torch.testing.assert_close(p.detach(), torch.zeros(3))
    scheduler.step()
    step_once(opt)
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.25))


@pytest.mark.parametrize("scheduler", [schedulers.OneCycleLR, schedulers.CyclicLR])
def test_cycling_momentum_is_refused_with_the_way_out(scheduler: Any) -> None:
    settings: dict[str, Any] = {"max_lr": 0.1}
    settings |= {"total_steps": 5} if scheduler is schedulers.OneCycleLR else {"base_lr": 0.01}
    opt = qg.QGaLoreAdamW([vector()])
    with pytest.raises(ValueError, match="cycle_momentum"):
        scheduler(opt, **settings)
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)


# -- hooks and closures -----------------------------------------------------------------------------------------------


def test_hooks_run_around_the_step_and_may_be_removed() -> None:
    p = vector()
    opt = qg.QGaLoreAdamW([p], lr=0.5)
    log: list[tuple[str, float]] = []
    handles = [
        opt.register_step_pre_hook(lambda o, args, kwargs: log.append(("pre", float(p.detach()[0])))),
        opt.register_step_post_hook(lambda o, args, kwargs: log.append(("post", float(p.detach()[0])))),
    ]
    step_once(opt)
    assert [name for name, _ in log] == ["pre", "post"]
    assert [value for _, value in log] == pytest.approx([1.0, 0.5])
    for handle in handles:
        handle.remove()
    step_once(opt)
    assert len(log) == 2


def test_a_closure_runs_once_with_gradients_enabled_and_its_value_comes_back() -> None:
    p = vector()
    opt = qg.QGaLoreAdamW([p], lr=0.5)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    assert float(loss.detach()) == 3.0
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))
    assert opt.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_both_ways(set_to_none: bool) -> None:
    p, q = vector(), vector()
    opt = qg.QGaLoreAdamW([p, q])
    p.grad = torch.ones(3)
    opt.zero_grad(set_to_none)
    assert q.grad is None
    if set_to_none:
        assert p.grad is None
    else:
        assert p.grad is not None
        assert torch.equal(p.grad, torch.zeros(3))


def test_zero_grad_forgets_by_default() -> None:
    model, opt = toy()
    model(tokens()).backward()
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# -- groups added later -----------------------------------------------------------------------------------------------


def test_a_group_added_later_is_trained_with_its_own_settings() -> None:
    p, q = vector(), nn.Parameter(torch.ones(6, 4))
    opt = qg.QGaLoreAdamW([p], lr=0.5, betas=(0.8, 0.9))
    step_once(opt)
    opt.add_param_group({"params": [q], "rank": 2, "lr": 0.25})
    assert opt.param_groups[1]["betas"] == (0.8, 0.9)
    p.grad, q.grad = None, torch.randn(6, 4)
    opt.step()
    assert not torch.equal(q, torch.ones(6, 4))
    assert (int(opt.state[p]["step"]), int(opt.state[q]["step"])) == (1, 1)
    assert len(opt.schedule()) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank": 2, "proj_type": "left"},
        {"momentum": 0.9},
        {"lr": -1.0},
        {"rank": 2, "params": [nn.Parameter(torch.ones(5, 5)), vector()]},
        {"params": [torch.ones(3, 3) * torch.ones(3, 3, requires_grad=True)]},  # no leaf
        {"params": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)]},
    ],
    ids=["rank", "proj_type", "unknown key", "lr", "1-D", "no leaf", "integers"],
)
def test_a_failing_add_param_group_changes_nothing(bad: dict[str, Any]) -> None:
    p = vector()
    opt = qg.QGaLoreAdamW([p], lr=0.5)
    before = repr(opt.param_groups)
    with pytest.raises(ValueError, match=r".+"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(5, 5))], **bad})
    assert repr(opt.param_groups) == before
    assert set(opt.state) == {p}
    step_once(opt)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))


def test_a_parameter_in_two_groups_is_refused() -> None:
    p = vector()
    opt = qg.QGaLoreAdamW([p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})


def test_an_optimizer_shows_its_settings() -> None:
    text = repr(qg.QGaLoreAdamW([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2}], lr=0.5))
    assert "rank: 2" in text
    assert "lr: 0.5" in text
