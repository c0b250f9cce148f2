"""Dynamic blocks in four bits: bitsandbytes' map, and how near an update stays whose moments are in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from formats_support import grouped
from torch import Tensor

from qgalore_compile.formats import Format
from qgalore_compile.formats.codebook import Codebook
from qgalore_compile.subspace.moments import MomentFormats

BETAS = (0.9, 0.999)


def entries(text: str) -> Tensor:
    form = Format.parse(text)
    assert isinstance(form, Codebook)
    return torch.tensor(form.entries, dtype=torch.float64)


def test_the_signed_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(True, 3, 4).unique()  # filled up with zeros to 256
    torch.testing.assert_close(entries("dynamic4").float(), theirs, rtol=1e-6, atol=0)


def test_the_unsigned_map_is_that_of_bitsandbytes_with_the_lowest_decade_s_end_in_place_of_zero() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(False, 3, 4).unique()
    assert theirs[0] == 0
    found = entries("dynamic4+unsigned").float()
    torch.testing.assert_close(found[1:], theirs[1:], rtol=1e-6, atol=0)
    assert 0 < float(found[0]) < float(found[1])
    assert float(found[0]) == pytest.approx(1e-3)


@pytest.mark.parametrize("text", ["dynamic4/4", "dynamic4/4+unsigned"])
def test_the_code_is_that_of_the_nearest_entry(text: str) -> None:
    form, table = grouped(text), entries(text)
    unit = torch.linspace(float(table[0]), 1.0, 10_001)
    x = torch.stack([unit, *3 * [torch.ones_like(unit)]], dim=-1)
    codes = form.codes(form.encode(x), x.shape)[:, 0].long()
    distances = (unit.double()[:, None] - table).abs()
    excess = distances.gather(-1, codes[:, None])[:, 0] - distances.amin(-1)
    assert float(excess.max()) < 1e-7  # at a middle either
    assert codes.unique().tolist() == list(range(16))


def test_a_block_of_the_second_moment_has_no_zero_unless_it_is_all_zeros() -> None:
    form = grouped("dynamic4/128+unsigned")
    x = torch.zeros(3, 128)
    x[0, 5] = 7.0
    x[1] = torch.logspace(-12, 0, 128)
    back = form.decode(form.encode(x), x.shape)
    assert back[:2].gt(0).all()
    assert not back[2].any()


# -- as Adam's moments ------------------------------------------------------------------------------------------------


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Values of blocks of 128 by a table of entries, ascending, in float64."""
    blocks = x.double().reshape(-1, 128)
    absmax = blocks.abs().amax(-1, keepdim=True)
    place = torch.bucketize((blocks / absmax).contiguous(), (table[1:] + table[:-1]) / 2)
    return (table[place] * absmax).reshape(x.shape)


def linear_v(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As torchao's 4-bit optimizers store them: m by the same map, v by sixteen equal steps without zero."""
    return nearest(m, entries("dynamic4")), nearest(v, torch.linspace(0, 1, 17, dtype=torch.float64)[1:])


def in_4_bits(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As moments="4bit" stores them."""
    form = MomentFormats.parse("4bit")
    first, second = form.decode(form.encode(m.float(), v.float()), m.shape)
    return first.double(), second.double()


GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(64, 128),
    "heavy tails": lambda: torch.distributions.StudentT(2.0).sample((64, 128)),
    "normal, of unlike elements": lambda: torch.randn(64, 128) * torch.logspace(-2, 0, 128),
    "heavy tails, of unlike elements": lambda: (
        torch.distributions.StudentT(2.0).sample((64, 128)) * torch.logspace(-2, 0, 128)
    ),
}


def moments(gradient: Callable[[], Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Adam's, in float64, without bias correction."""
    m = v = torch.zeros(64, 128, dtype=torch.float64)
    for _ in range(steps):
        g = gradient().double()
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    return m, v


def update_error(m: Tensor, v: Tensor, stored: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], steps: int) -> float:
    """‖N(stored) - N‖ / ‖N‖."""
    first, second = (1 - beta**steps for beta in BETAS)

    def update(m: Tensor, v: Tensor) -> Tensor:
        return m / first / ((v / second).sqrt() + 1e-8)

    exact = update(m, v)
    return float((update(*stored(m, v)) - exact).norm() / exact.norm())


@pytest.mark.parametrize("steps", [10, 200])
@pytest.mark.parametrize("name", GRADIENTS)
def test_an_update_is_as_near_as_with_v_in_sixteen_equal_steps(name: str, steps: int) -> None:
    """Of moments that are stored once: where v is much the same in a block 4 % less near, elsewhere nearer by far."""
    m, v = moments(GRADIENTS[name], steps)
    ours, theirs = (update_error(m, v, each, steps) for each in (in_4_bits, linear_v))
    assert ours <= (1.04 if name == "normal" else 0.66) * theirs
