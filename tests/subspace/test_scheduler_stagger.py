"""Refreshes spread over parameters: no step carries more than its share, and the first step only stand-ins."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tokens, toy, training_step
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.optim.groups import layer_numbers, layer_of, refresh_rule, slot_of
from qgalore_compile.subspace.finder import leading_subspace, sketched_subspace
from qgalore_compile.subspace.scheduler import Rule, Schedule


def steps_of(rule: Rule, slot: int, steps: int, similarities: list[float], queue_size: int = 3) -> list[int]:
    """The steps at which a parameter refreshes; similarities in turn, from the second refresh on."""
    now, log = Schedule.first(rule.min_gap, queue_size, slot), list[int]()
    for step in range(steps):
        if now.due:
            if now.stands_in:
                now = now.stood_in()
            else:
                now = now.refreshed(rule, similarities[len(log) % len(similarities)] if log else None)
                log.append(step)
        now = now.ticked()
    return log


rules = st.builds(
    lambda gap, gamma, cap, shrink: Rule(False, 0.4, gamma, None if cap is None else gap + cap, gap, shrink),
    gap=st.integers(1, 12),
    gamma=st.sampled_from([1.0, 1.3, 1.5, 2.0, 3.0]),
    cap=st.one_of(st.none(), st.integers(0, 60)),
    shrink=st.one_of(st.none(), st.floats(0, 0.4)),
)


@given(rule=rules, count=st.integers(1, 40), data=st.data())
def test_after_the_first_step_no_step_refreshes_more_than_its_share(
    rule: Rule, count: int, data: st.DataObject
) -> None:
    each = st.lists(st.floats(0, 1), min_size=1, max_size=6)
    load = Counter[int]()
    for index in range(count):
        load.update(steps_of(rule, index % rule.min_gap, 150, data.draw(each)))
    assert max(load.values()) <= math.ceil(count / rule.min_gap)
    assert sum(load[step] for step in range(rule.min_gap)) == count  # all of them, in the first round


@given(rule=rules, slot=st.integers(0, 11), similarities=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_refreshes_come_at_the_slot_and_whole_rounds_later(rule: Rule, slot: int, similarities: list[float]) -> None:
    slot %= rule.min_gap
    log = steps_of(rule, slot, 200, similarities)
    assert log[0] == slot
    assert {step % rule.min_gap for step in log} == {slot}
    longest = rule.max_gap or math.inf
    assert all(later - earlier <= longest for earlier, later in pairwise(log))


def test_the_gap_grows_by_gamma_and_what_is_waited_is_rounded_down_to_whole_rounds() -> None:
    rule = Rule(False, 0.4, 1.5, 45, 10)
    now, waits = Schedule.first(10, 1, slot=3), []
    now = replace(now, clock=3).refreshed(rule, None)
    for _ in range(5):
        before = now.next
        now = replace(now, clock=now.next).refreshed(rule, 1.0)
        waits.append((now.gap, now.next - before))
    assert waits == [(15, 10), (22, 20), (33, 30), (45, 40), (45, 40)]


@given(late=st.integers(0, 50), gap=st.integers(1, 12), slot=st.integers(0, 11), rounds=st.integers(1, 5))
def test_a_refresh_that_failed_is_made_up_for_at_the_next_call_and_keeps_the_phase(
    late: int, gap: int, slot: int, rounds: int
) -> None:
    rule, slot = Rule(False, 0.4, 2.0, None, gap), slot % gap
    now = replace(Schedule.first(gap, 3, slot), clock=slot).refreshed(rule, None)
    now = replace(now, gap=gap * rounds, clock=now.next + late)  # due all the time
    assert now.due
    again = now.refreshed(rule, None)
    assert again.last == now.clock < again.next
    assert again.next % gap == slot
    if late < gap:
        assert again.next == now.next + gap * rounds


def test_a_stand_in_that_failed_is_made_up_for_and_the_slot_stays() -> None:
    now = Schedule.first(10, 3, slot=4).ticked()  # a NaN at clock 0
    assert now.due
    assert now.stands_in
    assert now.stood_in().next == 4
    late = replace(now, clock=6)  # and ever since: the first refresh is overdue, nothing needs to stand in
    assert late.due
    assert not late.stands_in
    assert late.refreshed(Rule(False, 0.4, 2.0, None, 10), None).next == 14


@pytest.mark.parametrize("gap", [1, 7])
def test_an_official_group_and_one_that_is_not_to_be_staggered_have_no_slots(gap: int) -> None:
    for keys in ({"similarity": "official", "stagger": True}, {"similarity": "subspace", "stagger": False}):
        assert slot_of({"update_proj_gap": gap, **keys}, 3) == -1


# -- layers -----------------------------------------------------------------------------------------------------------

LAYERS = {
    "model.layers.3.self_attn.q_proj.weight": "model.layers.3",
    "transformer.h.11.mlp.c_fc.weight": "transformer.h.11",
    "encoder.block.2.layer.1.DenseReluDense.wi.weight": "encoder.block.2.layer.1",
    "model.layers.3.mlp.experts.7.w1.weight": "model.layers.3.mlp.experts.7",
    "blocks.3.mlp.0.weight": "blocks.3",  # the last number is the linear layer itself
    "blocks.3.attn.to_out.0.weight": "blocks.3",
    "stages.1.blocks.17.fc.weight": "stages.1.blocks.17",
    "encoder_layer_3.mlp.fc.weight": "",  # its number is no module of a list
    "0.weight": "",
    "lm_head.weight": "",
    "weight": "",
}


@pytest.mark.parametrize(("name", "layer"), LAYERS.items(), ids=LAYERS)
def test_a_layer_is_the_innermost_numbered_module_around_the_one_that_holds_the_weight(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_layers_are_numbered_as_they_come_over_groups_and_a_weight_without_one_is_its_own() -> None:
    def group(*names: str, **keys: object) -> dict[str, object]:
        return {"params": names, "param_names": names, "rank": 2, **keys}

    first = group("layers.1.q.weight", "layers.1.k.weight", "proj.weight", "layers.0.q.weight")
    plain = {"params": ["layers.7.norm.weight"], "param_names": ["layers.7.norm.weight"]}
    second = group("layers.0.up.weight", "proj.weight", "layers.2.up.weight")  # of a layer in two groups
    nameless = {"params": [None, None], "rank": 2}
    assert layer_numbers([first, plain, second, nameless]) == [[0, 0, 1, 2], [], [2, 3, 4], [5, 6]]


class Stack(nn.Module):
    """Layers of two weights each, and one weight outside of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        pair = lambda: nn.ModuleDict({"up": nn.Linear(6, 6, bias=False), "down": nn.Linear(6, 6, bias=False)})  # noqa: E731
        self.layers = nn.ModuleList(pair() for _ in range(count))
        self.out = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["down"](layer["up"](x))
        return self.out(x)


