"""Sizes of batches that vary: one compilation more at most, and none where ``mark_dynamic`` has said so before."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from support import assert_same_step, compiled, data, decoded, small, step_of, tokens, toy, training_step
from torch import Tensor, nn

import qgalore_compile as qg

# -- of steps ---------------------------------------------------------------------------------------------------------


def test_tokens_of_any_batch_and_any_length_cost_one_more_compilation_in_whatever_order_they_vary() -> None:
    step, backend = compiled(training_step(*toy()), strict=True)
    counts = []
    for batch, length in ((4, 9), (3, 9), (3, 8), (5, 12), (2, 3), (4, 9)):
        step(tokens(batch, length))
        counts.append(backend.count)
    assert counts == [1, 2, 2, 2, 2, 2]
    report = qg.report(step)
    assert report.recompiles == 1
    layers = [layer for layer in report.layers if layer.projected]
    assert [(layer.matched, bool(layer.reassociated)) for layer in layers] == [(True, True)] * 2


def test_sizes_of_floats_become_symbols_one_by_one() -> None:
    """Of a batch of images width and height need not be symbols because the batch's last one was short."""
    step, backend = compiled(step_of(*small()))
    for count in (5, 4, 3):
        step(data()[:count])
    assert backend.count == 2
    (symbolic,) = qg.report(step).compilations[-1].symbolic
    assert symbolic.endswith(", 8)")


def test_a_batch_of_one_is_a_graph_of_its_own_once() -> None:
    step, backend = compiled(step_of(*small()))
    for count in (4, 3, 1, 5, 1):
        step(data()[:1].expand(count, 8).clone())
    assert backend.count == 3


def test_marked_sizes_are_one_compilation_ever_and_every_step_is_the_eager_one() -> None:
    model, opt = toy()
    eager = training_step(model, opt)
    step, backend = compiled(eager, strict=True)
    for index, (batch, length) in enumerate(((4, 9), (3, 9), (5, 12))):
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
        before, given = decoded(model, opt), tokens(batch, length, seed=index)
        if index == 0:
            qg.mark_dynamic(given, (0, -1))
        step(given)
        found = decoded(model, opt)
        model.load_state_dict(weights)
        opt.load_state_dict(state)
        eager(given)
        assert_same_step(before, found, decoded(model, opt), tolerance=0.01)
    assert backend.count == 1
    assert qg.report(step).recompiles == 0


def test_sizes_outside_of_what_was_marked_are_compiled_once_more() -> None:
    step, backend = compiled(step_of(*small()))
    first = data()
    qg.mark_dynamic(first, 0, min=2, max=6)
    step(first)
    for count in (2, 6, 3):
        step(torch.randn(count, 8))
    assert backend.count == 1
    step(torch.randn(7, 8))
    assert backend.count == 2


def test_a_size_that_the_step_takes_for_a_number_is_an_error_that_says_so() -> None:
    step, _ = compiled(step_of(*small()))
    first = data()
    qg.mark_dynamic(first, 1)  # the width, which a weight has too
    with pytest.raises(Exception, match=r"marked .* as dynamic but your code specialized it"):
        step(first)


def test_another_number_of_micro_batches_is_one_more_compilation_a_number() -> None:
    """The loop over them is unrolled: each number is a program of its own."""
    step, backend = compiled(step_of(*small()))
    for number in (2, 1, 2, 1):
        step(*[data()] * number)
    assert backend.count == 2


# -- of arguments -----------------------------------------------------------------------------------------------------


def marked(tensor: Tensor) -> set[int]:
    return set(getattr(tensor, "_dynamo_dynamic_indices", ()))


def test_every_tensor_of_a_batch_is_marked_in_lists_and_mappings() -> None:
    one, other, third = tokens(), tokens(), tokens()
    qg.mark_dynamic({"input_ids": one, "more": [UserDict(x=other), 3, None], "labels": (third,)}, [0, -1])
    assert [marked(each) for each in (one, other, third)] == [{0, 1}] * 3


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (torch.ones(4, 9), {"dims": 2}, r"shape \(4, 9\) has no dimension 2; allowed are -2 … 1"),
    (torch.ones(4, 9), {"dims": (0, -3)}, "has no dimension -3"),
    (torch.ones(()), {"dims": 0}, "take numbers out"),
    (torch.ones(1, 9), {"dims": 0}, "has size 1 in dimension 0, which Dynamo takes for a constant"),
    (torch.ones(4, 0), {"dims": -1}, "has size 0 in dimension 1"),
    (torch.ones(4, 9), {"dims": 0, "min": 5}, "outside min=5 … max=None"),
    (torch.ones(4, 9), {"dims": 0, "max": 3}, "outside min=2 … max=3"),
    (torch.ones(4, 9), {"dims": 0, "min": 1}, "min must be at least 2, got 1"),
    (torch.ones(4, 9), {"dims": 0, "min": 4, "max": 3}, "max must be None or at least min=4"),
    (nn.Parameter(torch.ones(4, 9)), {"dims": 0}, "is a parameter"),
    ({"number": 3}, {"dims": 0}, "no tensor in what was given, dict"),
]


@pytest.mark.parametrize(("batch", "given", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_what_cannot_vary_is_refused_in_words_and_nothing_is_marked(
    batch: Any, given: dict[str, Any], message: str
) -> None:
    other = torch.ones(4, 9)
    with pytest.raises(ValueError, match=message):
        qg.mark_dynamic([other, batch] if isinstance(batch, Tensor) else batch, **given)
    assert marked(other) == set()
