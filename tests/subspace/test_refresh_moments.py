"""The refresh op and moments that follow the projector, from a stand-in on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from refresh_support import FLOAT, INT4, Layer, both_sides, no_convergence, project_old
from torch import Tensor

from qgalore_compile.formats import Format
from qgalore_compile.subspace.finder import METHODS
from qgalore_compile.subspace.moments import change_of_basis, rotated
from qgalore_compile.subspace.refresh import Moments
from qgalore_compile.subspace.scheduler import Schedule

BETAS = (0.9, 0.999)


def with_moments(shape: tuple[int, int], how: str, form: Format = INT4, **settings: Any) -> Layer:
    layer = Layer(shape, 4, form, gap=2, **settings)
    m = torch.randn(layer.low.shape)
    layer.moments = Moments(
        [m, m.square() * 2], torch.tensor(7.0), how, torch.tensor(BETAS, dtype=torch.float64), "32bit"
    )
    return layer


def stored(layer: Layer) -> list[Tensor]:
    assert layer.moments is not None
    return [tensor.clone() for tensor in layer.moments.stored]


@both_sides
@pytest.mark.parametrize("how", ["reset", "rotate"])
@pytest.mark.parametrize("form", [INT4, FLOAT], ids=["int4", "float"])
def test_moments_follow_every_refresh_but_the_first_and_nothing_else(
    shape: tuple[int, int], how: str, form: Format
) -> None:
    layer = with_moments(shape, how, form)
    kept = stored(layer)
    for grad in (torch.randn(shape), torch.randn(shape), torch.full(shape, torch.nan)):  # first; not due; not finite
        layer.call(grad)
        assert all(map(torch.equal, kept, stored(layer)))
    old = layer.projector.clone()
    layer.call(torch.randn(shape))
    if how == "reset":
        assert not any(bool(moment.any()) for moment in stored(layer))
        return
    change = change_of_basis(old, layer.projector, layer.side)  # of the stored projectors
    expected = rotated(kept[0], kept[1], change, layer.side, updates=7, betas=BETAS)
    assert all(map(torch.equal, expected, stored(layer)))


def test_a_refresh_that_fails_leaves_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = with_moments((23, 12), "rotate")
    layer.call(torch.randn(23, 12))
    layer.call(torch.randn(23, 12))
    kept = stored(layer)
    monkeypatch.setattr(torch.linalg, "svd", no_convergence)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", no_convergence)
    layer.call(torch.randn(23, 12))
    assert layer.now.failures == 2
    assert all(map(torch.equal, kept, stored(layer)))


# -- a stand-in before the first refresh ------------------------------------------------------------------------------


def waiting(shape: tuple[int, int], **settings: Any) -> Layer:
    """A layer whose first refresh is its third call."""
    layer = with_moments(shape, settings.pop("how", "rotate"), **settings)
    layer.schedule = Schedule.first(10, 5, slot=2).to_tensor()
    return layer


@both_sides
@pytest.mark.parametrize("how", ["reset", "rotate"])
def test_moments_follow_the_first_refresh_after_a_stand_in_and_its_similarity_does_not_count(
    shape: tuple[int, int], how: str
) -> None:
    layer = waiting(shape, how=how)
    kept = stored(layer)
    layer.call(torch.randn(shape))
    assert (layer.now.next, layer.now.refreshes) == (2, 0)
    layer.call(torch.randn(shape))
    assert all(map(torch.equal, kept, stored(layer)))
    old = layer.projector
    layer.call(torch.randn(shape))
    assert (layer.now.refreshes, layer.now.similarities) == (1, ())
    expected = [torch.zeros_like(kept[0])] * 2
    if how == "rotate":
        change = change_of_basis(old, layer.projector, layer.side)
        expected = list(rotated(kept[0], kept[1], change, layer.side, updates=7, betas=BETAS))
    assert all(map(torch.equal, expected, stored(layer)))


@both_sides
@pytest.mark.parametrize("method", METHODS)
def test_the_first_refresh_after_a_stand_in_is_as_good_as_one_without(shape: tuple[int, int], method: str) -> None:
    """With "power" too: a step from a sketch of another gradient would find less."""
    layer, grad = waiting(shape, method=method), torch.randn(shape)
    layer.call(torch.randn(shape))
    layer.call(torch.randn(shape))
    project_old(layer, grad)
    layer.call(grad)
    other = Layer(shape, 4, INT4, method)
    other.schedule = replace(Schedule.first(10, 5), clock=2).to_tensor()
    other.call(grad)
    assert torch.equal(layer.projector, other.projector)
    assert torch.equal(layer.low, other.low)


@pytest.mark.parametrize("how", ["reset", "rotate"])
def test_where_no_stand_in_was_found_the_first_refresh_leaves_the_moments(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = waiting((23, 12), how=how)
    kept = stored(layer)
    with monkeypatch.context() as broken:
        broken.setattr(torch.linalg, "cholesky_ex", no_convergence)
        layer.call(torch.randn(23, 12))
    assert (layer.now.next, layer.now.failures, layer.now.stands_in) == (0, 2, True)
    assert not layer.projector.any()
    layer.call(torch.full((23, 12), torch.nan))
    layer.call(torch.randn(23, 12))
    assert (layer.now.refreshes, layer.now.last) == (1, 2)
    assert all(map(torch.equal, kept, stored(layer)))
