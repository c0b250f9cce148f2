"""Costs of a refresh: what the formulas count, and that run time and report decide by the same."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from qgalore_compile.subspace import cost as refresh_cost
from qgalore_compile.subspace.cost import OVERSAMPLING, cost, described, factors_are_cheaper, m, most_tokens, n, q, r

sizes = st.integers(2, 3000)
METHODS = ("svd", "randomized", "power")


def test_a_warm_step_is_two_products_and_an_orthonormalisation() -> None:
    numbers = {refresh_cost.T: 100, m: 30, n: 50, r: 8, q: 2}
    through_gradient, through_factors = (int(each.subs(numbers)) for each in cost("power"))
    orthonormal = 3 * 30 * 8**2
    assert through_gradient == 2 * 100 * 30 * 50 + 2 * (2 * 30 * 50 * 8) + orthonormal
    assert through_factors == 2 * (2 * 100 * 8 * (30 + 50)) + orthonormal


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_each_power_iteration_is_two_products_more(iterations: int) -> None:
    def products(count: int) -> sympy.Expr:
        through_gradient, through_factors = cost("randomized")
        return sympy.Poly((through_factors - through_gradient).subs({m: 30, n: 50, r: 8, q: count}), refresh_cost.T)

    more = products(iterations + 1) - products(iterations)
    width = 8 + OVERSAMPLING
    assert more.as_expr() == sympy.expand(2 * (2 * refresh_cost.T * 80 - 2 * 30 * 50) * width)


@given(st.sampled_from(METHODS), sizes, sizes, st.integers(1, 512), st.integers(1, 4), st.integers(1, 20_000))
def test_the_factors_are_taken_up_to_the_bound_that_the_report_names(
    method: str, rows: int, columns: int, rank: int, iterations: int, tokens: int
) -> None:
    of = (method, rows, columns, min(rank, rows, columns), iterations)
    assert factors_are_cheaper(*of, tokens) == (tokens <= most_tokens(*of))


def test_a_decision_at_run_time_needs_no_sympy(monkeypatch: pytest.MonkeyPatch) -> None:
    factors_are_cheaper("svd", 30, 50, 8, 2, 10)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("sympy")

    for name in ("lambdify", "Min", "Max"):
        monkeypatch.setattr(sympy, name, refuse)
    monkeypatch.setattr(sympy.Expr, "subs", refuse)
    assert factors_are_cheaper("svd", 300, 500, 80, 2, 100)


def test_at_the_size_of_7b_all_go_through_the_factors_of_2048_tokens() -> None:
    assert all(factors_are_cheaper(method, 4096, 11008, 1024, 2, 2048) for method in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_text_tells_both_ways_and_where_they_part(method: str) -> None:
    text = described(method, 4096, 11008, 1024, 2, 1)
    assert text.startswith(f"{method}: about ")
    assert " operations through the factors" in text
    assert text.endswith("; below T = 1,024 exact")
    bound = most_tokens(method, 4096, 11008, 1024, 2)
    assert (f"from T = {bound + 1:,} on" in text) == (method != "power")


def test_a_gathered_or_given_gradient_leaves_no_choice() -> None:
    gathered, given_ = (described("randomized", 20, 12, 4, 2, products) for products in (2, 0))
    assert "960*T" in gathered  # two products of 2 · 20 · 12 operations a token
    assert "T" not in given_
    assert gathered.endswith("960 bytes for G in float32")
    assert "through the factors" not in gathered + given_
