"""8-bit moments make no update that float moments could not make, however unlike the elements of a block are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels_support import Evaluated
from support import Interpreted, stored_moments
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.formats import BLOCK_SIZE
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.subspace.moments import MomentFormats, follow_, least_root

IN_8_BITS = MomentFormats.parse("8bit")

NINE_DECADES = torch.logspace(-9, 0, BLOCK_SIZE)
BETAS = (0.9, 0.999)
MOST = 10.0
"""Learning rates that an element may move by in a step: 1 / κ is 7.27 at the default betas, float moments of gradients
like these make 1.2."""

Pattern = Callable[[int], Tensor]
"""A step, from 1 on, to the gradients of that step."""


def present_every(period: int, rows: int = 16) -> Pattern:
    """Gradients over nine decades within each block, which are zero but for every ``period``-th step."""
    generator = torch.Generator().manual_seed(period)

    def gradients(step: int) -> Tensor:
        drawn = torch.randn(rows, BLOCK_SIZE, generator=generator) * NINE_DECADES
        return drawn if step % period == 0 else torch.zeros_like(drawn)

    return gradients


def rare_rows(rows: int = 16) -> Pattern:
    """Blocks of four rows of an embedding, each row with its own share of the steps: from all down to one in 250."""
    generator = torch.Generator().manual_seed(5)
    often = torch.logspace(0, -2.4, 4 * rows)[torch.randperm(4 * rows, generator=generator)]

    def gradients(step: int) -> Tensor:
        here = (torch.rand(4 * rows, generator=generator) < often).float()
        drawn = torch.randn(4 * rows, BLOCK_SIZE // 4, generator=generator) * here[:, None]
        return drawn.view(rows, BLOCK_SIZE)

    return gradients


def bursts(every: int, times: float) -> Pattern:
    """All gradients are that many times as large in a step now and then: √v remembers them for long, m does not."""
    calm = present_every(1)
    return lambda step: calm(step) * (times if step % every == every // 2 else 1.0)


def one_huge(rows: int = 16) -> Pattern:
    """One element of each block has a gradient now and then, 10⁷ times the others'."""
    generator = torch.Generator().manual_seed(6)

    def gradients(step: int) -> Tensor:
        drawn = torch.randn(rows, BLOCK_SIZE, generator=generator) * 1e-7
        drawn[:, 3] = 1.0 if step % 40 == 3 else 0.0
        return drawn

    return gradients


def sign_flips(rows: int = 16) -> Pattern:
    """The large elements of a block change sign at every step, so that their m is small beside their √v."""
    return lambda step: torch.where(NINE_DECADES > 1e-4, (-1.0) ** step, 1.0).expand(rows, -1) * NINE_DECADES


PATTERNS: dict[str, Callable[[], Pattern]] = {
    "every step": lambda: present_every(1),
    "every second step": lambda: present_every(2),
    "every third step": lambda: present_every(3),
    "every tenth step": lambda: present_every(10),
    "rare rows": rare_rows,
    "bursts": lambda: bursts(50, 1e6),
    "one burst": lambda: bursts(10_000, 1e6),
    "one huge element": one_huge,
    "sign flips": sign_flips,
}


def largest_moves(
    pattern: Pattern, steps: int, *, betas: tuple[float, float] = BETAS, moments: str = "8bit", **group: Any
) -> list[float]:
    """The largest movement of an element in each step, in learning rates."""
    p = nn.Parameter(torch.zeros(pattern(1).shape))
    opt = qg.QGaLoreAdamW([{"params": [p], **group}], lr=1.0, betas=betas, moments=moments)
    found = []
    for step in range(1, steps + 1):
        p.data.zero_()
        p.grad = pattern(step)
        opt.step()
        found.append(float(p.detach().abs().max()))
    return found


@pytest.mark.parametrize("name", PATTERNS)
def test_no_element_moves_by_more_than_ten_learning_rates(name: str) -> None:
    coded, full = (max(largest_moves(PATTERNS[name](), 150, moments=moments)) for moments in ("8bit", "32bit"))
    assert full <= MOST  # or it is the pattern that asks for more
    assert 0.3 < coded <= MOST


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.95, 0.999), (0.5, 0.9), (0.9, 0.9999), (0.99, 0.999)])
@pytest.mark.parametrize("name", ["every step", "every third step", "bursts"])
def test_nor_does_it_at_other_betas(name: str, betas: tuple[float, float]) -> None:
    assert 0.1 < max(largest_moves(PATTERNS[name](), 100, betas=betas)) <= MOST


@pytest.mark.parametrize("period", [1, 2, 3])
def test_without_momentum_coded_moments_stay_near_float_ones(period: int) -> None:
    """Where 1 / κ is 31.6, the least code alone holds √v: gradients that m takes as they are make 7 in float32 too."""
    coded, full = (
        max(largest_moves(present_every(period), 100, betas=(0.0, 0.999), moments=moments))
        for moments in ("8bit", "32bit")
    )
    assert coded <= 2 * full


