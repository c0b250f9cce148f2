"""One step of the optimizer against float64 NumPy, from equal state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qgalore_compile as qg


@dataclass(frozen=True)
class Case:
    """An optimizer over one projected and one plain parameter."""

    shape: tuple[int, int] = (24, 16)
    rank: int = 4
    plain: tuple[int, ...] = (7,)
    dtype: torch.dtype = torch.float32
    int8: bool = True
    group_size: int = 16
    quant: bool = True
    bits: int = 4
    moments: str = "8bit"
    rounding: str = "stochastic"
    size: float = 1.0
    zeros: bool = False
    weight_decay: float = 0.1
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    gap: int = 2
    seed: int = 0

    def build(self) -> qg.QGaLoreAdamW:
        weight = torch.randn(self.shape).to(self.dtype)
        plain = nn.Parameter(torch.randn(self.plain).to(self.dtype))
        projected = nn.Parameter(qg.Int8Weight.from_float(weight, self.group_size) if self.int8 else weight)
        group = {
            "params": [projected],
            "rank": self.rank,
            "quant": self.quant,
            "quant_n_bit": self.bits,
            "quant_group_size": self.group_size,
            "update_proj_gap": self.gap,
            "scale": 0.5,
            "rounding": self.rounding,
        }
        return qg.QGaLoreAdamW(
            # the plain parameter first, so that the projected one's position, 1, shows in its random bits
            [{"params": [plain], "weight_decay": 0.02, "rounding": self.rounding}, group],
            lr=0.01,
            betas=self.betas,
            weight_decay=self.weight_decay,
            moments=self.moments,
            max_grad_norm=self.clip,
            seed=self.seed,
        )


def gradients(case: Case, opt: qg.QGaLoreAdamW) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            grad = torch.zeros(p.shape) if case.zeros else torch.randn(p.shape) * case.size
            p.grad = grad.to(p.dtype)


def numbers(tensor: Tensor) -> oracle.Array:
    """Integers as they are, floats in float64."""
    array = tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor
    return array.numpy().copy()


def values_of(p: Tensor) -> dict[str, oracle.Array]:
    if isinstance(p, qg.Int8Weight):
        return {part: numbers(getattr(p, part)) for part in ("codes", "scale", "offset")}
    return {"value": numbers(p)}


def projector_of(p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> Tensor:
    """The stored projector, decoded by the oracle in float32, in the gradient's dtype."""
    if not group["quant"]:
        return state["projector"].to(p.dtype)
    columns = p.shape[1] if p.shape[0] >= p.shape[1] else min(group["rank"], *p.shape)
    codes = state["projector"].numpy()
    if group["quant_n_bit"] == 4:
        codes = oracle.unpack_int4(codes, columns)
    parts = (state["projector_scale"].numpy(), state["projector_offset"].numpy())
    return torch.from_numpy(oracle.decode_groups(codes, *parts, group["quant_group_size"], np.float32)).to(p.dtype)


def moments_of(state: dict[str, Tensor]) -> list[oracle.Array]:
    if "exp_avg_absmax" not in state:
        return [numbers(state["exp_avg"]), numbers(state["exp_avg_sq"])]
    m, root = (
        oracle.decode_dynamic8(numbers(state[name]), numbers(state[f"{name}_absmax"]), signed=name == "exp_avg")
        for name in ("exp_avg", "exp_avg_sq_root")
    )
    return [m, root**2]


def block_maxima(x: oracle.Array) -> oracle.Array:
    return np.array([np.abs(block).max() for block in oracle.blocks_of(x.reshape(-1))])


def assert_blocks_close(
    actual: oracle.Array, expected: oracle.Array, terms: oracle.Array, what: str, *, extra: Any = 0.0
) -> None:
    """Within 1e-6 of the block's absolute maximum, that of the sum's terms where they cancel, and ``extra``."""
    extra = np.broadcast_to(extra, expected.shape).reshape(-1)
    bound = 1e-6 * np.repeat(block_maxima(terms), 256)[: expected.size] + extra + 1e-38
    error = np.abs(actual - expected).reshape(-1)
    assert (error <= bound).all(), f"{what}: off by {(error / bound).max()} times the bound"


