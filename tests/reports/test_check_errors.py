"""What a wrong compile changes: `qg.check` finds it, names it and reports it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Toy, data, small, step_of, tokens
from torch import Tensor, nn

from qgalore_compile.reports.check import CheckResult, check
from qgalore_compile.reports.compared import _apart, _subspaces_apart

# Dynamo alone, whose graph is then run as it is: what check itself does needs no more.
quick = functools.partial(check, backend="eager")


def wrong(result: CheckResult) -> set[str]:
    return {error.name for error in result.errors if not error.ok}


# -- what is wrong is found and named ---------------------------------------------------------------------------------


def spoiling(spoil: Callable[[Tensor, Tensor], object], *, shape: tuple[int, ...]) -> Callable[..., Any]:
    """A backend after whose graph ``spoil(tensor, as it was before)`` is applied to the first input of this shape."""

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            target = next(value for value in values if isinstance(value, Tensor) and value.shape == shape)
            before = copy.deepcopy(target.detach())
            results = gm(*values)
            with torch.no_grad():
                spoil(target, before)
            return results

        return run

    return backend


@pytest.mark.parametrize("int8", [False, True])
def test_a_backend_that_skips_an_update_is_found_and_named(int8: bool) -> None:
    skip = spoiling(lambda now, before: now.copy_(before), shape=(6, 8))
    result = check(step_of(*small(int8=int8)), data(), backend=skip)
    assert not result.ok
    assert wrong(result) == {"model.0.weight"}
    assert result.worst.name == "model.0.weight"
    assert result.worst.relative == pytest.approx(1, abs=1e-3)
    assert (result.worst.codes_differing is not None) == int8


def test_a_draw_too_many_is_found() -> None:
    result = check(step_of(*small()), data(), backend=spoiling(lambda *_: torch.rand(1), shape=(5, 8)))
    assert wrong(result) == {"torch's generator"}


def test_a_small_error_in_one_element_is_found() -> None:
    def nudge(now: Tensor, before: Tensor) -> None:
        now[1, 2] += 3e-3

    result = check(step_of(*small()), data(), backend=spoiling(nudge, shape=(3, 6)))
    assert wrong(result) == {"model.2.weight"}
    assert result.worst.largest == pytest.approx(3e-3, rel=1e-3)


def test_a_changed_argument_and_a_nan_are_found() -> None:
    result = check(step_of(*small()), data(), backend=spoiling(lambda now, _: now[0].fill_(torch.nan), shape=(5, 8)))
    assert wrong(result) == {"batches[0]"}
    assert result.worst.largest == float("inf")


def test_a_wrong_result_a_step_count_off_by_one_and_a_missing_gradient_are_found() -> None:
    model = nn.Linear(8, 2)
    count = torch.tensor(5)

    def step(batch: Tensor) -> Tensor:
        loss = model(batch).sum()
        loss.backward()
        count.add_(1)
        if torch.compiler.is_compiling():
            model.bias.grad = None
            count.add_(1)
            return loss.detach() * 1.01
        return loss.detach()

    result = quick(step, data())
    assert wrong(result) == {"result", "count", "model.bias.grad"}
    assert {error.note for error in result.errors if not error.ok} == {
        "1 of 1 elements are not explained by rounding, 0 may be",
        "must be exact",
        "only in the eager step",
    }


def test_equal_nans_and_infinities_are_equal_and_others_are_not() -> None:
    nan, inf = torch.nan, torch.inf
    assert _apart(torch.tensor([nan, inf, -inf, 1.0]), torch.tensor([nan, inf, -inf, 1.0])).tolist() == [0, 0, 0, 0]
    assert _apart(torch.tensor([nan, 1.0, inf]), torch.tensor([1.0, nan, -inf])).tolist() == [inf, inf, inf]


def test_a_refreshed_projector_counts_as_its_subspace_whatever_its_basis() -> None:
    basis, _ = torch.linalg.qr(torch.randn(9, 9))
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    p, other = basis[:, :3], basis[:, 3:6]
    gradient = p @ torch.randn(3, 12)
    assert _subspaces_apart(p @ turn, p, "left", gradient) < 1e-5
    assert _subspaces_apart((p @ turn).t(), p.t(), "right", gradient.t()) < 1e-5
    assert _subspaces_apart(other, p, "left", gradient) == pytest.approx(1, abs=1e-5)
    assert _subspaces_apart(torch.zeros(9, 3), p, "left", gradient) == pytest.approx(1)


def test_directions_without_gradient_may_be_any() -> None:
    basis, _ = torch.linalg.qr(torch.randn(9, 9))
    gradient = basis[:, :2] @ torch.randn(2, 12)
    one, other = basis[:, :4], basis[:, [0, 1, 7, 8]]
    assert _subspaces_apart(other, one, "left", gradient) < 1e-5


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_is_a_table_with_the_worst_first_and_json_that_any_parser_reads() -> None:
    result = check(step_of(*small()), data(), backend=spoiling(lambda now, _: now.fill_(torch.nan), shape=(3, 6)))
    text = str(result)
    assert "1 wrong" in text
    assert text.index("WRONG") < text.index("batches[0]")
    assert "model.2.weight" in text
    assert max(map(len, text.splitlines())) <= 120
    record = json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["ok"] is False
    assert record["errors"][0]["name"] == result.worst.name == "model.2.weight"
    assert record["errors"][0]["largest"] == "inf"


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = Toy()
    quick(lambda batch: model(batch), tokens())
    assert capsys.readouterr() == ("", "")
