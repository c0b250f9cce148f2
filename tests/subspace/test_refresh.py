"""The refresh op: what it overwrites when a parameter is due, and what it leaves alone when not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refresh_support import FLOAT, FORMATS, INT4, RULE, Layer, both_sides, no_convergence, project_old
from torch import Tensor

from qgalore_compile.formats import Format
from qgalore_compile.subspace.finder import METHODS
from qgalore_compile.subspace.projection import project, subspace_similarity
from qgalore_compile.subspace.refresh import _Settings
from qgalore_compile.subspace.scheduler import Rule


@both_sides
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_the_first_call_computes_projector_and_r(shape: tuple[int, int], form: Format) -> None:
    layer, grad = Layer(shape, 4, form), torch.randn(shape)
    layer.call(grad)
    quantum = {"float32": 1e-5, "int8/16": 0.02, "int4/16+planar": 0.2}[form.text]
    np.testing.assert_allclose(layer.matrix(), oracle.projection_matrix(grad.numpy(), 4), atol=quantum)
    torch.testing.assert_close(layer.low, project(grad, layer.projector, layer.side))
    assert (layer.now.clock, layer.now.last, layer.now.refreshes, layer.now.similarities) == (1, 0, 1, ())


@both_sides
def test_a_call_that_is_not_due_counts_and_changes_nothing_else(shape: tuple[int, int]) -> None:
    layer = Layer(shape, 4, INT4)
    layer.call(torch.randn(shape))
    before = [tensor.clone() for tensor in (*layer.stored, layer.low)]
    schedule = layer.now
    layer.call(torch.full(shape, torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(before, (*layer.stored, layer.low), strict=True))
    assert repr(layer.now) == repr(replace(schedule, clock=2))


@both_sides
def test_r_comes_from_the_quantised_projector(shape: tuple[int, int]) -> None:
    layer, grad = Layer(shape, 4, INT4), torch.randn(shape)
    exact = Layer(shape, 4, FLOAT)
    layer.call(grad)
    exact.call(grad)
    assert torch.equal(layer.low, project(grad, layer.projector, layer.side))
    assert not torch.allclose(layer.low, exact.low, atol=1e-3)


@both_sides
@pytest.mark.parametrize("official", [True, False])
def test_similarity_is_reported_from_the_second_refresh_on(shape: tuple[int, int], official: bool) -> None:
    layer = Layer(shape, 4, INT4, gap=1, rule=RULE._replace(official=official))
    first, second = torch.randn(shape), torch.randn(shape)
    layer.call(first)
    old = layer.projector
    layer.call(second)
    exact = Layer(shape, 4, FLOAT)
    exact.call(second)
    if official:
        a, b = (old[0], exact.projector[0]) if layer.side == "right" else (old[:, 0], exact.projector[:, 0])
        expected = float(a @ b / a.norm() / b.norm())
    else:
        expected = subspace_similarity(old, exact.projector, layer.side)
    assert layer.now.similarities == (pytest.approx(expected, abs=1e-5),)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_the_same_gradient_again_is_fully_similar(form: Format) -> None:
    layer, grad = Layer((60, 40), 4, form, gap=1), torch.randn(60, 40)
    for _ in range(3):
        layer.call(grad)
    assert min(layer.now.similarities) > 0.95


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_a_non_finite_gradient_keeps_the_projector_keeps_it_due_and_shows_in_r(poison: float, form: Format) -> None:
    layer = Layer((23, 12), 4, form, gap=2)
    grad = torch.randn(23, 12)
    bad = grad.clone()
    bad[5, 6] = poison
    layer.call(bad)  # the first call of all
    assert layer.low.isnan().all()
    assert (layer.now.clock, layer.now.last, layer.now.refreshes) == (1, -1, 0)
    layer.call(grad)
    assert layer.low.isfinite().all()
    assert (layer.now.clock, layer.now.last, layer.now.refreshes) == (2, 1, 1)
    layer.call(grad)
    before = [tensor.clone() for tensor in layer.stored]
    for _ in range(2):  # due again at clock 3
        layer.call(bad)
        assert layer.low.isnan().all()
        assert all(torch.equal(a, b) for a, b in zip(before, layer.stored, strict=True))
    layer.call(grad)
    assert layer.low.isfinite().all()
    assert (layer.now.clock, layer.now.last, layer.now.refreshes) == (6, 5, 2)


def test_under_the_official_rule_a_refresh_that_failed_is_made_up_for_at_the_next_call() -> None:
    layer = Layer((23, 12), 4, gap=4, rule=RULE._replace(official=True, max_gap=None))
    grad = torch.randn(23, 12)
    for clock in range(7):
        layer.call(grad * torch.nan if clock == 4 else grad)
    assert (layer.now.last, layer.now.refreshes) == (5, 2)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_one_non_finite_factor_is_enough(which: int) -> None:
    layer = Layer((23, 12), 4)
    factors = [torch.randn(7, 23), torch.randn(7, 12), torch.randn(7, 23), torch.randn(7, 12)]
    factors[which][0, 0] = torch.nan
    layer.call(*factors)
    assert layer.low.isnan().all()
    assert layer.now.refreshes == 0


@pytest.mark.parametrize("tokens", [2, 40])
def test_finite_factors_whose_product_overflows_count_as_non_finite(tokens: int) -> None:
    layer = Layer((23, 12), 4)
    layer.call(torch.randn(tokens, 23) * 1e25, torch.randn(tokens, 12) * 1e25)
    assert layer.low.isnan().all()
    assert layer.now.refreshes == 0


@settings(max_examples=settings().max_examples // 2)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tokens=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    rank=st.integers(1, 30),
    method=st.sampled_from(["svd", "randomized"]),
    seed=st.integers(0, 2**20),
)
def test_factors_refresh_as_their_product_does(
    shape: tuple[int, int], tokens: list[int], rank: int, method: str, seed: int
) -> None:
    torch.manual_seed(seed)
    factors = [factor for t in tokens for factor in (torch.randn(t, shape[0]), torch.randn(t, shape[1]))]
    grad = sum(y.t() @ x for y, x in zip(factors[::2], factors[1::2], strict=True))
    by_factors, by_gradient = Layer(shape, rank, method=method), Layer(shape, rank, method=method)
    by_factors.call(*factors)
    by_gradient.call(grad)
    energy = float(by_gradient.low.square().sum())
    assert float(by_factors.low.square().sum()) == pytest.approx(energy, rel=1e-4 if method == "svd" else 0.05)
    torch.testing.assert_close(by_factors.low, project(grad, by_factors.projector, by_factors.side), rtol=0, atol=1e-3)
    if sum(tokens) <= by_factors.rank:  # nothing of G is lost
        assert energy == pytest.approx(float(grad.square().sum()), rel=1e-4)


@pytest.mark.parametrize("method", ["svd", "randomized"])
@both_sides
def test_bf16_gradients_project_in_bf16_and_are_analysed_in_fp32(shape: tuple[int, int], method: str) -> None:
    layer, grad = Layer(shape, 4, INT4, method), torch.randn(shape).bfloat16()
    layer.call(grad)
    widened = Layer(shape, 4, INT4, method)
    widened.call(grad.float())
    assert all(torch.equal(a, b) for a, b in zip(layer.stored, widened.stored, strict=True))
    assert layer.low.dtype == torch.float32
    assert torch.equal(layer.low, project(grad, layer.projector.bfloat16(), layer.side).float())


def test_randomized_refreshes_draw_anew_each_time() -> None:
    """Seed and clock both select the sketch."""
    grad = torch.randn(80, 60)
    layers = [Layer((80, 60), 8, method="randomized", seed=seed, gap=1) for seed in (0, 0, 1)]
    for layer in layers:
        layer.call(grad)
    assert torch.equal(layers[0].projector, layers[1].projector)
    assert not torch.equal(layers[0].projector, layers[2].projector)
    layers[0].call(grad)
    assert not torch.equal(layers[0].projector, layers[1].projector)


def test_every_seed_that_random_bits_takes_is_taken() -> None:
    for seed in (-1, 2**62, 2**63, 2**64 - 1):
        layer = Layer((80, 60), 8, method="randomized", seed=seed)
        layer.call(torch.randn(80, 60))
        assert layer.now.refreshes == 1


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("columns", [1, 6, 15, 16, 17, 431])
def test_a_projector_survives_its_format(form: Format, columns: int) -> None:
    p = torch.randn(5, columns) / columns**0.5
    stored = form.encode(p)
    back = form.decode(stored, p.shape)
    assert back.shape == p.shape
    quanta = {"float32": 1, "int8/16": 255, "int4/16+planar": 15}[form.text]
    step = 0.0 if form is FLOAT else float(p.max() - p.min()) / quanta / 2 + 1e-6
    assert float((back - p).abs().max()) <= step
    if form is INT4:
        assert stored[0].numel() == 5 * -(-columns // 2)  # two codes a byte


# -- power ------------------------------------------------------------------------------------------------------------


@both_sides
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_power_goes_on_from_the_stored_projector(shape: tuple[int, int], official: bool, form: Format) -> None:
    layer = Layer(shape, 4, form, "power", gap=1, rule=RULE._replace(official=official))
    u, v = (torch.linalg.qr(torch.randn(size, 12))[0] for size in shape)
    grad = (u * 0.5 ** torch.arange(12)) @ v.t()
    for _ in range(4):
        project_old(layer, grad)
        layer.call(grad)
    quantum = {"float32": 1e-4, "int8/16": 0.02, "int4/16+planar": 0.2}[form.text]
    np.testing.assert_allclose(layer.matrix(), oracle.projection_matrix(grad.numpy(), 4), atol=quantum)
    assert layer.now.refreshes == 4
    assert min(layer.now.similarities) > 0.9
    assert layer.now.failures == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scaled", [False, True])
def test_factors_leave_the_r_that_their_product_leaves(method: str, scaled: bool) -> None:
    """Wide factors, so that G is not formed; a scale as half precision hands it over."""
    dy, x = torch.randn(12, 300), torch.randn(12, 90)
    scale = 0.25 if scaled else 1.0
    by_factors, by_gradient = (Layer((300, 90), 8, INT4, method) for _ in range(2))
    by_gradient.call(dy.t() @ x * scale)
    torch.ops.qgalore.refresh_(
        by_factors.low,
        by_factors.stored,
        by_factors.schedule,
        RULE.to_tensor(),
        [dy, x],
        [torch.tensor(scale)] if scaled else None,
        shape=[300, 90],
        rank=8,
        format="int4/16+planar",
        method=method,
        power_iterations=2,
        seed=0,
        param=3,
    )
    torch.testing.assert_close(by_factors.low, project(dy.t() @ x * scale, by_factors.projector, "right"))
    energy = float(by_gradient.low.square().sum())
    assert float(by_factors.low.square().sum()) == pytest.approx(energy, rel=1e-3)


# -- a decomposition that fails ---------------------------------------------------------------------------------------


def not_finite(matrix: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    d = min(matrix.shape)
    return matrix[:, :d] * torch.nan, torch.ones(d), matrix[:d]


failing = pytest.mark.parametrize("svd", [no_convergence, not_finite], ids=["no convergence", "NaN"])


@both_sides
@failing
@pytest.mark.parametrize("first", [True, False])
def test_an_svd_that_fails_is_followed_by_power_and_counted(
    shape: tuple[int, int], svd: Any, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, grad = Layer(shape, 4, gap=1), torch.randn(shape)
    if not first:
        layer.call(torch.randn(shape))
    project_old(layer, grad)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    layer.call(grad)
    assert layer.now.failures == 1
    assert layer.now.refreshes == 2 - first
    p = layer.projector if layer.side == "right" else layer.projector.t()
    torch.testing.assert_close(p @ p.t(), torch.eye(4), rtol=0, atol=1e-5)
    assert float(layer.low.square().sum()) > 4 / 12 * float(grad.square().sum())  # more than random directions hold


@failing
def test_where_everything_fails_the_old_projector_and_r_stay_and_it_is_tried_again(
    svd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, grad = Layer((23, 12), 4, INT4, gap=1), torch.randn(23, 12)
    layer.call(torch.randn(23, 12))
    project_old(layer, grad)
    before = [tensor.clone() for tensor in (*layer.stored, layer.low)]
    with monkeypatch.context() as broken:
        broken.setattr(torch.linalg, "svd", svd)
        broken.setattr(torch.linalg, "cholesky_ex", no_convergence)
        layer.call(grad)
    assert all(map(torch.equal, before, (*layer.stored, layer.low)))
    assert (layer.now.clock, layer.now.last, layer.now.refreshes, layer.now.failures) == (2, 0, 1, 2)
    layer.call(grad)
    assert (layer.now.clock, layer.now.last, layer.now.refreshes, layer.now.failures) == (3, 2, 2, 2)


# -- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overload", ["default", "moments"])
def test_arguments_are_positional_and_the_constants_in_the_order_of_their_record(overload: str) -> None:
    """Keyword-only ones cost twice as much to pass on, in every layer and step."""
    arguments = getattr(torch.ops.qgalore.refresh_, overload)._schema.arguments
    assert not any(argument.kwarg_only or argument.has_default_value() for argument in arguments)
    names = [argument.name for argument in arguments]
    constants = list(_Settings._fields[1:] if overload == "moments" else _Settings._fields[1:-2])
    assert names[names.index("shape") :] == constants


def test_a_rule_s_tensor_says_what_the_rule_says() -> None:
    for rule in (RULE, RULE._replace(max_gap=None, shrink=0.25, energy=0.8), Rule(True, -0.5, 1.5, 7, 3)):
        assert Rule.from_tensor(rule.to_tensor()) == rule


@pytest.mark.parametrize("tokens", [5, 400])
def test_a_check_and_the_refresh_it_asks_for_form_the_gradient_once(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer((60, 40), 4, rule=RULE._replace(energy=0.8), gap=1)
    factors = [torch.randn(tokens, 60), torch.randn(tokens, 40)]
    layer.call(*factors)
    layer.schedule = replace(layer.now, reference=1.0).to_tensor()  # of which R, zeros, has nothing
    layer.low.zero_()
    formed: list[int] = []

    def counted(given: list[Tensor]) -> Tensor:
        formed.append(len(given))
        return given[0].t() @ given[1]

    monkeypatch.setattr("qgalore_compile.subspace.finder.full_gradient", counted)
    layer.call(*factors)
    assert (layer.now.checks, layer.now.refreshes) == (1, 2)
    assert len(formed) == (tokens == 400)
