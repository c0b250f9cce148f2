"""When a subspace is computed anew: the published rule, the project's own, and what a real run does with them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tokens, toy, training_step
from torch import nn

import qgalore_compile as qg
from qgalore_compile.optim.groups import refresh_rule
from qgalore_compile.subspace.scheduler import (
    ENERGIES,
    EXACT,
    FIXED,
    LEAST,
    Rule,
    Schedule,
    is_due,
    ticked_unless_due,
)

OFFICIAL = Rule(official=True, threshold=0.4, gamma=2.0, max_gap=None)
SUBSPACE = Rule(official=False, threshold=0.4, gamma=2.0, max_gap=3200, min_gap=10)


def refresh_steps(
    rule: Rule, *, gap: int, steps: int, similarities: list[float] | float = 1.0, queue_size: int = 5
) -> list[int]:
    """The steps at which a parameter refreshes; the n-th refresh after the first reports the n-th similarity."""
    values = similarities if isinstance(similarities, list) else [similarities]
    now, log = Schedule.first(gap, queue_size), []
    for step in range(steps):
        if now.due:
            log.append(step)
            now = now.refreshed(rule, None if len(log) == 1 else values[(len(log) - 2) % len(values)])
        now = now.ticked()
    return log


class PublishedQueue:
    """Q-GaLore's projector without the projection, in the terms of its paper: a queue, a gap, ``step % gap``."""

    def __init__(self, gap: int, threshold: float, gamma: float, queue_size: int) -> None:
        self.gap, self.threshold, self.gamma, self.queue_size = gap, threshold, gamma, queue_size
        self.queue: list[float] = []
        self.vector = False

    def project(self, step: int, similarity: float) -> bool:
        """Whether the step refreshes; ``similarity`` is what a refresh would measure."""
        if self.vector and step % self.gap != 0:
            return False
        if self.vector:
            if len(self.queue) == self.queue_size:
                self.queue.pop(0)
            self.queue.append(similarity)
            if len(self.queue) == self.queue_size and sum(self.queue) / self.queue_size >= self.threshold:
                self.gap = int(self.gap * self.gamma)
        self.vector = True
        return True


# -- the published rule -----------------------------------------------------------------------------------------------


def test_official_refresh_steps_of_a_stable_layer_are_the_published_ones() -> None:
    expected = [0, 200, 400, 600, 800, 1000, 1200, 1600, 3200, 6400, 12800]
    assert refresh_steps(OFFICIAL, gap=200, steps=20_000) == expected


def test_official_gap_of_an_unstable_layer_never_grows() -> None:
    assert refresh_steps(OFFICIAL, gap=200, steps=2001, similarities=0.39) == list(range(0, 2001, 200))


@given(
    gap=st.integers(1, 9),
    threshold=st.floats(-1, 1),
    gamma=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    queue_size=st.integers(1, 6),
    similarities=st.lists(st.floats(-1, 1), min_size=1, max_size=20),
)
def test_official_rule_equals_the_published_queue(
    gap: int, threshold: float, gamma: float, queue_size: int, similarities: list[float]
) -> None:
    published = PublishedQueue(gap, threshold, gamma, queue_size)
    expected: list[int] = []
    for step in range(300):
        if published.project(step, similarities[(len(expected) - 1) % len(similarities)]):
            expected.append(step)
    rule = Rule(True, threshold, gamma, None)
    assert refresh_steps(rule, gap=gap, steps=300, similarities=similarities, queue_size=queue_size) == expected


# -- the project's rule -----------------------------------------------------------------------------------------------


def test_subspace_gap_doubles_once_the_queue_is_full_and_stops_at_the_cap() -> None:
    rule = SUBSPACE._replace(max_gap=35)
    # five similarities are in the queue at the sixth refresh, 50; gaps from there: 20, then 35 for ever
    assert refresh_steps(rule, gap=10, steps=170) == [0, 10, 20, 30, 40, 50, 70, 105, 140]


