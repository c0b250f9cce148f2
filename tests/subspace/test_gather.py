"""Gathering a gradient over micro-batches: nothing when no refresh is due, their sum in float32 when one is."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qgalore_compile.subspace.gather import gathered, is_carrier
from qgalore_compile.subspace.projection import project, side_of
from qgalore_compile.subspace.scheduler import Rule, Schedule

RULE = Rule(official=False, threshold=0.4, gamma=2.0, max_gap=160)
DUE = Schedule.first(10, 5)
NOT_DUE = DUE.refreshed(RULE, None).ticked()

gather_gradient = torch.ops.qgalore.gather_gradient.default


def gather(carried: Tensor | None, now: Schedule, dy: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
    return gather_gradient(carried, now.to_tensor(), dy, x, scale)  # type: ignore[no-any-return]


def batches(count: int, m: int = 9, n: int = 7, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, m).to(dtype), torch.randn(5, n).to(dtype)) for _ in range(count)]


def all_of(pairs: list[tuple[Tensor, Tensor]], now: Schedule = DUE, scale: Tensor | None = None) -> Tensor:
    carrier: Tensor | None = None
    for dy, x in pairs:
        carrier = gather(carrier, now, dy, x, scale)
    assert carrier is not None
    return carrier


# -- when no refresh is due -------------------------------------------------------------------------------------------


def test_nothing_is_gathered_or_allocated_when_no_refresh_is_due() -> None:
    carrier = all_of(batches(3), NOT_DUE)
    assert carrier.shape == (0,)
    assert carrier.untyped_storage().nbytes() == 0


def test_factors_are_not_even_read_when_no_refresh_is_due() -> None:
    poisoned = torch.full((5, 9), torch.nan), torch.full((5, 6), torch.nan)  # nor need they fit
    assert gather(None, NOT_DUE, *poisoned).numel() == 0


@pytest.mark.parametrize("clock", [0, 9, 10, 11])
def test_the_schedules_next_turn_decides(clock: int) -> None:
    now = replace(NOT_DUE, clock=clock, next=10)
    assert (gather(None, now, *batches(1)[0]).untyped_storage().nbytes() > 0) is (clock >= 10)


def test_a_turn_that_only_looks_at_the_captured_energy_gathers_too() -> None:
    rule = RULE._replace(energy=0.8)
    now = DUE.refreshed(rule, None).ticked()
    assert now.measures(rule)
    pairs = batches(2)
    torch.testing.assert_close(gathered(all_of(pairs, now), (9, 7)), sum(dy.t() @ x for dy, x in pairs))


# -- when one is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_products_add_up(count: int) -> None:
    pairs = batches(count)
    total = gathered(all_of(pairs), (9, 7))
    torch.testing.assert_close(total, sum(dy.t() @ x for dy, x in pairs))
    assert total.dtype == torch.float32


def test_a_carrier_has_no_elements_and_is_told_from_a_matrix() -> None:
    carrier = all_of(batches(2))
    assert carrier.shape == (0,)
    assert is_carrier(carrier)
    assert not is_carrier(torch.zeros(0, 7))
    assert not is_carrier(torch.zeros(9, 7))


def test_each_product_has_its_scale() -> None:
    pairs = batches(2)
    first = gather(None, DUE, *pairs[0], torch.tensor(0.25))
    second = gather(first, DUE, *pairs[1], torch.tensor(-3.0))
    expected = 0.25 * pairs[0][0].t() @ pairs[0][1] - 3 * pairs[1][0].t() @ pairs[1][1]
    torch.testing.assert_close(gathered(second, (9, 7)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_any_dtype_add_up_in_float32(dtype: torch.dtype) -> None:
    pairs = batches(8, dtype=dtype)
    total = gathered(all_of(pairs), (9, 7))
    exact = sum(dy.double().t() @ x.double() for dy, x in pairs)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_default_dtype_of_the_program_does_not_matter() -> None:
    pairs = batches(2)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        total = gathered(all_of(pairs), (9, 7))
    finally:
        torch.set_default_dtype(default)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, sum(dy.t() @ x for dy, x in pairs))


def test_factors_that_are_views_are_taken_as_they_lie() -> None:
    dy, x = torch.randn(9, 5).t(), torch.randn(5, 14)[:, ::2]
    torch.testing.assert_close(gathered(gather(None, DUE, dy, x), (9, 7)), dy.t() @ x)


def test_gathering_on_changes_no_earlier_carrier() -> None:
    pairs = batches(2)
    first = gather(None, DUE, *pairs[0])
    before = gathered(first, (9, 7)).clone()
    gather(first, DUE, *pairs[1])
    assert torch.equal(gathered(first, (9, 7)), before)


def test_the_buffer_goes_with_its_last_reader() -> None:
    first, second = batches(2)
    carrier = gather(None, DUE, *first)
    kept = weakref.ref(carrier.untyped_storage())
    later = gather(carrier, DUE, *second)
    storage = carrier.untyped_storage()._weak_ref()
    del carrier
    gc.collect()
    try:
        assert torch.UntypedStorage._expired(storage)
    finally:
        torch.UntypedStorage._free_weak_ref(storage)
    assert kept() is None
    assert later.untyped_storage().nbytes() == 4 * 9 * 7


@pytest.mark.parametrize("step", ["gathering on", "the refresh"])
def test_a_refresh_that_came_due_after_the_backward_is_an_error_with_a_remedy(step: str) -> None:
    dy, x = batches(1)[0]
    empty = gather(None, NOT_DUE, dy, x)
    with pytest.raises(RuntimeError, match=r"a refresh of a \(9, 7\) weight is due.*change it between steps"):
        gather(empty, DUE, dy, x) if step == "gathering on" else gathered(empty, (9, 7))


# -- as an operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [DUE, NOT_DUE], ids=["due", "not due"])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5)], ids=["plain", "scaled"])
def test_the_operator_keeps_pytorchs_rules(now: Schedule, scale: Tensor | None) -> None:
    dy, x = batches(1)[0]
    # opcheck clones its arguments, and a clone of a carrier that holds a buffer holds none
    for carried in (None,) if now is DUE else (None, gather(None, now, dy, x)):
        torch.library.opcheck(gather_gradient, (carried, now.to_tensor(), dy, x, scale))


# -- under a refresh --------------------------------------------------------------------------------------------------


def refreshed(shape: tuple[int, int], factors: list[Tensor], method: str, **how: Any) -> tuple[Tensor, Tensor]:
    """(projector, R) after a due refresh from these factors."""
    rank, side = 4, side_of(shape)
    low = torch.zeros((shape[0], rank) if side == "right" else (rank, shape[1]))
    stored = [torch.zeros((rank, shape[1]) if side == "right" else (shape[0], rank))]
    torch.ops.qgalore.refresh_(
        low,
        stored,
        DUE.to_tensor(),
        RULE.to_tensor(),
        factors,
        how.get("scales"),
        shape=list(shape),
        rank=rank,
        format="float32",
        method=method,
        power_iterations=2,
        seed=0,
        param=0,
    )
    return stored[0], low


@pytest.mark.parametrize("shape", [(40, 28), (28, 40)])
@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("tokens", [3, 5, 30])
def test_gathered_and_given_gradients_refresh_alike(shape: tuple[int, int], method: str, tokens: int) -> None:
    """The subspace of G where G has more directions than the rank; else its directions, and any completion."""
    pairs = [(torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])) for _ in range(2)]
    gradient = sum(dy.t() @ x for dy, x in pairs)
    assert isinstance(gradient, Tensor)
    expected, low = refreshed(shape, [gradient], method)
    carrier = all_of(pairs)
    found, other = refreshed(shape, [carrier], method)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(other, low, rtol=0, atol=1e-3)
    torch.testing.assert_close(other, project(gradient, found, side_of(shape)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(40, 28), (28, 40)])
@pytest.mark.parametrize("tokens", [2, 30])
def test_scaled_factors_refresh_as_their_scaled_gradient(shape: tuple[int, int], tokens: int) -> None:
    dy, x = torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])
    gradient = -0.3 * dy.t() @ x
    expected, low = refreshed(shape, [gradient], "svd")
    found, other = refreshed(shape, [dy, x], "svd", scales=[torch.tensor(-0.3)])
    assert float(other.square().sum()) == pytest.approx(float(low.square().sum()), rel=1e-4)
    torch.testing.assert_close(other, project(gradient, found, side_of(shape)), rtol=0, atol=1e-3)
    if tokens > 4:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_gathered_gradient_that_is_not_finite_keeps_the_projector_and_shows_in_r() -> None:
    dy, x = torch.randn(5, 40), torch.randn(5, 28)
    dy[2, 3] = torch.inf
    projector, low = refreshed((40, 28), [all_of([(dy, x)] * 2)], "svd")
    assert not projector.any()
    assert low.isnan().all()
