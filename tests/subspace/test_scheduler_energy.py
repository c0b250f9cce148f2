"""The energy trigger: what is measured, when, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Interpreted, tokens, toy, training_step
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.optim import layout
from qgalore_compile.subspace.finder import captured_energy
from qgalore_compile.subspace.projection import project
from qgalore_compile.subspace.scheduler import Rule, Schedule

RULE = Rule(official=False, threshold=0.4, gamma=2.0, max_gap=80, min_gap=10, energy=0.8)


# -- the measure ------------------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    tokens=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_factors_have_the_energy_of_their_product(m: int, n: int, tokens: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    factors = [factor for t in tokens for factor in (torch.randn(t, m), torch.randn(t, n))]
    gradient = sum((dy.t() @ x for dy, x in zip(factors[::2], factors[1::2], strict=True)), start=torch.zeros(m, n))
    low = project(gradient, torch.linalg.qr(torch.randn(n, n))[0][: max(1, n // 2)], "right")
    expected = float(low.double().square().sum() / gradient.double().square().sum())
    assert captured_energy(low, [gradient]) == pytest.approx(expected, rel=1e-5)
    assert captured_energy(low, factors) == pytest.approx(expected, rel=1e-3)


def test_the_product_of_few_tokens_is_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [torch.randn(4, 60), torch.randn(4, 40)]
    expected = captured_energy(torch.ones(60, 3), [factors[0].t() @ factors[1]])

    def formed(factors: list[Tensor]) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("qgalore_compile.subspace.finder.full_gradient", formed)
    assert captured_energy(torch.ones(60, 3), factors) == pytest.approx(expected, rel=1e-5)


def test_a_gradient_of_zeros_has_no_energy_to_catch_a_part_of() -> None:
    assert math.isnan(captured_energy(torch.zeros(6, 2), [torch.zeros(6, 4)]))


# -- the rule ---------------------------------------------------------------------------------------------------------


def log_of(energies: dict[int, float], steps: int, slot: int = -1, rule: Rule = RULE) -> tuple[list[int], list[int]]:
    """(refreshes, measurements) by step; the energy of a step is that of the last key not after it."""
    now, refreshes, measured = Schedule.first(rule.min_gap, 3, slot), list[int](), list[int]()
    for step in range(steps):
        if now.due and now.stands_in:
            now = now.stood_in()
        elif now.due:
            if now.measures(rule):
                measured.append(step)
                now = now.measured(rule, energies[max(key for key in energies if key <= step)])
            if now.due:
                refreshes.append(step)
                now = now.refreshed(rule, 0.0 if now.refreshes else None)
        now = now.ticked()
    return refreshes, measured


def test_the_reference_is_the_call_after_a_refresh_and_then_one_check_a_round() -> None:
    refreshes, measured = log_of({0: 0.5}, 45)
    assert refreshes == [0]
    assert measured == [1, 10, 20, 30, 40]


def test_a_projector_that_catches_too_little_is_computed_anew_at_the_next_turn() -> None:
    refreshes, measured = log_of({0: 0.5, 15: 0.41, 25: 0.39, 31: 0.2}, 60)
    assert refreshes == [0, 30]  # 0.41 is above 0.8 × 0.5; from 31 on 0.2 is what is to be expected
    assert measured == [1, 10, 20, 30, 31, 40, 50]


def test_max_gap_calls_without_a_refresh_are_enough() -> None:
    assert log_of({0: 0.5}, 200)[0] == [0, 80, 160]
    assert log_of({0: 0.5}, 200, rule=RULE._replace(max_gap=None))[0] == [0]


@given(gap=st.integers(1, 9), slot=st.integers(0, 8), energies=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_staggered_refreshes_come_at_the_slot_alone(gap: int, slot: int, energies: list[float]) -> None:
    slot %= gap
    by_step = {7 * at: energy for at, energy in enumerate(energies)}
    refreshes, measured = log_of(by_step, 200, slot, RULE._replace(min_gap=gap))
    assert {step % gap for step in refreshes} == {slot}
    references = {step + 1 for step in refreshes}
    assert {step % gap for step in measured if step not in references} <= {slot}
    assert len(set(measured)) == len(measured)


def test_checks_are_counted_and_references_are_not() -> None:
    now = Schedule.first(10, 3).refreshed(RULE, None).ticked()
    assert now.measures(RULE)
    now = now.measured(RULE, 0.5)
    assert (now.energy, now.reference, now.checks, now.next) == (0.5, 0.5, 0, 10)
    now = replace(now, clock=10).measured(RULE, 0.45)
    assert (now.energy, now.reference, now.checks, now.next) == (0.45, 0.5, 1, 20)
    assert not now.due
    now = replace(now, clock=20).measured(RULE, 0.1)
    assert now.due
    now = now.refreshed(RULE, 0.3)
    assert math.isnan(now.reference)
    assert (now.energy, now.checks, now.next, now.gap, now.similarities) == (0.1, 2, 21, 10, (0.3,))


# -- real runs --------------------------------------------------------------------------------------------------------


def lone(**keys: object) -> tuple[nn.Parameter, qg.QGaLoreAdamW]:
    p = nn.Parameter(torch.zeros(60, 40))
    group = {"params": [p], "rank": 3, "update_proj_gap": 3, "trigger": "energy", **keys}
    return p, qg.QGaLoreAdamW([group])


def test_a_layer_whose_gradients_stay_is_checked_and_one_whose_gradients_turn_is_refreshed() -> None:
    p, opt = lone()
    torch.manual_seed(0)
    first, second = (torch.randn(60, 3) @ torch.randn(3, 40) for _ in range(2))
    for step in range(13):
        p.grad = (first if step < 8 else second) + 0.1 * torch.randn(60, 40)
        opt.step()
        (record,) = opt.schedule()
        assert record.energy == (None if step == 0 else pytest.approx(record.energy))
    assert (record.refreshes, record.last, record.checks) == (2, 9, 4)  # checks at 3, 6, 9 and 12
    assert record.reference is not None
    assert record.reference > 0.8


def test_the_energy_is_that_of_the_stored_projector() -> None:
    p, opt = lone()
    for _ in range(2):
        p.grad = torch.randn(60, 40)
        opt.step()
    (record,) = opt.schedule()
    group, state = opt.param_groups[0], opt.state[p]
    low = project(p.grad, layout.projector(p, group, state), "right")
    expected = float(low.square().sum() / p.grad.square().sum())
    assert record.energy == record.reference == pytest.approx(expected, rel=1e-5)


def test_a_check_writes_the_schedule_alone() -> None:
    p, opt = lone(max_gap=3000)
    gradient = torch.randn(60, 3) @ torch.randn(3, 40)
    for step in range(4):
        p.grad = gradient + 0.01 * torch.randn(60, 40)
        before = [tensor.clone() for name, tensor in opt.state[p].items() if name.startswith("projector")]
        opt.step()
        after = [tensor for name, tensor in opt.state[p].items() if name.startswith("projector")]
        assert step == 0 or all(map(torch.equal, before, after))
    assert (opt.schedule()[0].checks, opt.schedule()[0].refreshes) == (1, 1)


def test_a_gradient_that_is_not_finite_is_checked_again_at_the_next_call() -> None:
    p, opt = lone()
    for step in range(5):
        p.grad = torch.randn(60, 40) * (torch.nan if step == 3 else 1.0)
        opt.step()
    (record,) = opt.schedule()
    assert (record.checks, int(opt.skipped_steps)) == (1, 1)
    assert math.isfinite(record.energy or math.nan)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["keep", "rotate"])
def test_factors_and_gathered_gradients_measure_what_eager_does(accumulate: int, how: str) -> None:
    """Compiled without a C++ compiler: the op gets factors, or what was gathered in a step that only checks."""
    keys = {
        "update_proj_gap": 2,
        "trigger": "energy",
        "energy_threshold": 0.5,
        "int8": False,
        "moments": "32bit",
        "moments_on_refresh": how,
    }
    model, opt = toy(**keys)
    twin, twin_opt = toy(**keys)
    backend = Interpreted(disable=["fuse", "fuse_products", "opaque", "order"])  # what the op is given, they leave
    compiled = torch.compile(training_step(model, opt), backend=backend, fullgraph=True)
    eager = training_step(twin, twin_opt)
    for index in range(6):
        batches = [tokens(seed=10 * index + at) for at in range(accumulate)]
        compiled(*batches)
        eager(*batches)
        for found, expected in zip(opt.schedule(), twin_opt.schedule(), strict=True):
            assert (found.refreshes, found.checks, found.next) == (expected.refreshes, expected.checks, expected.next)
            assert found.energy == (None if expected.energy is None else pytest.approx(expected.energy, rel=1e-2))
    assert backend.count == 1
    assert max(record.checks for record in opt.schedule()) > 1
