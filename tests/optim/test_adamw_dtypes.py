"""What state is made of, whatever PyTorch's defaults are, how far it counts, and what parameters may be made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import Interpreted, snapshot, toy
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile import formats, rng
from qgalore_compile.optim.placement import dtype_of

defaults = pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
settings = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moments": "32bit", "quant": False, "refresh": "svd"},
        {
            "refresh": "power",
            "moments_on_refresh": "rotate",
            "trigger": "energy",
            "quant_n_bit": 8,
            "weight_decay": 0.1,
        },
        {"moments_on_refresh": "reset", "max_grad_norm": 0.1, "nonfinite": "skip_parameter"},
    ],
    ids=["defaults", "plain GaLore", "all that varies", "reset, clipped"],
)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(was)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].nan_to_num(7e7), b[name].nan_to_num(7e7)) for name in a
    )


def trained(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State after seven steps of given gradients."""
    for index in range(7):
        draw = torch.Generator().manual_seed(index)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float32)
        opt.step()
    return snapshot(model, opt)


@defaults
@settings
def test_a_run_is_bit_for_bit_the_same_under_another_default_dtype(default: torch.dtype, settings: Any) -> None:
    expected = trained(*toy(update_proj_gap=2, **settings))
    model, _ = toy(update_proj_gap=2, **settings)
    keys = {key: settings[key] for key in settings if key not in ("moments", "max_grad_norm", "nonfinite")}
    own = {key: value for key, value in settings.items() if key not in keys}
    with default_dtype(default):
        groups = qg.param_groups(model, rank=4, update_proj_gap=2, quant_group_size=8, **keys)
        found = trained(model, qg.QGaLoreAdamW(groups, lr=1e-2, **own))
    assert equal(found, expected)


@settings
def test_a_run_is_bit_for_bit_the_same_under_another_default_device(settings: Any) -> None:
    expected = trained(*toy(update_proj_gap=2, **settings))
    model, _ = toy(update_proj_gap=2, **settings)
    keys = {key: settings[key] for key in settings if key not in ("moments", "max_grad_norm", "nonfinite")}
    own = {key: value for key, value in settings.items() if key not in keys}
    gradients = [
        [torch.randn(p.shape, generator=draw) for p in model.parameters()]
        for draw in map(torch.Generator().manual_seed, range(7))
    ]
    with torch.device("meta"):
        groups = qg.param_groups(model, rank=4, update_proj_gap=2, quant_group_size=8, **keys)
        opt = qg.QGaLoreAdamW(groups, lr=1e-2, **own)
        for each in gradients:
            for p, gradient in zip(model.parameters(), each, strict=True):
                p.grad = gradient
            opt.step()
    assert equal(snapshot(model, opt), expected)


# -- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [255, 2**24 - 1, 2**24, 2**31, 2**32 + 6])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_counts_one_and_draws_the_bits_of_its_own_number(count: int, compiled: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64, bias=False))
    qg.quantize_(net, group_size=8, targets=["0"])
    (weight,) = net.parameters()
    assert isinstance(weight, qg.Int8Weight)
    opt = qg.QGaLoreAdamW([weight], lr=0.1, moments="32bit")
    state, gradient = opt.state[weight], torch.randn(64, 16)
    state["step"].fill_(count)
    weight.grad = gradient

    m, v = (1 - 0.9) * gradient, (1 - 0.999) * gradient * gradient
    least = weight.dequantize() - 0.1 * (m / -math.expm1((count + 1) * math.log(0.9))) / (
        (v / -math.expm1((count + 1) * math.log(0.999))).sqrt() + 1e-8
    )
    noise = rng.random_bits((64, 16), seed=0, step=count + 1, param=0)
    expected = formats.quantize_int8(least, 8, noise=noise)[0]

    (torch.compile(opt.step, backend=Interpreted()) if compiled else opt.step)()
    assert int(state["step"]) == count + 1
    off = (weight.codes.int() - expected.int()).abs()
    assert int((off > 0).sum()) <= 2  # of 1,024, where a sum lies at a boundary; another number's bits: 300


# -- what parameters are made of --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("keys", [{}, {"rank": 2}], ids=["plain", "projected"])
def test_parameters_of_another_dtype_are_refused_with_what_may_be_and_the_remedy(
    dtype: torch.dtype, keys: dict[str, Any]
) -> None:
    p = nn.Parameter(torch.ones(8, 5).to(dtype))
    message = rf"w of dtype {dtype} .*float32, bfloat16, float16.*Int8Weight; convert the model"
    with pytest.raises(ValueError, match=message):
        qg.QGaLoreAdamW([{"params": [("w", p)], **keys}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_has_the_dtype_of_its_table(dtype: torch.dtype) -> None:
    model, opt = toy(dtype=dtype)
    for group in opt.param_groups:
        for p in group["params"]:
            parts = group.formats.dtypes if group.formats.moments_of(group, p).text == "8bit" else {}
            assert {name: t.dtype for name, t in opt.state[p].items()} == {
                name: dtype_of(name, parts) for name in opt.state[p]
            }
    state = opt.state[model.blocks[0].weight]
    assert {name: t.dtype for name, t in state.items()} == {
        "step": torch.int64,
        "schedule": torch.float64,
        "exp_avg": torch.uint8,
        "exp_avg_absmax": torch.float32,
        "exp_avg_sq_root": torch.uint8,
        "exp_avg_sq_root_absmax": torch.float32,
        "projector": torch.uint8,
        "projector_scale": torch.float32,
        "projector_offset": torch.float32,
        "grad_norm": torch.float32,
        "skipped_steps": torch.int64,
    }


# -- without eps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_without_eps_an_element_that_never_had_a_gradient_stays(moments: str, compiled: bool) -> None:
    net = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(80, 64, bias=False))
    groups = [{"params": [net[0].weight], "rank": 4}, {"params": [net[1].weight]}]
    opt = qg.QGaLoreAdamW(groups, lr=0.1, eps=0.0, moments=moments)
    step = torch.compile(opt.step, backend=Interpreted()) if compiled else opt.step
    start = [p.detach().clone() for p in net.parameters()]
    for scale in (0.0, 1.0, 0.0):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
            p.grad[::2] = scale
        step()
        assert all(bool(p.isfinite().all()) for p in net.parameters())
        moved = [not torch.equal(p, was) for p, was in zip(net.parameters(), start, strict=True)]
        assert moved == [scale > 0 or opt.state[net[1].weight]["step"] > 1] * 2
    assert torch.equal(net[1].weight[1::2], start[1][1::2])