def test_subspace_is_due_by_steps_since_the_last_refresh() -> None:
    now = replace(Schedule.first(10, 5), clock=7, refreshes=1, last=0).refreshed(SUBSPACE, None)
    assert now.next == 17
    due = [replace(now, clock=clock).due for clock in (8, 10, 16, 17, 18, 20)]
    assert due == [False, False, False, True, True, True]  # overdue: still due


@pytest.mark.parametrize("similarity", [0.0, 1.0])
def test_a_cap_that_has_been_set_below_the_gap_holds_from_the_next_refresh_on(similarity: float) -> None:
    now = replace(Schedule.first(100, 1), clock=100, last=0, refreshes=9, queue=(1.0,))
    now = now.refreshed(SUBSPACE._replace(max_gap=50), similarity)
    assert (now.gap, now.next) == (50, 150)


def test_growth_waits_for_a_full_queue() -> None:
    now = Schedule.first(10, 3).refreshed(SUBSPACE, None)
    assert now.similarities == ()
    gaps = []
    for _ in range(4):
        now = now.refreshed(SUBSPACE, 1.0)
        gaps.append(now.gap)
    assert gaps == [10, 10, 20, 40]


def test_the_queue_keeps_the_last_similarities_oldest_first() -> None:
    now = Schedule.first(10, 3).refreshed(SUBSPACE, None)
    for similarity in (0.1, 0.2):
        now = now.refreshed(SUBSPACE, similarity)
    assert now.similarities == (0.1, 0.2)
    for similarity in (0.3, 0.4):
        now = now.refreshed(SUBSPACE, similarity)
    assert now.similarities == (0.2, 0.3, 0.4)


def test_a_gap_grows_exactly_at_the_threshold() -> None:
    for similarity, gap in ((0.5, 20), (math.nextafter(0.5, 0), 10)):
        rule = SUBSPACE._replace(threshold=0.5)
        assert Schedule.first(10, 1).refreshed(rule, None).refreshed(rule, similarity).gap == gap


# -- shrinking --------------------------------------------------------------------------------------------------------

FALLING = SUBSPACE._replace(shrink=0.2)


def test_the_newest_similarity_shrinks_the_gap_whatever_the_mean_is() -> None:
    now = replace(Schedule.first(10, 3), gap=80, refreshes=9, queue=(1.0, 1.0, 1.0))
    assert now.refreshed(FALLING, math.nextafter(0.2, 0)).gap == 40
    assert now.refreshed(FALLING, 0.2).gap == 160  # the mean is still high, and 0.2 is not below 0.2


def test_the_gap_never_shrinks_below_update_proj_gap() -> None:
    now = replace(Schedule.first(10, 1), gap=25, refreshes=9)
    gaps = []
    for _ in range(3):
        now = now.refreshed(FALLING, 0.0)
        gaps.append(now.gap)
    assert gaps == [12, 10, 10]


def test_after_a_fall_growth_has_to_be_earned_again() -> None:
    """Without it the old similarities' mean would have the gap grow at the very next refresh."""
    now = replace(Schedule.first(10, 3), gap=80, refreshes=9, queue=(1.0, 1.0, 1.0)).refreshed(FALLING, 0.1)
    assert now.similarities == (0.1,)
    gaps = []
    for _ in range(4):
        now = now.refreshed(FALLING, 0.9)
        gaps.append(now.gap)
    assert gaps == [40, 80, 160, 320]  # the queue of three is full, and its mean high enough, at the second


def test_nothing_shrinks_under_the_published_rule() -> None:
    group = {"params": [nn.Parameter(torch.ones(6, 4))], "rank": 2, "similarity": "official", "shrink_threshold": 0.3}
    rule = refresh_rule(qg.QGaLoreAdamW([group]).param_groups[0])
    assert (rule.shrink, rule.energy, rule.max_gap) == (None, None, None)


