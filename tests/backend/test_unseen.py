"""Which writes of an optimizer's operators AOTAutograd is not told of, and which it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from support import Interpreted, assert_same_step, decoded, tokens, toy, training_step
from torch import Tensor, fx

import qgalore_compile as qg
from qgalore_compile.backend import unseen
from qgalore_compile.backend.tracing import step_backend
from qgalore_compile.optim.operators import PROJECT, UPDATE
from qgalore_compile.optim.rules import RuleState, Written

Step = Callable[[Tensor], Any]
Make = Callable[[torch.nn.Module, qg.QGaLoreAdamW], Step]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[Any], list[int]]]:
    """Of each graph, the overloads that AOTAutograd is given, and the inputs that are written unseen."""
    found = []
    hide = unseen.hide

    def spied(gm: fx.GraphModule, *, keep: bool) -> list[int]:
        written = hide(gm, keep=keep)
        ours = {*PROJECT, *UPDATE}
        found.append(({node.target for node in gm.graph.nodes} & ours, written))
        return written

    monkeypatch.setattr(unseen, "hide", spied)
    return found


def assert_as_eager(make: Make, **settings: Any) -> None:
    """Two steps, compiled, return and leave what they do eagerly."""
    torch._dynamo.reset()
    (model, opt), (expected_model, expected) = toy(**settings), toy(**settings)
    step, eager = make(model, opt), make(expected_model, expected)
    compiled = torch.compile(step, backend=Interpreted(), fullgraph=True)
    for seed in (1, 2):
        before = decoded(expected_model, expected)
        found, wanted = compiled(tokens(seed=seed)), eager(tokens(seed=seed))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert_same_step(before, decoded(model, opt), decoded(expected_model, expected), tolerance=1e-3)


def accumulating(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    whole = training_step(model, opt)
    return lambda batch: whole(batch, batch.flip(0))


UNSEEN = {PROJECT.unseen, UPDATE.unseen}
TRACED = {PROJECT.traced, UPDATE.traced}


@pytest.mark.parametrize("make", [training_step, accumulating])
def test_what_nothing_reads_behind_the_update_is_written_unseen(make: Make, chosen: Any) -> None:
    assert_as_eager(make)
    ((given, written),) = chosen
    assert given == UNSEEN
    # nine parameters; steps and moments of each; of two a projector of three parts and a schedule
    assert len(written) >= 9 * (1 + 1 + 2) + 2 * 4


def with_two_optimizers() -> tuple[torch.nn.Module, Step]:
    model, _ = toy(int8=False)
    projected, others = qg.param_groups(model, rank=4)
    both = [qg.QGaLoreAdamW([group], lr=1e-2) for group in (projected, others)]

    def step(batch: Tensor) -> Tensor:
        loss = model(batch)
        loss.backward()
        for opt in both:
            opt.step()
            opt.zero_grad()
        return loss.detach()

    return model, step


def test_two_optimizers_write_unseen(chosen: Any) -> None:
    torch._dynamo.reset()
    (model, step), (expected_model, expected) = with_two_optimizers(), with_two_optimizers()
    compiled = torch.compile(step, backend=Interpreted(), fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(tokens()), expected(tokens()))
    for found, wanted in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert chosen[0][0] == UNSEEN


def returning_a_weight(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    whole = training_step(model, opt)
    return lambda batch: (whole(batch), model.norm.weight)[1].detach().clone()


def reading_a_state(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    whole = training_step(model, opt)
    return lambda batch: whole(batch) + opt.state[model.norm.weight]["step"] * 10.0


def reading_a_view(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    whole = training_step(model, opt)

    def step(batch: Tensor) -> Tensor:
        first = model.head.weight.detach()[:2]
        whole(batch)
        return first.sum()

    return step


def reading_a_schedule(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    whole = training_step(model, opt)
    return lambda batch: whole(batch) + opt.state[model.blocks[0].weight]["schedule"][0]


def reading_an_int8_weight(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    whole = training_step(model, opt)

    def step(batch: Tensor) -> Tensor:
        loss = whole(batch)
        with torch.no_grad():
            return loss + model(batch)

    return step


def stepping_twice(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    def step(batch: Tensor) -> Tensor:
        loss = model(batch)
        loss.backward()
        opt.step()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step


def a_backward_of_its_own(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    """Which may use what autograd saved before the update."""
    scale = torch.nn.Parameter(torch.ones(()))

    def step(batch: Tensor) -> Tensor:
        scale.grad = None
        loss = model(batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        (scale * 2.0).backward()
        return scale.grad.clone()

    return step


def behind(change: Callable[[Any, qg.QGaLoreAdamW], object]) -> Make:
    """A step in which something is written before."""

    def make(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
        whole = training_step(model, opt)

        def step(batch: Tensor) -> Tensor:
            with torch.no_grad():
                change(model, opt)
            return whole(batch)

        return step

    return make


def copy_a_state(model: Any, opt: qg.QGaLoreAdamW) -> None:
    opt.state[model.head.weight]["exp_avg"].copy_(opt.state[model.embed.weight]["exp_avg"])


def write_codes(model: Any, _: qg.QGaLoreAdamW) -> None:
    model.blocks[0].weight.copy_(model.blocks[0].weight * 0.5)


def two_whole_steps(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    whole = training_step(model, opt)
    return lambda batch: whole(batch) + whole(batch.flip(0))


@pytest.mark.parametrize(
    "make",
    [
        returning_a_weight,
        pytest.param(reading_a_state, marks=pytest.mark.more),
        reading_a_view,
        reading_a_schedule,
        reading_an_int8_weight,
        pytest.param(stepping_twice, marks=pytest.mark.more),
        two_whole_steps,
        a_backward_of_its_own,
        pytest.param(
            behind(lambda model, _: model.head.weight.clamp_(-0.1, 0.1)), id="clamping_a_weight", marks=pytest.mark.more
        ),
        # two inputs that hold one value from then on
        pytest.param(behind(lambda model, _: model.head.weight.copy_(model.embed.weight)), id="copying_a_weight"),
        pytest.param(behind(copy_a_state), id="copying_a_state", marks=pytest.mark.more),
        pytest.param(behind(write_codes), id="writing_codes"),
    ],
)
def test_what_is_read_behind_the_update_or_written_before_is_seen(make: Make, chosen: Any) -> None:
    assert_as_eager(make)
    assert chosen == [(TRACED, [])]


def a_gradient_that_is_another_weight() -> tuple[list[torch.nn.Parameter], Step]:
    a, b = (torch.nn.Parameter(torch.arange(1.0, 7.0).view(2, 3) * each) for each in (0.1, 0.2))
    opt = qg.QGaLoreAdamW([{"params": [a, b]}], lr=0.1)

    def step(_: Tensor) -> Tensor:
        loss = (a * b * 1.0).sum()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return [a, b], step


def test_a_gradient_that_is_another_weight_is_that_before_its_update(chosen: Any) -> None:
    torch._dynamo.reset()
    (found, step), (wanted, eager) = a_gradient_that_is_another_weight(), a_gradient_that_is_another_weight()
    compiled = torch.compile(step, backend=Interpreted(), fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(tokens()), eager(tokens()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert chosen[0][0] == {UPDATE.unseen}


@dataclass(frozen=True)
class Signs(qg.Rule):
    name: ClassVar[str] = "signs for a test of unseen"

    def step(self, r: Tensor, state: RuleState) -> Written:
        return Written(state.adam(r).sign())


def test_a_rule_of_a_user_s_own_is_traced_through_and_the_others_are_not(chosen: Any) -> None:
    """What is compiled is found again by its text, which would not tell of another code of the rule."""
    assert_as_eager(training_step, rule=Signs())
    assert chosen[0][0] == {UPDATE.unseen}


def under_autocast(model: torch.nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    def step(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)
            loss.backward()
            opt.step()
        opt.zero_grad()
        return loss.detach()

    return step


def test_under_autocast_the_operations_are_traced_whose_products_it_changes(chosen: Any) -> None:
    left = []
    for options in ({}, {"disable": "decompose"}):
        torch._dynamo.reset()
        model, opt = toy(int8=False, moments="32bit")
        torch.compile(under_autocast(model, opt), backend=Interpreted(**options), fullgraph=True)(tokens())
        left.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *left))
    assert [given for given, _ in chosen] == [set(), set()]


def test_other_backends_see_no_operator(chosen: Any) -> None:
    seen: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm.graph)
        return gm.forward

    model, opt = toy()
    training_step(model, opt, clear=False)(tokens())
    torch.compile(opt.step, backend=backend)()
    assert not {node.target for graph in seen for node in graph.nodes} & {*PROJECT, *UPDATE}


def test_autograd_knows_that_a_weight_has_been_written() -> None:
    torch._dynamo.reset()
    model, opt = toy()
    step = torch.compile(training_step(model, opt), backend=Interpreted(), fullgraph=True)
    squares = model.head.weight.square().sum()
    step(tokens())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize("rule", ["galore", "apollo", "fira"])
def test_run_by_itself_an_operator_does_what_the_phase_does(rule: str) -> None:
    """A backend that takes a graph as Dynamo made it runs the first overload."""
    torch._dynamo.reset()
    (model, opt), (expected_model, expected) = toy(rule=rule), toy(rule=rule)
    before = decoded(model, opt)
    compiled = torch.compile(training_step(model, opt), backend=step_backend(lambda gm, _: gm.forward), fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), training_step(expected_model, expected)(tokens()))
    assert_same_step(before, decoded(model, opt), decoded(expected_model, expected), tolerance=1e-5)
