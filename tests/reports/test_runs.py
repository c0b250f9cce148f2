"""Eager runs of a step on copies, and projectors that they are made to go on with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import data, small, snapshot, step_of
from torch import Tensor

from qgalore_compile.reports.perturbed import Perturbed
from qgalore_compile.reports.runs import eager, generators

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
PROJECTOR = "model.0.weight/projector"


def call_of(**keys: Any) -> tuple[dict[str, Any], Call, dict[str, Tensor]]:
    """(roots, call, what the step may change) of a step that is to refresh."""
    model, opt = small(**keys)
    step = step_of(model, opt)
    return {"": step, "batch": data()}, (step, (data(),), {}), snapshot(model, opt)


def test_a_run_leaves_the_step_alone_and_has_what_became_of_its_copies() -> None:
    roots, call, before = call_of()
    run = eager(roots, call, nullcontext(), {})
    names = {"model.0.weight": "0.weight", "model.2.bias": "2.bias"}
    for name, own in names.items():
        assert not torch.equal(run.entries[name].tensor, before[own])
    assert {"result", "batch", PROJECTOR, "model.0.weight/exp_avg"} <= run.entries.keys()
    again = eager(roots, call, nullcontext(), {})
    assert torch.equal(again.entries["model.0.weight"].tensor, run.entries["model.0.weight"].tensor)


@pytest.mark.parametrize("quant", [True, False])
def test_a_run_has_the_projectors_that_it_computed_anew_and_their_gradients(quant: bool) -> None:
    roots, call, _ = call_of(quant=quant)
    run = eager(roots, call, nullcontext(), {})
    assert run.renewed.keys() == {PROJECTOR}
    assert run.again == set()
    stored, gradient = run.renewed[PROJECTOR]
    assert torch.equal(stored[0], run.entries[PROJECTOR].tensor)
    assert gradient.shape == (6, 8)
    assert len(stored) == (3 if quant else 1)


def test_a_run_goes_on_with_the_projector_it_is_given_and_keeps_its_own_apart() -> None:
    roots, call, _ = call_of(quant=False)
    own = eager(roots, call, nullcontext(), {})
    other = eager(roots, call, Perturbed(1, torch.bfloat16), {}).renewed[PROJECTOR].stored
    assert not torch.equal(other[0], own.renewed[PROJECTOR].stored[0])
    run = eager(roots, call, nullcontext(), {PROJECTOR: other})
    assert torch.equal(run.entries[PROJECTOR].tensor, other[0])
    assert torch.equal(run.renewed[PROJECTOR].stored[0], own.renewed[PROJECTOR].stored[0])
    for name in ("model.0.weight", "model.0.weight/exp_avg"):  # R, and what follows from it
        assert not torch.equal(run.entries[name].tensor, own.entries[name].tensor)
    assert torch.equal(run.entries["model.2.weight"].tensor, own.entries["model.2.weight"].tensor)


def test_generators_are_set_to_where_they_were() -> None:
    states = generators()
    first = torch.rand(3)
    generators(states)
    assert torch.equal(torch.rand(3), first)
