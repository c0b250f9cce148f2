"""A gradient of exactly zero tells of no subspace: nothing is refreshed, measured or rotated; the turn stays due."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from refresh_support import FORMATS, RULE, Layer, both_sides, project_old
from support import Interpreted, small
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.subspace.finder import METHODS, Gradient
from qgalore_compile.subspace.projection import project
from qgalore_compile.subspace.refresh import Moments
from qgalore_compile.subspace.scheduler import Schedule

methods = pytest.mark.parametrize("method", METHODS)
ROUNDS = RULE._replace(min_gap=10)


def zeros(kind: str, shape: tuple[int, int]) -> list[Tensor]:
    """Gradients of exactly zero as the op may be given them."""
    m, n = shape
    if kind == "G":
        return [torch.zeros(shape)]
    if kind == "-0":
        return [-torch.zeros(shape)]
    dy, x = torch.randn(6, m), torch.randn(6, n)
    if kind == "no loss":
        return [torch.zeros(6, m), x]
    if kind == "masked":  # each token lacks one of the two
        dy[:3], x[3:] = 0, 0
        return [dy, x]
    if kind == "two micro-batches":
        return [torch.zeros(6, m), x, torch.zeros(4, m), torch.randn(4, n)]
    if kind == "cancelled":
        return [dy, x, -dy, x]
    assert kind == "gathered"
    schedule = Schedule.first(10, 5).to_tensor()
    carrier = torch.ops.qgalore.gather_gradient(None, schedule, torch.zeros(6, m), x, None)
    return [torch.ops.qgalore.gather_gradient(carrier, schedule, torch.zeros(4, m), torch.randn(4, n), None)]


KINDS = ("G", "-0", "no loss", "masked", "two micro-batches", "cancelled", "gathered")


@both_sides
@methods
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_zero_first_gradient_the_next_one_is_refreshed(shape: tuple[int, int], method: str, kind: str) -> None:
    layer, usual, grad = Layer(shape, 4, method=method), Layer(shape, 4, method=method), torch.randn(shape)
    for clock in range(3):
        layer.call(*zeros(kind, shape))
        assert (layer.now.clock, layer.now.next, layer.now.refreshes, layer.now.failures) == (clock + 1, 0, 0, 0)
        assert not layer.projector.any()
        assert not layer.low.any()
    usual.schedule = replace(Schedule.first(10, 5), clock=3).to_tensor()
    layer.call(grad)
    usual.call(grad)
    assert (layer.now.last, layer.now.refreshes) == (3, 1)
    assert torch.equal(layer.projector, usual.projector)
    assert torch.equal(layer.low, usual.low)
    assert repr(layer.now) == repr(usual.now)


@both_sides
@methods
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_at_a_later_turn_the_projector_stays_until_there_is_a_gradient(
    shape: tuple[int, int], method: str, form: Any, kind: str
) -> None:
    layer = Layer(shape, 4, form, method, gap=1)
    layer.call(torch.randn(shape))
    before = [tensor.clone() for tensor in layer.stored]
    layer.low.zero_()
    layer.call(*zeros(kind, shape))
    assert all(map(torch.equal, before, layer.stored))
    assert (layer.now.clock, layer.now.refreshes, layer.now.similarities) == (2, 1, ())
    grad = torch.randn(shape)
    project_old(layer, grad)
    layer.call(grad)
    assert (layer.now.last, layer.now.refreshes, len(layer.now.similarities)) == (2, 2, 1)


@both_sides
@methods
def test_a_zero_gradient_asks_for_no_stand_in_and_the_slot_stays(shape: tuple[int, int], method: str) -> None:
    layer = Layer(shape, 4, method=method, rule=ROUNDS)
    layer.schedule = Schedule.first(10, 5, slot=3).to_tensor()
    layer.call(torch.zeros(shape))
    assert (layer.now.next, layer.now.has_projector) == (0, False)
    layer.call(torch.randn(shape))
    assert (layer.now.next, layer.now.has_projector, layer.now.refreshes) == (3, True, 0)
    layer.call(torch.zeros(shape))
    for clock in (3, 4):  # the slot, and after it
        assert layer.now.clock == clock
        layer.call(torch.zeros(shape))
    layer.call(torch.randn(shape))
    assert (layer.now.last, layer.now.refreshes, layer.now.next) == (5, 1, 13)


def test_a_nan_first_and_a_zero_after_it_leave_the_turn_to_the_next_gradient() -> None:
    layer = Layer((23, 12), 4)
    layer.call(torch.full((23, 12), torch.nan))
    assert layer.low.isnan().all()
    layer.low.zero_()
    layer.call(torch.zeros(23, 12))
    assert not layer.low.any()
    layer.call(torch.randn(23, 12))
    assert (layer.now.last, layer.now.refreshes, layer.now.failures) == (2, 1, 0)


def test_under_the_official_rule_too() -> None:
    layer = Layer((23, 12), 4, gap=4, rule=RULE._replace(official=True, max_gap=None))
    for clock in range(11):
        layer.call(torch.randn(23, 12) * (clock not in (0, 1, 8)))
    assert (layer.now.last, layer.now.refreshes, layer.now.next) == (9, 3, 12)  # at 2, 4 and 9


@methods
@pytest.mark.parametrize("how", ["reset", "rotate"])
def test_moments_stay_with_the_projector(method: str, how: str) -> None:
    layer = Layer((23, 12), 4, method=method, gap=1)
    m = torch.randn(layer.low.shape)
    layer.moments = Moments(
        [m, m.square() * 2], torch.tensor(7.0), how, torch.tensor([0.9, 0.999], dtype=torch.float64)
    )
    layer.call(torch.randn(23, 12))
    kept = [moment.clone() for moment in layer.moments.stored]
    layer.call(torch.zeros(23, 12))
    assert all(map(torch.equal, kept, layer.moments.stored))


def test_energy_is_measured_of_the_next_gradient() -> None:
    """The reference, and then a check."""
    layer = Layer((23, 12), 4, rule=ROUNDS._replace(energy=0.8))
    grad = torch.randn(23, 12)
    for clock in range(14):
        scale = float(clock not in (1, 12))
        project_old(layer, grad * scale)
        layer.call(grad * scale)
        if clock == 1:
            assert math.isnan(layer.now.reference)
        if clock == 2:
            assert layer.now.reference > 0
            assert layer.now.checks == 0
            assert layer.now.next == 12
        if clock == 12:
            assert (layer.now.checks, layer.now.due) == (0, True)
    assert (layer.now.checks, layer.now.refreshes) == (1, 1)


# -- what is zero -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize("given_as", ["G", "factors"])
def test_a_small_gradient_is_not_zero_and_has_its_energy(scale: float, given_as: str) -> None:
    dy, x = torch.randn(5, 60), torch.randn(5, 40)
    factors = [dy * scale, x] if given_as == "factors" else [dy.t() @ x * scale]
    assert not Gradient(factors).is_zero()
    energy = float((dy.double().t() @ x.double()).square().sum())
    assert Gradient(factors).energy() == pytest.approx(energy * scale**2, rel=1e-3)


def test_one_element_is_enough() -> None:
    dy, x = torch.zeros(5, 60), torch.zeros(5, 40)
    dy[2, 7], x[2, 31] = 1e-20, 1e-20
    assert not Gradient([dy, x]).is_zero()
    assert not Gradient([dy.t() @ x]).is_zero()


def test_where_products_nearly_cancel_the_energy_is_that_of_the_gradient() -> None:
    dy, x = torch.randn(5, 60), torch.randn(5, 40)
    factors = [dy, x, -dy * (1 + 1e-4), x]
    whole = project(dy.double().t() @ x.double(), torch.eye(40, dtype=torch.float64), "right").square().sum()
    assert Gradient(factors).energy() == pytest.approx(1e-8 * float(whole), rel=0.02)


# -- whole steps ------------------------------------------------------------------------------------------------------


def share(update: Tensor, basis: Tensor) -> float:
    return float((basis.t() @ update).square().sum() / update.square().sum())


@methods
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("how", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("trigger", ["similarity", "energy"])
def test_an_update_after_zero_gradients_lies_in_the_gradients_space(
    method: str, stagger: bool, how: str, trigger: str
) -> None:
    p, basis = nn.Parameter(torch.randn(64, 96)), torch.linalg.qr(torch.randn(64, 8))[0]
    group = {
        "params": [p],
        "rank": 8,
        "update_proj_gap": 50,
        "quant": False,
        "refresh": method,
        "stagger": stagger,
        "moments_on_refresh": how,
        "trigger": trigger,
    }
    opt = qg.QGaLoreAdamW([group], lr=0.01, moments="32bit")
    for step in range(4):
        before = p.detach().clone()
        p.grad = basis @ torch.randn(8, 96) * (step > 1)
        opt.step()
        update = p.detach() - before
        assert share(update, basis) > 0.99 if step > 1 else not update.any()
    assert opt.schedule()[0].refreshes == 1


def masked_step(model: nn.Module, opt: qg.QGaLoreAdamW) -> Any:
    """A step whose loss may be of nothing: a mask that is a tensor, so one graph serves."""

    def step(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros(())
        for batch, mask in batches:
            loss = (model(batch).square().mean(-1) * mask).sum()
            loss.backward()
            total = total + loss.detach()
        opt.step()
        opt.zero_grad()
        return total

    return step


@methods
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_compiled_step_waits_as_the_eager_one_does(method: str, accumulate: int) -> None:
    """Factors of one batch, or what was gathered; the gradients of the first steps, and of a later turn, are zero."""
    keys: dict[str, Any] = {"update_proj_gap": 3, "refresh": method, "stagger": False}
    model, opt = small(**keys)
    twin, twin_opt = small(**keys)
    backend = Interpreted(disable=["fuse", "fuse_products", "opaque", "order"])  # what the op is given, they leave
    compiled = torch.compile(masked_step(model, opt), backend=backend, fullgraph=True)
    eager = masked_step(twin, twin_opt)
    refreshed: list[int] = []
    for step in range(8):
        some = float(step not in (0, 1, 5))
        batches = [(torch.randn(5, 8), torch.full((5,), some)) for _ in range(accumulate)]
        compiled(batches)
        eager(batches)
        assert [record.refreshes for record in opt.schedule()] == [record.refreshes for record in twin_opt.schedule()]
        assert [record.next for record in opt.schedule()] == [record.next for record in twin_opt.schedule()]
        refreshed += [step] * (opt.schedule()[0].last == step)
    assert refreshed == [2, 6]
    assert backend.count == 1
