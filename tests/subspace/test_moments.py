"""Moments in a new basis: against float64 NumPy, and what must hold whatever the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qgalore_compile import formats
from qgalore_compile.rng import MOMENT_STREAM, random_bits
from qgalore_compile.subspace.moments import MomentFormats, change_of_basis, follow_, rotated
from qgalore_compile.subspace.projection import Side, project_back

BETAS = (0.9, 0.999)
sides = st.sampled_from(["left", "right"])
seeds = st.integers(0, 2**20)
ranks = st.integers(1, 20)
updates = st.integers(1, 10_000)


def basis(d: int, rank: int, side: Side) -> Tensor:
    columns, _ = torch.linalg.qr(torch.randn(d, rank))
    return columns.contiguous() if side == "left" else columns.t().contiguous()


def moments(rank: int, wide: int, side: Side) -> tuple[Tensor, Tensor]:
    """First and second moment of some updates."""
    shape = (rank, wide) if side == "left" else (wide, rank)
    m = torch.randn(shape)
    return m, m.square() + torch.rand(shape)


def expected(
    m: Tensor, v: Tensor, old: Tensor, new: Tensor, side: Side, count: int, betas: tuple[float, float] = BETAS
) -> tuple[oracle.Array, oracle.Array]:
    """The documented formulas in float64, element by element sums included."""
    a, b, p, q = (each.double().numpy() for each in (m, v, old, new))
    if side == "right":
        a, b, p, q = a.T, b.T, p.T, q.T
    a, b = a / (1 - betas[0] ** count), b / (1 - betas[1] ** count)
    c = q.T @ p
    mean = np.einsum("ij,jk->ik", c, a)
    square = np.einsum("ij,jk->ik", c * c, np.maximum(b - a * a, 0.0)) + mean * mean
    mean, square = mean * (1 - betas[0] ** count), square * (1 - betas[1] ** count)
    return (mean, square) if side == "left" else (mean.T, square.T)


@given(ranks, st.integers(1, 30), sides, updates, seeds, st.sampled_from([BETAS, (0.0, 0.9), (0.5, 0.0)]))
def test_rotation_is_the_documented_one(
    rank: int, wide: int, side: Side, count: int, seed: int, betas: tuple[float, float]
) -> None:
    torch.manual_seed(seed)
    old, new = basis(25, rank, side), basis(25, rank, side)
    m, v = moments(rank, wide, side)
    found = rotated(m, v, change_of_basis(old, new, side), side, updates=count, betas=betas)
    for mine, exact in zip(found, expected(m, v, old, new, side, count, betas), strict=True):
        np.testing.assert_allclose(mine.numpy(), exact, rtol=0, atol=2e-5 * max(1.0, np.abs(exact).max()))


@given(ranks, sides, updates, seeds)
def test_in_another_basis_of_the_same_subspace_the_mean_projects_back_to_the_same(
    rank: int, side: Side, count: int, seed: int
) -> None:
    torch.manual_seed(seed)
    old = basis(25, rank, side)
    turn, _ = torch.linalg.qr(torch.randn(rank, rank))
    new = old @ turn if side == "left" else turn @ old
    m, v = moments(rank, 9, side)
    after, second = rotated(m, v, change_of_basis(old, new, side), side, updates=count, betas=BETAS)
    torch.testing.assert_close(project_back(after, new, side), project_back(m, old, side), rtol=0, atol=1e-4)
    assert bool((second >= 0).all())


@given(ranks, sides, updates, seeds)
def test_permuted_and_reflected_axes_permute_the_moments(rank: int, side: Side, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    order, signs = torch.randperm(rank), torch.randint(0, 2, (rank,)) * 2.0 - 1
    change = torch.eye(rank)[order] * signs
    first, second = (1 - beta**count for beta in BETAS)
    m, v = moments(rank, 9, side)
    v = second * ((m / first).square() + v)  # a variance of at least 0, or it is cut off
    after, square = rotated(m, v, change, side, updates=count, betas=BETAS)
    turned = (m.t() if side == "right" else m) * signs[:, None]
    squares = v.t() if side == "right" else v
    torch.testing.assert_close(after.t() if side == "right" else after, turned[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(square.t() if side == "right" else square, squares[order], rtol=1e-4, atol=1e-6)


@given(ranks, sides, updates, seeds, st.sampled_from([1e-15, 1.0, 1e15]))
def test_the_second_moment_is_never_negative_and_at_least_the_mean_s_square(
    rank: int, side: Side, count: int, seed: int, size: float
) -> None:
    torch.manual_seed(seed)
    m, v = moments(rank, 9, side)
    m, v = m * size, torch.rand_like(v) * m.square() * size**2 * 2  # often below the mean's square
    change = torch.randn(rank, rank)
    after, second = rotated(m, v, change, side, updates=count, betas=BETAS)
    assert bool((second >= 0).all())
    first, other = (1 - beta**count for beta in BETAS)
    assert bool((second / other >= (after / first).square() * (1 - 1e-4)).all())


def stored(m: Tensor, v: Tensor, eight_bit: bool) -> list[Tensor]:
    if not eight_bit:
        return [m.clone(), v.clone()]
    root = formats.quantize_dynamic8(v.sqrt(), signed=False)
    return [
        *formats.quantize_dynamic8(m, signed=True)[:2],
        root.codes.clamp(min=1),
        root.absmax,
    ]


def decoded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    if len(parts) == 2:
        return parts[0].clone(), parts[1].clone()
    return (
        formats.dequantize_dynamic8(parts[0], parts[1], True),
        formats.dequantize_dynamic8(parts[2], parts[3], False).square(),
    )


def how_stored(parts: list[Tensor]) -> dict[str, Any]:
    """What ``follow_`` must know of them."""
    return {"shape": parts[0].shape, "formats": MomentFormats.parse("8bit" if len(parts) == 4 else "32bit")}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("eight_bit", [False, True], ids=["32 bits", "8 bits"])
def test_stored_moments_are_decoded_rotated_and_encoded_in_place(side: Side, eight_bit: bool) -> None:
    old, new = basis(40, 8, side), basis(40, 8, side)
    parts = stored(*moments(8, 70, side), eight_bit)
    exact = expected(*decoded(parts), old, new, side, 7)
    follow_(parts, "rotate", old, new, side, updates=7, betas=BETAS, **how_stored(parts))
    wanted_parts = stored(*(torch.from_numpy(value).float() for value in exact), eight_bit)
    for found, wanted in zip(decoded(parts), decoded(wanted_parts), strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=0, atol=(0.02 if eight_bit else 1e-5) * float(wanted.abs().max())
        )


UNCHANGED: dict[str, dict[str, Any]] = {
    "kept": {"how": "keep", "updates": 7},
    "none yet": {"how": "rotate", "updates": 0},
    "none yet to reset": {"how": "reset", "updates": 0},
}


@pytest.mark.parametrize("case", UNCHANGED.values(), ids=UNCHANGED.keys())
@pytest.mark.parametrize("eight_bit", [False, True])
def test_kept_moments_and_those_without_an_update_stay_bit_for_bit(case: dict[str, Any], eight_bit: bool) -> None:
    parts = stored(*moments(4, 70, "left"), eight_bit)
    before = [part.clone() for part in parts]
    follow_(
        parts, old=basis(9, 4, "left"), new=basis(9, 4, "left"), side="left", betas=BETAS, **how_stored(parts), **case
    )
    assert all(map(torch.equal, parts, before))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_reset_moments_are_those_before_the_first_step(eight_bit: bool) -> None:
    m, v = moments(4, 70, "left")
    parts = stored(m, v, eight_bit)
    follow_(
        parts, "reset", basis(9, 4, "left"), basis(9, 4, "left"), "left", updates=7, betas=BETAS, **how_stored(parts)
    )
    assert all(map(torch.equal, parts, stored(torch.zeros_like(m), torch.zeros_like(v), eight_bit)))


@pytest.mark.parametrize("text", ["4bit", "e4m3/32", "nf4/16"])
def test_the_root_is_right_on_average_and_m_to_nearest(text: str) -> None:
    own = MomentFormats.parse(text)
    m, root = torch.linspace(-0.7, 1, 128), torch.linspace(0.2, 1, 128)  # moment4 has no -1
    sums, nearest = torch.zeros(128), own.decode(own.encode(m, root.square(), root=root), (128,))
    for step in range(400):
        noise = random_bits((128,), seed=0, step=step, param=MOMENT_STREAM)
        found = own.decode(own.encode(m, root.square(), root=root, noise=noise), (128,))
        assert torch.equal(found[0], nearest[0])
        sums += found[1].sqrt()
    five_deviations = 5 * (0.35 / 2) / 400**0.5  # of a mean of 400, where the coarsest map's step is 0.35
    torch.testing.assert_close(sums / 400, root, rtol=0, atol=five_deviations)
    assert (nearest[1].sqrt() - root).abs().max() > (sums / 400 - root).abs().max()


def test_what_is_rounded_to_nearest_alone_takes_no_draws() -> None:
    assert not MomentFormats.parse("8bit").rounds
    assert not MomentFormats.parse("32bit").rounds
    assert MomentFormats.parse("4bit").rounds
