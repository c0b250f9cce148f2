"""Four bits for Adam's moments: the two tables, and how near an update stays whose moments are in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from formats_support import entries
from torch import Tensor

from qgalore_compile.subspace.moments import MomentFormats, least_root

BETAS = (0.9, 0.999)


def test_those_of_m_are_squares_with_either_sign() -> None:
    eighths = torch.arange(-7, 9, dtype=torch.float64) / 8
    assert torch.equal(entries("moment4"), eighths * eighths.abs())


def test_those_of_the_root_lie_ever_closer_and_end_a_32nd_above_zero() -> None:
    found = entries("moment4+unsigned")
    assert float(found[0]) == pytest.approx(10**-1.5)
    ratios = found[1:] / found[:-1]
    assert ratios.diff().lt(0).all()
    assert 1.01 < float(ratios[-1]) < 1.02


# -- as Adam's moments ------------------------------------------------------------------------------------------------

Moments = tuple[Tensor, Tensor]


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Values of blocks of 128 by a table of entries, ascending."""
    absmax = x.abs().amax(-1, keepdim=True)
    place = torch.bucketize((x / absmax).contiguous(), ((table[1:] + table[:-1]) / 2).float())
    return table.float()[place] * absmax


def linear_v(m: Tensor, v: Tensor) -> Moments:
    """As torchao's 4-bit optimizers store them: m by the dynamic map, v by sixteen equal steps without zero."""
    return nearest(m, entries("dynamic4")), nearest(v, torch.linspace(0, 1, 17, dtype=torch.float64)[1:])


def in_4_bits(m: Tensor, v: Tensor) -> Moments:
    """As moments="4bit" stores them, √v rounded stochastically."""
    form = MomentFormats.parse("4bit")
    noise = torch.randint(1 << 16, v.shape, dtype=torch.int32)
    return form.decode(form.encode(m, v, noise=noise), m.shape)


def normal() -> Tensor:
    return torch.randn(16, 128)


def heavy() -> Tensor:
    return torch.distributions.StudentT(2.0).sample((16, 128))


def unlike(drawn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: drawn() * torch.logspace(-2, 0, 128)


GRADIENTS = {
    "normal": normal,
    "heavy tails": heavy,
    "normal, of unlike elements": unlike(normal),
    "heavy tails, of unlike elements": unlike(heavy),
}


def errors(gradient: Callable[[], Tensor], ways: list[Callable[[Tensor, Tensor], Moments]], steps: int) -> list[float]:
    """Mean of ‖N(stored) - N‖ / ‖N‖ over the second half of the steps, moments stored and read in each."""
    (beta1, beta2), zeros = BETAS, torch.zeros(16, 128)
    exact, states, sums = (zeros, zeros), [(zeros, zeros) for _ in ways], [0.0 for _ in ways]

    def moments(old: Moments, g: Tensor) -> Moments:
        return beta1 * old[0] + (1 - beta1) * g, beta2 * old[1] + (1 - beta2) * g * g

    def update(m: Tensor, v: Tensor) -> Tensor:
        return m / (v.sqrt() + 1e-8)  # bias corrections scale all of it

    for step in range(steps):
        g = gradient()
        exact = moments(exact, g)
        for place, stored in enumerate(ways):
            m, v = moments(states[place], g)
            v = torch.maximum(v, (least_root(BETAS) * m).square())
            if step >= steps // 2:
                sums[place] += float((update(m, v) - update(*exact)).norm() / update(*exact).norm())
            states[place] = stored(m, v)
    return sums


@pytest.mark.parametrize("name", GRADIENTS)
def test_over_many_steps_an_update_is_nearer_than_with_v_in_sixteen_equal_steps(name: str) -> None:
    ours, theirs = errors(GRADIENTS[name], [in_4_bits, linear_v], 300)
    assert ours < theirs
    assert ours < 0.9 * theirs or name == "normal"


@pytest.mark.parametrize("name", GRADIENTS)
def test_over_many_steps_an_update_is_nearer_than_in_the_dynamic_map(name: str) -> None:
    def dynamic(m: Tensor, v: Tensor) -> Moments:
        form = MomentFormats.parse("dynamic4")
        noise = torch.randint(1 << 16, v.shape, dtype=torch.int32)
        return form.decode(form.encode(m, v, noise=noise), m.shape)

    ours, theirs = errors(GRADIENTS[name], [in_4_bits, dynamic], 300)
    assert ours < 0.9 * theirs