def test_nor_where_m_remembers_longer_than_v() -> None:
    """β1² ≥ β2: there is no κ, and the least code alone holds √v."""
    assert least_root((0.99, 0.9)) == 0.0
    assert max(largest_moves(present_every(3), 100, betas=(0.99, 0.9))) <= MOST


@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("shape", [(256, 24), (24, 256)], ids=["right", "left"])
def test_a_projected_gradient_s_update_is_bounded_through_changes_of_projector(
    how: str, shape: tuple[int, int]
) -> None:
    """N, read back by projecting the movement, whose projector has orthonormal vectors."""
    sizes = torch.logspace(-9, 0, max(shape))
    along = sizes[:, None] if shape[0] > shape[1] else sizes
    p = nn.Parameter(torch.zeros(shape))
    group: dict[str, Any] = dict(rank=8, quant=False, scale=1.0, update_proj_gap=5, stagger=False, max_gap=5)
    opt = qg.QGaLoreAdamW([{"params": [p], "moments_on_refresh": how, **group}], lr=1.0)
    worst = 0.0
    for step in range(40):
        p.data.zero_()
        p.grad = torch.randn(shape) * along * (step % 3 == 0)
        opt.step()
        moved, projector = p.detach(), opt.state[p]["projector"]
        low = moved @ projector.t() if shape[0] > shape[1] else projector.t() @ moved
        worst = max(worst, float(low.abs().max()))
    assert opt.schedule()[0].refreshes > 4
    assert 0.3 < worst <= MOST


# -- the bound --------------------------------------------------------------------------------------------------------

orders = st.floats(-9, 3)
betas_ = st.sampled_from([BETAS, (0.9, 0.95), (0.8, 0.99), (0.5, 0.9), (0.95, 0.999), (0.9, 0.9999), (0.0, 0.9)])


@dataclass(frozen=True)
class Element:
    """Gradients of an element: of what size, how often, and how likely the sign is to change."""

    order: float
    period: int
    phase: int
    flips: float
    later: float

    def at(self, step: int) -> float:
        """Its gradient, whose size is ``later`` orders of magnitude another from step 20 on."""
        if step % self.period != self.phase % self.period:
            return 0.0
        sign = -1.0 if np.random.default_rng(hash((self, step)) % 2**32).random() < self.flips else 1.0
        return sign * 10.0 ** (self.order + (self.later if step > 20 else 0.0))


elements = st.builds(
    Element,
    orders,
    st.integers(1, 7),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([0.0, 0.0, -3.0, 1.0, 3.0]),
)


@given(st.lists(elements, min_size=2, max_size=12), betas_, st.integers(0, 40))
def test_no_element_moves_further_than_gradients_can_make_float_moments_move_it(
    drawn: list[Element], betas: tuple[float, float], zeros: int
) -> None:
    """At most √(1 - β2ᵗ) / ((1 - β1ᵗ) κ) in step t, whatever the block; and what has no gradient does not move."""
    shape = (1, len(drawn) + zeros + 4096)  # enough for 8 bits: more blocks, of zeros alone

    def gradients(step: int) -> Tensor:
        values = torch.zeros(shape)
        values[0, : len(drawn)] = torch.tensor([each.at(step) for each in drawn])
        return values

    for step, moved in enumerate(largest_moves(gradients, 40, betas=betas), 1):
        corrected = math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
        assert moved <= corrected / least_root(betas) * (1 + 1e-5)


@given(st.lists(elements, min_size=1, max_size=12), betas_)
def test_float_moments_obey_it_by_themselves(drawn: list[Element], betas: tuple[float, float]) -> None:
    m, v = np.zeros(len(drawn)), np.zeros(len(drawn))
    for step in range(1, 60):
        grad = np.array([each.at(step) for each in drawn])
        m, v, _ = oracle.adam(m, v, grad, step=step, betas=betas, eps=1e-30)
        assert (least_root(betas) * np.abs(m) <= np.sqrt(v) * (1 + 1e-9)).all()


@pytest.mark.parametrize("betas", [BETAS, (0.9, 0.95), (0.0, 0.9), (0.5, 0.3), (0.99, 0.999), (0.9, 0.5), (0.9, 0.0)])
def test_it_is_the_least_that_holds(betas: tuple[float, float]) -> None:
    """Of the gradients that Cauchy and Schwarz name, summed up."""
    assert math.isclose(least_root(betas) ** 2, oracle.least_square(betas), rel_tol=1e-9, abs_tol=0.0)


# -- what is stored ---------------------------------------------------------------------------------------------------