@pytest.mark.parametrize("rule", [OFFICIAL, SUBSPACE], ids=["official", "subspace"])
@given(
    gap=st.integers(1, 20),
    similarities=st.lists(st.floats(0, 1), min_size=1, max_size=10),
    steps=st.integers(0, 200),
)
def test_next_names_the_step_at_which_it_is_due(rule: Rule, gap: int, similarities: list[float], steps: int) -> None:
    log = refresh_steps(rule, gap=gap, steps=2000, similarities=similarities)
    now, count = Schedule.first(gap, 5), 0
    for step in range(steps):
        assert now.next == min(s for s in log if s >= step)
        if now.due:
            now = now.refreshed(rule, similarities[(count - 1) % len(similarities)] if count else None)
            count += 1
            assert (now.last, now.refreshes) == (step, count)
        now = now.ticked()


count = st.integers(0, 2**50)
fraction = st.one_of(st.just(math.nan), st.floats(-1, 1))


@given(
    clocks=st.tuples(count, count, count),
    last=st.integers(-1, 2**50),
    counts=st.tuples(count, st.integers(-1, 2**50), count, count),
    fractions=st.tuples(fraction, fraction),
    queue=st.lists(fraction, min_size=1, max_size=8),
)
def test_a_schedule_survives_its_tensor(
    clocks: tuple[int, int, int],
    last: int,
    counts: tuple[int, int, int, int],
    fractions: tuple[float, float],
    queue: list[float],
) -> None:
    now = Schedule(*clocks, last, *counts, *fractions, tuple(queue))
    tensor = now.to_tensor()
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.float64, (10 + len(queue),), "cpu")
    back = Schedule.from_tensor(tensor)
    assert repr(back) == repr(now)  # repr: NaN equals NaN in it


def test_a_rule_s_tensor_holds_the_fields_in_order_and_gives_them_back_with_their_types() -> None:
    rule = Rule(official=False, threshold=0.5, gamma=2.0, max_gap=7, min_gap=3, shrink=None, energy=0.25)
    assert rule.to_tensor()[[0, 1, 2, 3, 4, 6]].tolist() == [0.0, 0.5, 2.0, 7.0, 3.0, 0.25]
    back = Rule.from_tensor(rule.to_tensor())
    assert back == rule
    assert [type(value) for value in back] == [bool, float, float, int, int, type(None), float]


def test_a_first_schedule_s_counts_are_the_least_that_they_may_be_but_gap_and_slot() -> None:
    now = Schedule.first(10, 3, slot=4)
    assert {name: getattr(now, name) for name in LEAST} == {**LEAST, "gap": 10, "slot": 4}
    assert [math.isnan(value) for value in (now.energy, now.reference, *now.queue)] == [True] * 5
    assert list(vars(now)) == [*LEAST, *ENERGIES, "queue"]
    assert (EXACT, FIXED) == (8, 10)  # the layout of tensors that checkpoints hold


@given(st.integers(0, 30), st.integers(0, 30))
def test_the_way_that_every_layer_goes_in_every_step_decides_and_counts_as_the_long_one(clock: int, turn: int) -> None:
    now = replace(Schedule.first(10, 3), clock=clock, next=turn)
    tensor = now.to_tensor()
    assert is_due(tensor) is now.due
    assert ticked_unless_due(tensor) is not now.due
    assert repr(Schedule.from_tensor(tensor)) == repr(now if now.due else now.ticked())


# -- the schedule of a real run ---------------------------------------------------------------------------------------


def run(opt: qg.QGaLoreAdamW, model: nn.Module, steps: int) -> dict[str, list[int]]:
    """The refresh log: for each projected parameter the steps at which its count of refreshes rose."""
    step = training_step(model, opt)
    log: dict[str, list[int]] = {record.name: [] for record in opt.schedule()}
    for now in range(steps):
        before = {record.name: record.refreshes for record in opt.schedule()}
        step(tokens(seed=now))
        for record in opt.schedule():
            if record.refreshes > before[record.name]:
                assert record.last == now
                log[record.name].append(now)
    return log


