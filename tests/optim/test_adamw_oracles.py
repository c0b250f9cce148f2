"""Other people's optimizers: galore-torch for the unquantised path, bitsandbytes for 8-bit Adam."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from support import moments_of
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile import formats


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Importing either warns, about what is not ours to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- galore-torch: the whole trajectory -------------------------------------------------------------------------------


@pytest.fixture
def galore_torch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """galore-torch, its singular vectors with canonical signs: a sign is arbitrary, and moments outlive a refresh."""
    with quietly():
        module = pytest.importorskip("galore_torch")
        from galore_torch.galore_projector import GaLoreProjector

    published = GaLoreProjector.get_orthogonal_matrix

    def canonical(self: Any, weights: Tensor, rank: int, type: str) -> Tensor:
        matrix: Tensor = published(self, weights, rank, type)
        along = 1 if type == "right" else 0
        largest = matrix.gather(along, matrix.abs().argmax(along, keepdim=True))
        return matrix * largest.sign()

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", canonical)
    return module


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(4)
    shapes = {"right": (30, 20), "left": (20, 30), "square": (16, 16), "plain": (9, 11), "bias": (13,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def gradient(name: str, p: Tensor, step: int) -> Tensor:
    """Of a low rank that drifts, with noise, and a pull that depends on the parameter: errors would feed back."""
    generator = torch.Generator().manual_seed(hash_of(name) + step)
    noise = torch.randn(p.shape, generator=generator)
    if p.dim() < 2:
        return noise + 0.1 * p.detach()
    base = torch.Generator().manual_seed(hash_of(name))
    left = torch.randn(p.shape[0], 6, generator=base)
    right = torch.randn(6, p.shape[1], generator=base)
    # distinct singular values: what lies in the subspace, and in which order, does not hang on rounding
    spectrum = torch.tensor([9.0, 7.0, 5.5, 4.0, 3.0, 2.0]) * (1 + 0.05 * step / 50)
    return (left * spectrum) @ right + 0.3 * noise + 0.1 * p.detach()


def hash_of(name: str) -> int:
    return sum(name.encode()) * 1000


def groups(params: dict[str, nn.Parameter], weight_decay: float, **keys: Any) -> list[dict[str, Any]]:
    return [
        {"params": [params["right"]], "rank": 4, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std", **keys},
        {"params": [params["plain"], params["bias"]], "weight_decay": weight_decay},
        {
            "params": [params["left"], params["square"]],
            "rank": 5,
            "update_proj_gap": 7,
            "scale": 2.0,
            "proj_type": "std",
            "weight_decay": weight_decay,
            **keys,
        },
    ]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_unquantised_trajectory_equals_galore_s_over_50_steps_with_refreshes(
    galore_torch: ModuleType, weight_decay: float
) -> None:
    ours, theirs = parameters(), parameters()
    # their eps is not divided by sqrt(1 - β2^t); so small, it does not show
    settings: dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-15)
    opt = qg.QGaLoreAdamW(
        groups(ours, weight_decay, quant=False, similarity="official", cos_threshold=1.1), moments="32bit", **settings
    )
    reference = galore_torch.GaLoreAdamW(groups(theirs, weight_decay), no_deprecation_warning=True, **settings)
    for step in range(50):
        for name, p in ours.items():
            p.grad = gradient(name, p, step)
        for name, p in theirs.items():
            p.grad = gradient(name, p, step)
        opt.step()
        reference.step()
        for name, p in ours.items():
            torch.testing.assert_close(
                p, theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name, s=step: f"{n}, step {s}: {m}"
            )
    assert [record.refreshes for record in opt.schedule()] == [5, 8, 8]
    assert [record.gap for record in opt.schedule()] == [10, 7, 7]
    assert all(
        float((p - q).detach().abs().max()) > 0.05 for p, q in zip(ours.values(), parameters().values(), strict=True)
    )


# -- bitsandbytes: single steps from equal state ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bitsandbytes() -> ModuleType:
    with quietly():
        return pytest.importorskip("bitsandbytes")  # type: ignore[no-any-return]


# bitsandbytes' CPU code looks an entry up in a table over 2**16 cells of [-1, 1]; ours is the nearest entry itself
TABLE_CELL = 2 / 2**16


def assert_same_codes_but_for_the_table(mine: Tensor, other: Tensor, exact: oracle.Array, *, signed: bool) -> None:
    """Where the codes differ, the exact value lies within a table's cell of the middle between the two entries."""
    _, absmax, _ = oracle.encode_dynamic8(exact, signed=signed)
    unit = exact.reshape(-1) / np.repeat(absmax, 256)[: exact.size]
    entries = oracle.dynamic_map(signed=signed)
    ours, theirs = (entries[codes.numpy().reshape(-1)] for codes in (mine, other))
    further = np.abs(unit - theirs) - np.abs(unit - ours)
    assert further.min() > -1e-6, "bitsandbytes has a nearer entry"
    assert further.max() <= 2 * TABLE_CELL
    # entries lie closer than that near zero alone
    plain_to_see = np.abs(unit) > 0.01
    assert (ours != theirs)[plain_to_see].mean() < 0.02