def test_weights_of_a_layer_refresh_in_one_step_and_most_steps_refresh_nothing() -> None:
    model = Stack(3)
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=2, targets=lambda *_: True, update_proj_gap=10), lr=1e-3)
    assert [record.slot for record in opt.schedule()] == [0, 0, 1, 1, 2, 2, 3]
    refreshed: list[int] = []
    for _ in range(11):
        before = sum(record.refreshes for record in opt.schedule())
        model(torch.randn(5, 6)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        refreshed.append(sum(record.refreshes for record in opt.schedule()) - before)
    assert refreshed == [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 2]


def test_a_saved_run_goes_on_by_the_slots_that_it_was_saved_with() -> None:
    """Earlier ones were counted by weight."""

    def made() -> qg.QGaLoreAdamW:
        return qg.QGaLoreAdamW(qg.param_groups(Stack(3), rank=2, targets=lambda *_: True, update_proj_gap=10))

    old, new = made(), made()
    for index, state in enumerate(state for state in old.state.values() if "schedule" in state):
        state["schedule"].copy_(replace(Schedule.from_tensor(state["schedule"]), slot=index).to_tensor())
    new.load_state_dict(old.state_dict())
    assert [record.slot for record in new.schedule()] == list(range(7))


# -- the stand-in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("tokens", [5, 12, 100])
def test_a_sketch_of_the_factors_is_that_of_their_product(shape: tuple[int, int], tokens: int) -> None:
    dy, x = torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])
    dy2, x2 = torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])
    gradient = dy.t() @ x + dy2.t() @ x2
    side = "right" if shape[0] >= shape[1] else "left"
    how = {"seed": 3, "step": 1, "param": 2}
    by_gradient = sketched_subspace([gradient], 12, side, **how)
    by_factors = sketched_subspace([dy, x, dy2, x2], 12, side, **how)
    assert by_gradient.shape == ((12, shape[1]) if side == "right" else (shape[0], 12))
    torch.testing.assert_close(span(by_factors, side), span(by_gradient, side), rtol=0, atol=1e-3)
    rows = by_gradient if side == "right" else by_gradient.t()
    torch.testing.assert_close(rows @ rows.t(), torch.eye(12), rtol=0, atol=1e-5)