def test_records_tell_name_shape_side_rank_and_what_has_happened() -> None:
    model, opt = toy(rank=30, update_proj_gap=3, stagger=False)
    left_out, first = opt.schedule()[1], opt.schedule()[0]
    assert (first.name, first.shape, first.side, first.rank) == ("blocks.0.weight", (20, 12), "right", 12)
    assert (left_out.name, left_out.shape, left_out.side, left_out.rank) == ("blocks.1.weight", (12, 20), "left", 12)
    assert (first.gap, first.last, first.next, first.refreshes, first.similarities) == (3, -1, 0, 0, ())
    run(opt, model, 5)
    first = opt.schedule()[0]
    assert (first.gap, first.last, first.next, first.refreshes) == (3, 3, 6, 2)
    assert first.similarities == (1.0,)  # rank 12 of 12: the whole space


@pytest.mark.parametrize("similarity", ["official", "subspace"])
def test_refresh_log_of_a_run_whose_layers_are_stable(similarity: str) -> None:
    """A threshold that every similarity reaches: the gap grows at each refresh, once the queue is full."""
    model, opt = toy(
        update_proj_gap=2,
        queue_size=2,
        similarity=similarity,
        similarity_threshold=0.0,
        cos_threshold=-1.0,
        max_gap=8,
        stagger=False,
    )
    log = run(opt, model, 30)
    expected = [0, 2, 4, 8, 16, 24]  # the queue of two is full at step 4: gap 4, then 8, which is the cap
    assert log == {"blocks.0.weight": expected, "blocks.1.weight": expected}


def test_each_group_follows_its_own_gap() -> None:
    model, _ = toy()
    groups = [
        {"params": [model.blocks[0].weight], "param_names": ["a"], "rank": 4, "update_proj_gap": 2, "stagger": False},
        {"params": [model.blocks[1].weight], "param_names": ["b"], "rank": 4, "update_proj_gap": 3, "stagger": False},
        {"params": [model.embed.weight], "param_names": ["c"]},
    ]
    for group in groups[:2]:
        group["similarity_threshold"] = 2.0  # out of reach
    log = run(qg.QGaLoreAdamW(groups), model, 8)
    assert log == {"a": [0, 2, 4, 6], "b": [0, 3, 6]}


def test_a_parameter_s_clock_counts_the_steps_in_which_it_had_a_gradient() -> None:
    model, opt = toy(update_proj_gap=2, similarity_threshold=2.0, stagger=False)
    first, second = model.blocks[0].weight, model.blocks[1].weight
    for step in range(6):
        model(tokens(seed=step)).backward()
        if step % 2:
            second.grad = None
        opt.step()
        opt.zero_grad()
    assert first.grad is None
    assert [record.refreshes for record in opt.schedule()] == [3, 2]
    assert [record.last for record in opt.schedule()] == [4, 2]


@settings(max_examples=settings().max_examples // 5)
@given(st.integers(0, 10_000))
def test_similarity_falls_from_a_stable_layer_to_an_unstable_one(seed: int) -> None:
    torch.manual_seed(seed)
    stable = torch.randn(60, 3) @ torch.randn(3, 40)
    p, q = nn.Parameter(torch.zeros(60, 40)), nn.Parameter(torch.zeros(60, 40))
    keys = {"rank": 3, "update_proj_gap": 1, "shrink_threshold": -1.0}  # no similarity is dropped
    opt = qg.QGaLoreAdamW([{"params": [p, q], **keys}])
    for _ in range(4):
        p.grad = stable + 0.01 * torch.randn(60, 40)
        q.grad = torch.randn(60, 3) @ torch.randn(3, 40)
        opt.step()
    same, other = opt.schedule()
    assert min(same.similarities) > 0.9
    assert max(other.similarities) < 0.5
    assert len(same.similarities) == len(other.similarities) == 3
