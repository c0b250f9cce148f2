"""Whether rounding explains a tensor, on samples made by hand: what eager runs were, and what a compiled step left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qgalore_compile.reports.judgement import Rates, Sample, _quantile, judge

ROWS, COLUMNS, RUNS = 24, 32, 9


def runs(noise: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(one more run, RUNS of them) of a movement of about 1 an element, ``noise`` apart."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    off = torch.randn(RUNS + 1, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    found, *others = moved + noise * off
    return found, torch.stack(others)


def sample(found: Tensor, others: Tensor, **settings: object) -> Sample:
    given = dict(start=torch.zeros_like(found), new=False, flip=None, spare=0, kind="weight")
    return Sample(found, others, **{**given, **settings})  # type: ignore[arg-type]


def said_of(found: Tensor, others: Tensor, **settings: object) -> str:
    made = sample(found, others, **settings)
    return judge(made, Rates([made]))[0]


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-2, 0.3, 10.0])
@pytest.mark.parametrize("seed", range(20))
def test_one_more_run_is_right(noise: float, seed: int) -> None:
    assert said_of(*runs(noise, seed=seed)) == ""


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-2, 0.1])
@pytest.mark.parametrize(
    "wrong", ["nothing moved", "rows permuted", "a row is missing", "a column is missing", "sign", "rolled", "twice"]
)
def test_a_wrong_kernel_is_found(noise: float, wrong: str) -> None:
    found, others = runs(noise)
    found = {
        "nothing moved": lambda x: 0 * x,
        "rows permuted": lambda x: x[torch.randperm(ROWS)],
        "sign": lambda x: -x,
        "a row is missing": lambda x: torch.cat([0 * x[:1], x[1:]]),
        "rolled": lambda x: x.roll(1, -1),
        "a column is missing": lambda x: torch.cat([x[:, :-1], 0 * x[:, -1:]], 1),
        "twice": lambda x: 2 * x,
    }[wrong](found)
    assert said_of(found, others) != ""


def test_an_element_that_rounding_decides_excuses_no_other() -> None:
    found, others = runs(1e-6)
    others[:, 3, 4] = torch.tensor([1.0, -1.0] * RUNS)[:RUNS]
    found[3, 4] = -1.0
    assert said_of(found, others) == ""
    found[3, 5] += 0.1
    assert said_of(found, others).startswith("1 of 768 elements are not explained by rounding, 0 may be")


def test_signs_that_flip_in_other_runs_now_and_then_may_flip_in_this_one() -> None:
    found, others = runs(1e-6)
    for run, one in enumerate(others):  # another element in each run
        one[run, run] *= -1
    found[20, 20] *= -1
    assert said_of(found, others) == ""
    found[:7, 7] *= -1
    assert "7 of 24 in column 7 are not explained by rounding" in said_of(found, others)


def test_what_rounding_decides_is_still_bounded_by_its_size() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (RUNS + 1, ROWS, COLUMNS), generator=generator).double() * 2 - 1
    found, others = signs[0], signs[1:]
    assert said_of(found, others) == ""
    assert said_of(found * 30, others) != ""
    assert said_of(found * 0, others) != ""
    one = found.clone()
    one[2, 2] = 9.0
    assert said_of(one, others) != ""


def test_few_unexplained_elements_may_not_be_most_of_a_moment() -> None:
    found, others = runs(1e-3)
    for run, one in enumerate(others):
        one[run, run] *= 2
    found[20, 20] = 400.0
    assert said_of(found, others, bound=math.inf).startswith("an element moved by")
    others[:, 20, 20], found[20, 20] = 40.0, 14.0
    assert said_of(found, others, bound=math.inf) == ""
    assert "1 unexplained elements are" in said_of(found, others, bound=0.5 * float(others[0].norm()))


def test_a_flipped_code_needs_no_explanation_and_many_do() -> None:
    found, others = runs(0.0)
    step = torch.full_like(found, 0.25)
    found[0, :2] += 0.25
    assert said_of(found, others, flip=step, spare=2) == ""
    assert said_of(found, others, flip=step, spare=1) != ""
    assert said_of(found, others, flip=step / 2, spare=2) != ""


def test_differences_below_the_contract_are_not_looked_at() -> None:
    found, others = runs(0.0)
    size = float(others[0].square().mean().sqrt())
    assert said_of(found + 0.9e-3 * size, others) == ""
    assert said_of(found + 3e-3 * size, others) != ""


def test_a_tensor_without_elements_is_right() -> None:
    assert said_of(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(4, 0, 3, dtype=torch.float64)) == ""


@pytest.mark.parametrize("mean", [0.0, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("chance", [1e-3, 1e-8])
def test_a_poisson_variable_exceeds_its_quantile_with_that_chance_at_most(mean: float, chance: float) -> None:
    def beyond(k: int) -> float:
        return 1 - math.fsum(math.exp(-mean) * mean**i / math.factorial(i) for i in range(k + 1))

    k = _quantile(mean, chance)
    assert beyond(k) <= chance + 1e-12
    assert k == 0 or beyond(k - 1) > chance - 1e-12