def span(p: Tensor, side: str) -> Tensor:
    return p.t() @ p if side == "right" else p @ p.t()


def test_a_sketch_catches_most_of_what_the_exact_subspace_does() -> None:
    u, v = torch.linalg.qr(torch.randn(80, 80))[0], torch.linalg.qr(torch.randn(120, 80))[0]
    gradient = (u * torch.arange(1, 81).float() ** -0.5) @ v.t()
    caught = [
        float((p.t() @ gradient).square().sum())
        for p in (sketched_subspace([gradient], 20, "left"), leading_subspace([gradient], 20, "left", method="svd"))
    ]
    assert 0.7 * caught[1] < caught[0] < caught[1]


def test_a_gradient_of_lower_rank_is_caught_whole() -> None:
    gradient = torch.randn(40, 3) @ torch.randn(3, 30)
    p = sketched_subspace([gradient], 8, "right")
    torch.testing.assert_close(p @ p.t(), torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close((gradient @ p.t()) @ p, gradient, rtol=0, atol=1e-4)


def test_a_zero_gradient_has_some_projector() -> None:
    p = sketched_subspace([torch.zeros(9, 7)], 4, "right")
    torch.testing.assert_close(p @ p.t(), torch.eye(4), rtol=0, atol=1e-5)


# -- real runs --------------------------------------------------------------------------------------------------------


def chain(count: int, **keys: object) -> tuple[nn.Module, qg.QGaLoreAdamW]:
    """``count`` square layers in two groups of the same keys."""
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(count)))
    weights = list(model.parameters())
    half = count // 2
    groups = [{"params": part, "rank": 2, **keys} for part in (weights[:half], weights[half:])]
    return model, qg.QGaLoreAdamW(groups, lr=1e-3)


def test_groups_of_one_gap_share_its_steps() -> None:
    model, opt = chain(7, update_proj_gap=4, similarity_threshold=2.0)
    assert [record.slot for record in opt.schedule()] == [0, 1, 2, 3, 0, 1, 2]
    refreshed: list[list[int]] = []
    for index in range(9):
        before = [record.refreshes for record in opt.schedule()]
        model(torch.randn(5, 6)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        after = [record.refreshes for record in opt.schedule()]
        refreshed.append([at for at in range(7) if after[at] > before[at]])
        assert all(record.last == index for at, record in enumerate(opt.schedule()) if at in refreshed[-1])
    assert refreshed == [[0, 4], [1, 5], [2, 6], [3], [0, 4], [1, 5], [2, 6], [3], [0, 4]]


def test_the_first_step_has_a_projector_for_everyone_and_similarities_begin_after_the_first_refresh() -> None:
    model, opt = toy(update_proj_gap=3, similarity_threshold=2.0, shrink_threshold=-1.0)
    step = training_step(model, opt)
    similarities = []
    for index in range(5):
        step(tokens(seed=index))
        similarities.append([len(record.similarities) for record in opt.schedule()])
        for block in model.blocks:
            assert opt.state[block.weight]["projector"].any()
            assert opt.state[block.weight]["step"] == index + 1
    assert similarities == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


def test_a_parameter_that_was_without_a_gradient_is_behind_and_turns_by_its_own_clock() -> None:
    model, opt = chain(2, update_proj_gap=3, similarity_threshold=2.0)
    first, second = model.parameters()
    log: list[tuple[int, int]] = []
    for index in range(8):
        first.grad = torch.randn(6, 6)
        second.grad = None if index in (1, 2) else torch.randn(6, 6)  # its slot is 1: it refreshes at steps 3, 6
        before = [record.refreshes for record in opt.schedule()]
        opt.step()
        log += [(index, at) for at, record in enumerate(opt.schedule()) if record.refreshes > before[at]]
    assert log == [(0, 0), (3, 0), (3, 1), (6, 0), (6, 1)]  # two slots meet


def test_the_defaults_of_a_group_stagger_and_shrink_at_half_the_threshold() -> None:
    group = qg.QGaLoreAdamW([{"params": [nn.Parameter(torch.ones(6, 4))], "rank": 2}]).param_groups[0]
    assert group["stagger"] is True
    assert refresh_rule(group) == Rule(False, 0.4, 2, 3200, 200, 0.2, None)