def check_moments(state: dict[str, Tensor], old: list[oracle.Array], new: list[oracle.Array], what: str) -> None:
    second = "exp_avg_sq"
    if f"{second}_root" in state:
        second, old, new = f"{second}_root", [old[0], np.sqrt(old[1])], [new[0], np.sqrt(new[1])]
    for name, before, want in zip(("exp_avg", second), old, new, strict=True):
        terms = np.maximum(np.abs(before), np.abs(want))
        if f"{name}_absmax" not in state:
            assert_blocks_close(numbers(state[name]), want, terms, f"{what} {name}")
            continue
        codes, absmax, ties = oracle.encode_dynamic8(want, signed=name == "exp_avg")
        if name == second:
            codes = codes.clip(min=1)  # never 0, where m may not be
        error = np.abs(numbers(state[f"{name}_absmax"]) - absmax)
        assert (error <= 1e-6 * block_maxima(terms) + 1e-38).all(), f"{what} {name}: absmax is off by {error.max()}"
        oracle.assert_codes_close(numbers(state[name]), codes, f"{what} {name}", ties=ties)


def step_and_check(opt: qg.QGaLoreAdamW) -> None:
    """One step, from whatever state there is, against the table of the algorithm."""
    items = [(group, p) for group in opt.param_groups for p in group["params"]]
    before = [(values_of(p), moments_of(opt.state[p]), int(opt.state[p]["step"])) for _, p in items]
    opt.step()

    # R by torch's own GEMM in the gradient's dtype: the rest is compared given the same GEMM results
    lows, projectors = [], []
    for group, p in items:
        assert p.grad is not None
        if "rank" in group:
            projector = projector_of(p, group, opt.state[p])
            projectors.append(projector)
            lows.append(numbers(p.grad @ projector.t() if p.shape[0] >= p.shape[1] else projector.t() @ p.grad))
        else:
            projectors.append(None)
            lows.append(numbers(p.grad))
    norm = np.sqrt(sum((low**2).sum() for low in lows))
    np.testing.assert_allclose(float(opt.last_grad_norm), norm, rtol=1e-5, atol=1e-38)
    clip = 1.0 if opt.max_grad_norm is None else min(1.0, opt.max_grad_norm / (norm + 1e-6))

    for index, ((group, p), low, projector, (old, moments, steps)) in enumerate(
        zip(items, lows, projectors, before, strict=True)
    ):
        state, lr = opt.state[p], float(group["lr"])
        assert int(state["step"]) == steps + 1
        settings: dict[str, Any] = dict(betas=group["betas"], eps=group["eps"], coded="exp_avg_absmax" in state)
        m, v, update = oracle.adam(*moments, low * clip, step=steps + 1, **settings)
        check_moments(state, moments, [m, v], f"parameter {index}")
        rounding = 0.0
        if projector is not None:
            low_update = torch.from_numpy(update).to(p.dtype)
            right = p.shape[0] >= p.shape[1]
            left_factor, right_factor = (low_update, projector) if right else (projector, low_update)
            update = group["scale"] * numbers(left_factor @ right_factor)
            rounding = numbers(left_factor.abs().double() @ right_factor.abs().double())
            rounding *= 2 * torch.finfo(p.dtype).eps * lr * group["scale"]
        w = old["value"] if "value" in old else oracle.decode_groups(**old, group_size=p.group_size)
        terms = np.abs(w) + np.abs(lr * update)
        w = w - lr * update
        w = w - lr * group["weight_decay"] * w
        new = values_of(p)
        if "value" in new:
            if p.dtype == torch.bfloat16:  # half a step to nearest, less than one by a draw
                rounding = rounding + (2**-8 if group["rounding"] == "nearest" else 2**-7) * np.abs(w)
            assert_blocks_close(new["value"], w, terms, f"parameter {index}", extra=rounding)
            continue
        bits = oracle.random_bits(tuple(p.shape), seed=group["seed"], step=steps + 1, param=index)
        if group["rounding"] == "nearest":
            bits = np.full(p.shape, 2**15 - 1)  # up from one half on
        codes, scale, offset = oracle.encode_groups_sr(w, p.group_size, bits)
        atol = 1e-6 * terms.max() + np.max(rounding)
        np.testing.assert_allclose(new["offset"], offset, rtol=0, atol=atol)
        np.testing.assert_allclose(new["scale"], scale, rtol=0, atol=atol / 100)
        oracle.assert_codes_close(new["codes"], codes, f"parameter {index}")


