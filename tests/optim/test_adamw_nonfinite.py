"""A NaN or Inf in a gradient changes nothing that it should not, is counted, and is over with the next finite step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import Toy, snapshot, stored_moments, tokens, toy, training_step
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.optim.layout import projector
from qgalore_compile.subspace.moments import follow_

PROJECTED, OTHER_PROJECTED = "blocks.0.weight", "blocks.1.weight"
PLAIN = "embed.weight"
GAP = 3  # steps 0, 3, 6 … are due

poisons = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
policies = pytest.mark.parametrize("nonfinite", ["skip_step", "skip_parameter"])
weights = pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])
moments = pytest.mark.parametrize("moments", ["8bit", "32bit"])
# the first step of all; a step that is not due; one that is
steps_before = pytest.mark.parametrize("before", [0, 1, GAP], ids=["first step", "undue step", "due step"])


def setting_up(before: int, **settings: Any) -> tuple[Toy, qg.QGaLoreAdamW]:
    """A model after ``before`` steps, with the gradients of the next one."""
    model, opt = toy(update_proj_gap=GAP, similarity_threshold=2.0, stagger=False, **settings)
    step = training_step(model, opt)
    for index in range(before):
        step(tokens(seed=index))
    model(tokens(seed=before)).backward()
    return model, opt


def poison_(model: nn.Module, name: str, value: float) -> None:
    grad = model.get_parameter(name).grad
    assert grad is not None
    grad[1, 2] = value


def poisoned(before: int, *names: str, poison: float = math.nan, **settings: Any) -> tuple[Toy, qg.QGaLoreAdamW]:
    """As :func:`setting_up`, an element of each gradient in ``names`` replaced."""
    model, opt = setting_up(before, **settings)
    for name in names:
        poison_(model, name, poison)
    return model, opt


def stepped(model: nn.Module, opt: qg.QGaLoreAdamW) -> set[str]:
    """Names of what a step of the optimizer changes."""
    was = snapshot(model, opt)
    opt.step()
    return changed(was, snapshot(model, opt))


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name].nan_to_num(7e7), after[name].nan_to_num(7e7))}


def projector_of(name: str) -> set[str]:
    return {f"{name}/{part}" for part in ("projector", "projector_scale", "projector_offset")}


def clocks_and_counters() -> set[str]:
    return {"global/grad_norm", "global/skipped_steps", f"{PROJECTED}/schedule", f"{OTHER_PROJECTED}/schedule"}


@poisons
@weights
@moments
@steps_before
@pytest.mark.parametrize("name", [PROJECTED, PLAIN])
def test_skip_step_leaves_every_parameter_and_state_as_it_was(
    poison: float, int8: bool, moments: str, before: int, name: str
) -> None:
    model, opt = poisoned(before, name, poison=poison, nonfinite="skip_step", int8=int8, moments=moments)
    moved = stepped(model, opt)
    due_and_finite = set() if before == 1 else projector_of(OTHER_PROJECTED)
    if before != 1 and name == PLAIN:
        due_and_finite |= projector_of(PROJECTED)
    assert moved <= clocks_and_counters() | due_and_finite
    assert int(opt.skipped_steps) == 1


@poisons
@weights
@moments
@steps_before
@pytest.mark.parametrize("name", [PROJECTED, PLAIN])
def test_skip_parameter_leaves_the_parameter_concerned_and_updates_the_others(
    poison: float, int8: bool, moments: str, before: int, name: str
) -> None:
    model, opt = poisoned(before, name, poison=poison, nonfinite="skip_parameter", int8=int8, moments=moments)
    moved = stepped(model, opt)
    own = {entry for entry in snapshot(model, opt) if entry.partition("/")[0] == name or entry.startswith(f"{name}.")}
    assert own & moved <= {f"{name}/schedule"}
    for other in dict(model.named_parameters()):
        if other != name:
            assert f"{other}/step" in moved
            assert other in moved or f"{other}.codes" in moved
    assert int(opt.skipped_steps) == 1


@steps_before
def test_under_skip_parameter_the_others_step_as_if_it_had_no_gradient(before: int) -> None:
    model, opt = poisoned(before, PROJECTED, nonfinite="skip_parameter")
    opt.step()
    twin, twin_opt = setting_up(before, nonfinite="skip_parameter")
    twin.get_parameter(PROJECTED).grad = None
    twin_opt.step()
    differ = changed(snapshot(model, opt), snapshot(twin, twin_opt)) - {"global/grad_norm"}
    assert differ == {"global/skipped_steps", f"{PROJECTED}/schedule"}
    # norms of one parameter fewer are added up in another order
    torch.testing.assert_close(opt.last_grad_norm, twin_opt.last_grad_norm, rtol=1e-6, atol=0)


@policies
@weights
@steps_before
@pytest.mark.parametrize("name", [PROJECTED, PLAIN])
def test_the_next_finite_step_works_and_makes_up_for_a_missed_refresh(
    nonfinite: str, int8: bool, before: int, name: str
) -> None:
    model, opt = poisoned(before, name, nonfinite=nonfinite, int8=int8)
    opt.step()
    opt.zero_grad()
    refreshes = opt.schedule()[0].refreshes
    was = snapshot(model, opt)
    training_step(model, opt)(tokens(seed=50))
    now = snapshot(model, opt)
    for parameter in dict(model.named_parameters()):
        assert {parameter, f"{parameter}.codes"} & changed(was, now)
    assert all(bool(value.isfinite().all()) for name_, value in now.items() if "schedule" not in name_)
    if name == PROJECTED and before != 1:
        assert (opt.schedule()[0].refreshes, opt.schedule()[0].last) == (refreshes + 1, before + 1)
    assert int(opt.skipped_steps) == 1
    assert math.isfinite(float(opt.last_grad_norm))


def test_under_the_official_rule_too_a_missed_refresh_is_made_up_for() -> None:
    model, opt = poisoned(GAP, PROJECTED, similarity="official", cos_threshold=2.0)
    opt.step()
    opt.zero_grad()
    training_step(model, opt)(tokens(seed=50))
    assert [record.last for record in opt.schedule()] == [GAP + 1, GAP]


@weights
@moments
@pytest.mark.parametrize("how", ["rotate", "reset"])
def test_a_refreshed_subspace_takes_its_moments_along_though_another_gradient_refuses_the_step(
    int8: bool, moments: str, how: str
) -> None:
    """Moments are coordinates in the projector's basis: the projector is new, so the old ones would mean other
    directions.  They are what a refresh alone makes of them; the refused step has added nothing to them."""
    model, opt = poisoned(GAP, OTHER_PROJECTED, int8=int8, moments=moments, moments_on_refresh=how)
    state = opt.state[model.get_parameter(PROJECTED)]
    group = opt.param_groups[0]
    expected = [tensor.clone() for tensor in stored_moments(state)]
    kept = [tensor.clone() for tensor in stored_moments(opt.state[model.get_parameter(OTHER_PROJECTED)])]
    old = projector(model.get_parameter(PROJECTED), group, state)
    opt.step()
    new = projector(model.get_parameter(PROJECTED), group, state)
    assert not torch.equal(old, new)
    follow_(
        expected,
        how,
        old,
        new,
        "right",
        updates=GAP,
        betas=group["betas"],
        shape=state["exp_avg"].shape,
        formats=group.formats.moments,
    )
    assert all(map(torch.equal, expected, stored_moments(state)))
    assert all(map(torch.equal, kept, stored_moments(opt.state[model.get_parameter(OTHER_PROJECTED)])))
    assert int(state["step"]) == GAP


@policies
def test_every_poisoned_step_is_counted_once(nonfinite: str) -> None:
    model, opt = setting_up(0, nonfinite=nonfinite)
    for _ in range(3):
        poison_(model, PROJECTED, math.nan)
        poison_(model, OTHER_PROJECTED, math.inf)
        poison_(model, PLAIN, math.nan)
        opt.step()
    assert int(opt.skipped_steps) == 3
    assert all(int(opt.state[p]["step"]) == 0 for p in (model.get_parameter(PROJECTED), model.get_parameter(PLAIN)))


@policies
@pytest.mark.parametrize("before", [0, 1])
def test_all_gradients_non_finite_leave_everything(nonfinite: str, before: int) -> None:
    model, opt = setting_up(before, nonfinite=nonfinite)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = torch.full_like(parameter.grad, math.nan)
    assert stepped(model, opt) <= clocks_and_counters()


@policies
@pytest.mark.parametrize("shape", [(64, 70), (300,)], ids=["8-bit moments", "32-bit moments"])
def test_a_plain_parameter_alone(nonfinite: str, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.randn(shape))
    opt = qg.QGaLoreAdamW([p], nonfinite=nonfinite, max_grad_norm=1.0)
    before = p.detach().clone()
    p.grad = torch.randn(shape)
    p.grad.view(-1)[-1] = math.inf
    opt.step()
    assert torch.equal(p, before)
    p.grad = torch.randn(shape)
    opt.step()
    assert (p != before).all()
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("size", [1e19, 1e25, 1e38])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_a_finite_gradient_whose_square_overflows_never_makes_a_weight_nan(
    size: float, rank: int | None, moments: str
) -> None:
    p = nn.Parameter(torch.ones(64, 70))
    opt = qg.QGaLoreAdamW([{"params": [p], **({"rank": rank} if rank else {})}], moments=moments)
    for gradient_size in (1.0, size, 1.0, 1.0):
        p.grad = torch.randn(64, 70).clamp(-3, 3) * gradient_size
        opt.step()
        assert bool(p.isfinite().all())


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])
def test_gradients_below_the_smallest_square_leave_everything_finite(int8: bool) -> None:
    model, opt = toy(int8=int8)
    for seed in range(3):
        model(tokens(seed=seed)).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 1e-30
        opt.step()
        opt.zero_grad()
    assert all(bool(value.isfinite().all()) for name, value in snapshot(model, opt).items() if "schedule" not in name)


# -- the norm, and clipping -------------------------------------------------------------------------------------------


def direct_norm(model: nn.Module, opt: qg.QGaLoreAdamW, leave_out: str = "") -> Tensor:
    """Of R for the projected parameters, in float64, from the projector after the step; of G for the others."""
    total = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name == leave_out or parameter.grad is None:
            continue
        grad, state = parameter.grad.double(), opt.state[parameter]
        if "projector" in state:
            projector = state["projector"].double()
            grad = grad @ projector.t() if grad.shape[0] >= grad.shape[1] else projector.t() @ grad
        total += grad.square().sum()
    return total.sqrt()


@steps_before
@pytest.mark.parametrize("max_grad_norm", [None, 1e-3, 1e3])
def test_last_grad_norm_is_the_norm_before_clipping(before: int, max_grad_norm: float | None) -> None:
    model, opt = setting_up(before, quant=False, max_grad_norm=max_grad_norm)
    opt.step()
    assert opt.last_grad_norm.shape == ()
    assert opt.last_grad_norm.dtype == torch.float32
    torch.testing.assert_close(opt.last_grad_norm.double(), direct_norm(model, opt), rtol=1e-5, atol=0)


def test_under_skip_step_the_norm_shows_the_poison_and_under_skip_parameter_it_leaves_it_out() -> None:
    for nonfinite in ("skip_step", "skip_parameter"):
        model, opt = poisoned(1, PROJECTED, quant=False, nonfinite=nonfinite, max_grad_norm=0.01)
        opt.step()
        if nonfinite == "skip_step":
            assert not math.isfinite(float(opt.last_grad_norm))
        else:
            expected = direct_norm(model, opt, leave_out=PROJECTED)
            torch.testing.assert_close(opt.last_grad_norm.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.5, 100.0])
def test_clipping_plain_parameters_equals_clip_grad_norm(max_grad_norm: float) -> None:
    ours, theirs = (
        [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3))) for shape in ((20, 30), (7,))]
        for _ in range(2)
    )
    # sgd-like, so that the size of a gradient shows: eps far above it
    settings: dict[str, Any] = dict(lr=1e4, eps=1e4, moments="32bit")
    opt = qg.QGaLoreAdamW(ours, max_grad_norm=max_grad_norm, **settings)
    reference = qg.QGaLoreAdamW(theirs, **settings)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        norm = nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        opt.step()
        reference.step()
        torch.testing.assert_close(opt.last_grad_norm, norm)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_clipping_leaves_the_gradients_themselves_alone() -> None:
    model, opt = setting_up(0, max_grad_norm=1e-3)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    opt.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True) if p.grad is not None)


def test_clipping_reaches_int8_weights_and_their_moments() -> None:
    """The published code clips the float parameters alone."""
    model, opt = setting_up(0, max_grad_norm=1e-3, moments="32bit")
    free_model, free_opt = setting_up(0, moments="32bit")
    opt.step()
    free_opt.step()
    factor = 1e-3 / (float(free_opt.last_grad_norm) + 1e-6)
    for name in (PROJECTED, OTHER_PROJECTED, PLAIN):
        clipped, free = (o.state[m.get_parameter(name)]["exp_avg"] for m, o in ((model, opt), (free_model, free_opt)))
        torch.testing.assert_close(clipped, free * factor)
