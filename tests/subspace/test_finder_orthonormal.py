"""Every projector is orthonormal to 1e-5, whatever the gradient's condition, rank, scale and type are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from subspace_support import assert_orthonormal, captured, seeds, shapes, with_spectrum
from torch import Tensor

from qgalore_compile import rng
from qgalore_compile.subspace.finder import METHODS, full_gradient, leading_subspace, sketched_subspace
from qgalore_compile.subspace.projection import project, side_of

WAYS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "power, ordered": {"method": "power", "ordered": True},
    "power, in place of what failed": {"method": "power", "exact": False},
    "randomized, four times": {"method": "randomized", "power_iterations": 4, "exact": False},
}


def found(way: str, factors: list[Tensor], rank: int, old: Tensor) -> Tensor:
    """By a way of finding it; "power" starts from ``old`` and R in the gradient's dtype."""
    side = side_of(full_gradient(factors).shape)
    if way == "sketch":
        return sketched_subspace(factors, rank, side)
    low = None
    if way.startswith("power"):
        dtype = factors[0].dtype
        low = project(full_gradient(factors).to(dtype), old.to(dtype), side).float()
    return leading_subspace(factors, rank, side, low=low, **WAYS[way])


def old_projector(shape: tuple[int, int], rank: int) -> Tensor:
    columns = torch.linalg.qr(torch.randn(min(shape), rank))[0]
    return columns.t() if side_of(shape) == "right" else columns


def decades(shape: tuple[int, int], count: float) -> Tensor:
    """A gradient whose singular values fall by that many powers of ten."""
    return with_spectrum(shape, torch.logspace(0, -count, min(shape), dtype=torch.float64))


@settings(max_examples=3 * settings().max_examples)
@given(
    way=st.sampled_from([*WAYS, "sketch"]),
    shape=shapes,
    rank=st.integers(1, 60),
    fall=st.sampled_from([0.0, 2.0, 2.5, 2.75, 3.0, 4.0, 5.0, 5.5, 6.0, 7.0, 12.0]),
    lost=st.integers(0, 10),
    scale=st.sampled_from([1e-38, 1e-30, 1e-10, 1.0, 1e15, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    given_as=st.sampled_from(["G", "factors", "few factors"]),
    seed=seeds,
)
@example("power", (10, 10), 10, 2.75, 0, 1.0, torch.float32, "G", 0)
def test_a_projector_is_orthonormal(
    way: str,
    shape: tuple[int, int],
    rank: int,
    fall: float,
    lost: int,
    scale: float,
    dtype: torch.dtype,
    given_as: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rank = min(rank, *shape)
    scale = scale if dtype != torch.float16 else 1.0  # it has no such numbers
    kept = max(1, min(shape) - lost)
    values = torch.logspace(0, -fall, kept, dtype=torch.float64)
    if given_as == "G":
        factors = [(with_spectrum(shape, values) * scale).to(dtype)]
    else:
        tokens = kept if given_as == "factors" else min(kept, 3)
        dy = torch.randn(tokens, shape[0]) * values[:tokens, None].float()
        factors = [(dy * scale).to(dtype), torch.randn(tokens, shape[1]).to(dtype)]
    assert_orthonormal(found(way, factors, rank, old_projector(shape, rank)), shape)


@pytest.mark.parametrize("way", [*WAYS, "sketch"])
@pytest.mark.parametrize("size", [10, 40, 150])
@pytest.mark.parametrize("fall", [2.5, 2.75, 3.0, 4.5, 5.0, 5.5, 6.0])  # power squares them
def test_a_full_rank_of_ill_conditioned_directions_is(way: str, size: int, fall: float) -> None:
    """Where nothing counts as rounding yet, and a Gram matrix in float64 has lost ten digits and more."""
    for seed in range(5):
        torch.manual_seed(seed)
        grad = decades((size, size), fall)
        assert_orthonormal(found(way, [grad], size, old_projector((size, size), size)), (size, size))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("way", [*WAYS, "sketch"])
def test_scale_changes_no_subspace(way: str, scale: float) -> None:
    torch.manual_seed(1)
    grad, old = decades((60, 90), 3), old_projector((60, 90), 8)
    one, other = (found(way, [grad * size], 8, old) for size in (1.0, scale))
    torch.testing.assert_close(other @ other.t(), one @ one.t(), rtol=0, atol=1e-3)


def test_power_from_a_projector_that_catches_nothing_looks_for_another_one() -> None:
    """A gradient that has turned to where the old projector is blind."""
    columns = torch.linalg.qr(torch.randn(40, 8))[0]
    grad = columns[:, :4] @ torch.diag(torch.tensor([4.0, 3, 2, 1])) @ torch.randn(4, 60)
    low = torch.zeros(4, 60)
    caught = captured(grad, leading_subspace([grad], 4, "left", method="power", low=low))
    assert caught == pytest.approx(float(grad.double().square().sum()), rel=1e-5)


# -- independent draws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["randomized", "sketch"])
def test_a_completion_is_drawn_independently_of_the_sketch(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    normal = rng.normal

    def kept(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(normal(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(rng, "normal", kept)
    grad = torch.randn(200, 3) @ torch.randn(3, 300)  # rank 3: five directions of eight are drawn
    found(which, [grad], 8, torch.empty(0))
    assert [tuple(draw.shape)[1] for draw in drawn] == [24 if which == "randomized" else 8, 5]
    sketch, completion = (draw.flatten()[: 200 * 5] for draw in drawn)
    assert abs(float(sketch @ completion)) / 1000 < 5 / 1000**0.5  # five standard deviations