CASES = {
    "right side": Case(),
    "left side": Case(shape=(16, 24)),
    "square": Case(shape=(31, 31)),
    "one by one": Case(shape=(1, 1), rank=1, plain=(1,)),
    "one row": Case(shape=(1, 37)),
    "one column": Case(shape=(37, 1)),
    "300x700, official group size": Case(shape=(300, 700), rank=32, group_size=256, plain=(65, 64)),
    "431x123": Case(shape=(431, 123), rank=42, group_size=64),
    "6x42": Case(shape=(6, 42), group_size=5),
    "rank above the smaller side": Case(shape=(13, 29), rank=64),
    "float weight": Case(int8=False),
    "written back to nearest": Case(rounding="nearest"),
    "float projector": Case(quant=False),
    "int8 projector": Case(bits=8),
    "moments of 32 bits": Case(moments="32bit"),
    "plain parameter with 8-bit moments": Case(plain=(64, 70)),
    "bf16 int8 weight": Case(shape=(123, 42), dtype=torch.bfloat16),
    "bf16 float weight to nearest": Case(
        shape=(42, 123), dtype=torch.bfloat16, int8=False, plain=(64, 65), rounding="nearest"
    ),
    "bf16 float weight": Case(shape=(42, 123), dtype=torch.bfloat16, int8=False, plain=(64, 65)),
    "clipped": Case(clip=0.5),
    "not clipped": Case(clip=1e6),
    "zero gradient": Case(zeros=True),
    "huge gradient": Case(size=1e15),
    "tiny gradient": Case(size=1e-15),
    "no decay": Case(weight_decay=0.0),
    "no momentum": Case(betas=(0.0, 0.9)),
    "a seed of 64 bits": Case(seed=2**62 + 12345),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_step_is_the_table_s_step(case: Case) -> None:
    opt = case.build()
    for _ in range(4):
        gradients(case, opt)
        step_and_check(opt)


side_lengths = st.one_of(st.integers(1, 48), st.sampled_from([6, 42, 53, 61]))


@given(
    st.builds(
        Case,
        shape=st.tuples(side_lengths, side_lengths),
        rank=st.integers(1, 50),
        plain=st.sampled_from([(1,), (6, 5), (64, 67)]),
        int8=st.booleans(),
        group_size=st.sampled_from([1, 7, 16, 256]),
        quant=st.booleans(),
        moments=st.sampled_from(["8bit", "32bit"]),
        size=st.sampled_from([1e-12, 1e-4, 1.0, 1e6]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        clip=st.sampled_from([None, 0.3]),
        gap=st.integers(1, 3),
        seed=st.integers(0, 2**62),
    ),
    st.integers(0, 2**20),
)
def test_any_setting_takes_the_table_s_step(case: Case, torch_seed: int) -> None:
    torch.manual_seed(torch_seed)
    opt = case.build()
    for _ in range(3):
        gradients(case, opt)
        step_and_check(opt)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=["right", "left"])
def test_the_stored_projector_is_the_quantised_exact_subspace(shape: tuple[int, int]) -> None:
    # a spectrum with gaps, so that single precision finds each vector and not only the subspace
    u, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((shape[0], 12)))
    v, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((shape[1], 12)))
    gradient = (u * 2.0 ** -np.arange(12)) @ v.T
    p = nn.Parameter(torch.zeros(shape))
    opt = qg.QGaLoreAdamW([{"params": [p], "rank": 4, "quant_group_size": 8}])
    p.grad = torch.from_numpy(gradient).float()
    opt.step()
    right = shape[0] >= shape[1]
    exact = oracle.canonical_signs((v if right else u)[:, :4])
    exact = exact.T if right else exact
    width = min(8, exact.shape[1])
    stored = projector_of(p, opt.param_groups[0], opt.state[p]).numpy()
    # half a quantum of a 4-bit group: (max - min) / 15 / 2
    for start in range(0, exact.shape[1], width):
        group = exact[:, start : start + width]
        quantum = (group.max(1) - group.min(1)) / 15
        error = np.abs(stored[:, start : start + width] - group).max(1)
        assert (error <= quantum / 2 + 1e-5).all()


@settings(max_examples=settings().max_examples // 2)
@given(st.integers(0, 2**16), st.booleans())
def test_the_second_moment_of_n_is_taken_before_it_is_quantised_again(seed: int, right: bool) -> None:
    """In the first step |N| is 1 wherever R is not 0, however small R is beside its block's maximum."""
    torch.manual_seed(seed)
    shape = (30, 8) if right else (8, 30)
    p = nn.Parameter(torch.zeros(shape))
    opt = qg.QGaLoreAdamW([{"params": [p], "rank": 8, "quant": False, "scale": 1.0}], lr=1.0, eps=0.0)
    sizes = torch.logspace(-6, 0, 30)
    p.grad = torch.randn(shape) * (sizes[:, None] if right else sizes)
    opt.step()
    projector = opt.state[p]["projector"]
    low_update = -(p @ projector.t() if right else projector.t() @ p)
    torch.testing.assert_close(low_update.abs(), torch.ones_like(low_update), rtol=0, atol=1e-4)
