"""The program that Inductor emits for a GPU where it pads products whose sides do not align, made without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_cuda import emitted, fake_cuda
from support import step_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import qgalore_compile as qg
from qgalore_compile.training.llama import move_

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="the stand-ins are for builds of torch without CUDA"),
]


def odd_step(out: int) -> tuple[Callable[..., Tensor], tuple[Tensor]]:
    """A step of one INT8 layer whose rows do not align, and of a head; on fake tensors of device "cuda"."""
    with FakeTensorMode():
        model = move_(
            nn.Sequential(nn.Linear(64, out, bias=False), nn.SiLU(), nn.Linear(out, 77)), torch.bfloat16, "cuda"
        )
        qg.quantize_(model, group_size=64, targets=["0"])
        opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=16, targets=["0"]), lr=1e-2)
        x = torch.zeros(80, 64, dtype=torch.bfloat16, device="cuda")
    return step_of(model, opt), (x,)


def test_a_layer_of_odd_width_is_fused_where_inductor_pads_products(inductor_cache: object) -> None:
    torch._dynamo.reset()
    with fake_cuda(padding=True):
        step, inputs = odd_step(out=101)
        program = emitted(step, *inputs, backend="qgalore", strict=True)
    # products of the forward and X Pᵀ; regions of the layer, and of the head's weight and bias, whose rounding draws
    assert program.launches() == {"product": 2, "region": 3, "write-back": 1}
    assert "constant_pad_nd" in program.text  # the head's products stay padded
