"""Steps as users write them: what trains in eager trains in a graph, or is refused by name before the first update.

What a step may be says ``user_steps.py``; it is compiled by the string "qgalore" alone (``user_steps_run.py``).  Most
examples run the graphs that Dynamo makes, which is where a step is lost, if it is; a fixed share goes through the
passes too.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from user_steps import CHOICES, REFUSED, UserStep
from user_steps_run import Outcome, program, run


@st.composite
def steps(draw: Any, first: str | None = None) -> UserStep:
    """Steps with two to four unusual choices, ``first`` among them, so that no strange one hides what others do."""
    given = [] if first is None else [first]
    others = st.sampled_from([name for name in CHOICES if name != first])
    names = given + draw(st.lists(others, min_size=2 - len(given), max_size=4 - len(given), unique=True))
    step = UserStep(**{name: draw(st.sampled_from(CHOICES[name][1:])) for name in names})
    # A batch norm under checkpoint counts each batch twice in eager mode and once in any graph of AOTAutograd's.
    assume(not (step.net == "norm" and step.backward == "checkpoint"))
    # An optimizer all of whose parameters are frozen has no gradient, which is refused by name (test_tracing.py).
    assume(step.other != "ours" or not (step.net.startswith("frozen") or step.between == "freeze"))
    return step


def times(share: float) -> settings:
    """A multiple of the profile's examples.  None is shrunk: each try costs a trace, and steps are small as drawn."""
    return settings(
        max_examples=int(share * settings().max_examples),
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )


def tolerance(step: UserStep) -> float:
    """How far apart eager and compiled may be after three steps, as a share of what these moved."""
    if step.precision != "float32":
        return 0.05
    return 0.02 if step.moments == "8bit" or step.net == "int8" else 1e-4


def assert_as_eager_or_refused(step: UserStep, how: str) -> None:
    taken = 3 if how == "traced" else 2  # the passes know nothing of what came before
    eager, compiled = run(step, "eager", taken), run(step, how, taken)
    where = f"{step!r}, {how}:\n{program(step)}"
    assert eager.error is None, f"the program is wrong: {eager.error!r}\n{where}"
    if compiled.error is not None:
        assert_refused(step, compiled, where)
        return
    assert compiled.changed or not eager.changed, f"nothing trained\n{where}"
    share = tolerance(step)
    assert_close(compiled.end, eager.end, eager.start, share, where)
    assert [name for name, g in compiled.gradients.items() if g is None] == [
        name for name, g in eager.gradients.items() if g is None
    ], f"gradients\n{where}"
    mine, theirs = (
        {name: g.double() for name, g in each.gradients.items() if g is not None} for each in (compiled, eager)
    )
    assert_close(mine, theirs, {}, share, where)
    assert compiled.results == pytest.approx(eager.results, rel=share, abs=share), f"results\n{where}"


def assert_refused(step: UserStep, outcome: Outcome, where: str) -> None:
    """An error has words for what it is that it refuses, and comes before anything has changed."""
    words = [REFUSED[choice] for choice in step.unusual().items() if choice in REFUSED and step.fullgraph == "yes"]
    named = any(re.search(each, str(outcome.error)) for each in words)
    assert named, f"{outcome.error!r} names none of {words}\n{where}"
    assert isinstance(outcome.error, (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)), where
    assert not outcome.changed, f"refused after {outcome.steps} steps\n{where}"


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], share: float, where: str
) -> None:
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        moved = float((value - start.get(name, torch.zeros_like(value))).norm())
        apart, rounding = float((found[name] - value).norm()), 1e-6 * float(value.norm())
        assert apart <= share * moved + rounding, f"{name}: {apart:.3g} apart, {moved:.3g} moved\n{where}"


@pytest.mark.parametrize(
    "step",
    [UserStep(), *(UserStep(**{name: value}) for name, values in CHOICES.items() for value in values[1:])],
    ids=repr,
)
def test_every_single_choice_trains_as_eager_does(step: UserStep) -> None:
    assert_as_eager_or_refused(step, "traced")


@pytest.mark.parametrize("respect", CHOICES)
@times(0.1)
@given(data=st.data())
def test_a_step_as_written_trains_as_eager_does(respect: str, data: st.DataObject) -> None:
    assert_as_eager_or_refused(data.draw(steps(respect)), "traced")


def test_a_number_set_in_a_step_in_pieces_trains_as_eager_does() -> None:
    step = UserStep(zero="forward", micro_batches="two", before="inner", setting="lr inside")
    assert_as_eager_or_refused(step, "traced")


@times(0.16)
@example(step=UserStep(backward="retain", end="disabled", net="deep"))
@given(step=steps())
def test_a_step_as_written_trains_through_all_passes(step: UserStep) -> None:
    assert_as_eager_or_refused(step, "whole")