@given(st.lists(orders, min_size=1, max_size=300), st.integers(0, 2**16))
def test_no_second_moment_is_zero_in_a_block_that_has_one(found: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    root = 10.0 ** torch.tensor(found, dtype=torch.float32) * torch.rand(len(found)).round()
    _, v = IN_8_BITS.decode(IN_8_BITS.encode(torch.zeros_like(root), root.square(), root=root), root.shape)
    blocks = root.split(BLOCK_SIZE)
    for block, stored in zip(blocks, v.sqrt().split(BLOCK_SIZE), strict=True):
        assert bool((stored > 0).all()) is bool(block.any())
        # half of a step of the map: of its seven decades the lowest has two entries, the highest 128
        near = 0.75 * block + 3.3e-7 * block.max()
        assert bool(((stored - block).abs() <= near).all())


@pytest.mark.parametrize("how", ["rotate", "reset"])
def test_blocks_of_zeros_alone_stay_zeros(how: str) -> None:
    zeros = torch.zeros(8, 70)
    stored = IN_8_BITS.encode(zeros, zeros)
    projectors = (torch.linalg.qr(torch.randn(20, 8))[0] for _ in range(2))
    follow_(stored, how, *projectors, "left", updates=3, betas=BETAS, shape=zeros.shape, formats=IN_8_BITS)
    assert not any(value.any() for value in IN_8_BITS.decode(stored, zeros.shape))
    assert max(largest_moves(lambda _: torch.zeros(16, BLOCK_SIZE), 3)) == 0.0


def test_rotated_moments_obey_the_bound_as_well() -> None:
    """Rotated with |m̂| ≤ √v̂, which is stricter at any step."""
    m = torch.randn(8, 300) * torch.logspace(-9, 0, 300)
    stored = IN_8_BITS.encode(m, m.square() * 1e-3)
    old, new = (torch.linalg.qr(torch.randn(20, 8))[0] for _ in range(2))
    follow_(stored, "rotate", old, new, "left", updates=200, betas=BETAS, shape=m.shape, formats=IN_8_BITS)
    found, v = IN_8_BITS.decode(stored, m.shape)
    # 2: of m's lowest code, in which half of an entry is rounded up to one
    lowest = 5.5e-7 * torch.repeat_interleave(stored[1], BLOCK_SIZE)[: m.numel()].view_as(m)
    assert bool((least_root(BETAS) * (found.abs() - 2 * lowest) <= 2 * v.sqrt()).all())


# -- compiled ---------------------------------------------------------------------------------------------------------


class InTriton(Evaluated):
    """A program in Triton's interpreter, in the place of a compiled kernel."""

    def __call__(self, tensors: dict[str, Tensor], numbers: Sequence[int]) -> None:
        import interpreted

        from qgalore_compile.kernels.triton.kernels import region_kernel

        names = zip(self.program.numbers, numbers, strict=True)
        interpreted.launch(region_kernel(self.program), tensors, dict(names))


KERNELS = [
    pytest.param(Evaluated, id="evaluated"),
    pytest.param(lambda text: cpu.Kernel(BlockProgram.parse(text)), id="C++"),
    pytest.param(InTriton, id="Triton", marks=pytest.mark.triton),
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_compiled_update_is_bounded_and_the_eager_one(kernel: Any) -> None:
    """An embedding large enough for a program of its own: its steps in a generated kernel, each from eager's state."""
    if kernel is InTriton:
        pytest.importorskip("triton")
    pattern, made = present_every(3, rows=256), []

    def remembered(text: str) -> Any:
        made.append(text)
        return kernel(text)

    weights = [nn.Parameter(torch.zeros(256, BLOCK_SIZE)) for _ in range(2)]
    eager, other = (qg.QGaLoreAdamW([p], lr=1.0) for p in weights)
    compiled = torch.compile(other.step, backend=Interpreted(), fullgraph=True)
    with mock.patch.object(cpu, "kernel", remembered):
        for step in range(1, 8):
            grad = pattern(step)
            for p in weights:
                p.data.zero_()
                p.grad = grad.clone()
            eager.step()
            compiled()
            expected, found = (stored_moments(opt.state[p]) for opt, p in zip((eager, other), weights, strict=True))
            for mine, theirs in zip(found, expected, strict=True):
                if mine.dtype == torch.uint8:
                    assert int((mine.int() - theirs.int()).abs().max()) <= 1
                    assert float((mine != theirs).float().mean()) < 0.002
                else:
                    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
                mine.copy_(theirs)
            moved = weights[1].detach()
            assert float(moved.abs().max()) <= MOST
            torch.testing.assert_close(moved, weights[0].detach(), rtol=1e-5, atol=1e-6)
    assert made
    assert all("dynamic8_code" in text for text in made)