def step_both(bnb: ModuleType, steps: int, shape: tuple[int, ...], size: float) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    settings: dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    opt = qg.QGaLoreAdamW([ours], **settings)
    with quietly():
        reference = bnb.optim.Adam8bit([theirs], **settings)
    mine, their_v = opt.state[ours], np.zeros(shape)
    for step in range(steps):
        grad = torch.randn(shape) * size * torch.logspace(-2, 0, shape[-1])
        for p in (ours, theirs):
            p.grad = grad.clone()
            p.data.zero_()  # the update, to all its digits, is then what p holds
        m, v = (value.double().numpy() for value in moments_of(opt, ours))
        adam = partial(oracle.adam, m, grad=grad.double().numpy(), step=step + 1, betas=(0.9, 0.99), eps=1e-8)
        (m, _, update), (_, their_v, their_update) = adam(v=v, coded=True), adam(v=their_v)
        opt.step()
        with quietly():
            reference.step()
        other = reference.state[theirs]
        # theirs keeps v and ours √v: the same Adam divides by either
        for p, expected in ((ours, update), (theirs, their_update)):
            torch.testing.assert_close(p.detach().double(), torch.from_numpy(-0.01 * expected), rtol=1e-5, atol=1e-8)
        unsigned = formats.quantize_dynamic8(torch.from_numpy(their_v).float(), signed=False)
        for codes, absmax, names, exact, signed in (
            (mine["exp_avg"], mine["exp_avg_absmax"], ("state1", "absmax1"), m, True),
            (unsigned.codes, unsigned.absmax, ("state2", "absmax2"), their_v, False),
        ):
            torch.testing.assert_close(absmax, other[names[1]], rtol=1e-5, atol=0)
            assert_same_codes_but_for_the_table(codes, other[names[0]], exact, signed=signed)
        # equal state for the next step: differences would compound
        other["state1"].copy_(mine["exp_avg"])
        other["absmax1"].copy_(mine["exp_avg_absmax"])
        their_v = oracle.decode_dynamic8(other["state2"].numpy(), other["absmax2"].numpy(), signed=False)


@pytest.mark.parametrize("shape", [(64, 64), (64, 70), (4096,), (4099,), (53, 431)])
def test_8_bit_adam_equals_bitsandbytes(bitsandbytes: ModuleType, shape: tuple[int, ...]) -> None:
    step_both(bitsandbytes, 5, shape, 1.0)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_8_bit_adam_equals_bitsandbytes_at_other_scales(bitsandbytes: ModuleType, size: float) -> None:
    step_both(bitsandbytes, 3, (64, 70), size)


@pytest.mark.parametrize(("elements", "eight_bit"), [(4095, False), (4096, True)])
def test_moments_are_of_8_bits_from_as_many_elements_on_as_bitsandbytes_(
    bitsandbytes: ModuleType, elements: int, eight_bit: bool
) -> None:
    ours, theirs = nn.Parameter(torch.randn(elements)), nn.Parameter(torch.randn(elements))
    opt, reference = qg.QGaLoreAdamW([ours]), bitsandbytes.optim.Adam8bit([theirs])
    ours.grad, theirs.grad = torch.randn(elements), torch.randn(elements)
    opt.step()
    with quietly():
        reference.step()
    assert (opt.state[ours]["exp_avg"].dtype == torch.uint8) is eight_bit
    assert (reference.state[theirs]["state1"].dtype == torch.uint8) is eight_bit
