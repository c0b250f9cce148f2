"""What no tile of a GPU fits is refused when the graph is compiled, stays with Inductor, and is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import after, results, targets, traced
from support import assert_within_contract
from torch import Tensor, nn

pytest.importorskip("triton")

from fake_cuda import emitted, fake_cuda
from interpreted import Calls
from torch._subclasses import FakeTensorMode

import qgalore_compile as qg
from qgalore_compile import formats
from qgalore_compile.kernels.read.region import Refusal
from qgalore_compile.passes.nodes import FUNCTIONALIZED

pytestmark = pytest.mark.triton

aten = torch.ops.aten
NAMES = ("update", "reassociate", "fuse", "fuse_products", "decode_first", "triton_calls")


def momentum_step(group: int) -> Any:
    """SGD with momentum in a subspace of an INT8 weight in groups."""

    def step(dy: Tensor, x: Tensor, p: Tensor, m: Tensor, *stored: Tensor) -> None:
        momentum = 0.9 * m + p.t() @ (dy.t() @ x)
        weight = formats.dequantize_int8(*stored, group) - 0.1 * (p @ momentum)
        for part, new in zip(stored, formats.quantize_int8(weight, group)[:3], strict=True):
            aten.copy_.default(part, new)
        aten.copy_.default(m, momentum)

    return step


def inputs(m: int, n: int, rank: int, group: int) -> list[Tensor]:
    stored = formats.quantize_int8(torch.randn(m, n), group)[:3]
    return [torch.randn(7, m), torch.randn(7, n), torch.randn(m, rank), torch.randn(rank, n), *stored]


@pytest.mark.parametrize(("group", "fits"), [(256, True), (4096, False)])
def test_an_update_in_groups_too_wide_for_any_tile_stays_and_says_so(group: int, fits: bool, calls: Calls) -> None:
    given = inputs(16, 4096, 4, group)
    module, plain = (traced(momentum_step(group), *given) for _ in range(2))
    manager = after(module, *NAMES)
    fuse = next(record for record in manager.records if record.name == "fuse")
    assert len(fuse.matches) == fits
    assert FUNCTIONALIZED not in targets(module.graph)
    (note,) = manager.context.notes.values()
    if fits:
        assert note.not_fused is None
        return
    assert note.not_fused is not None
    assert note.not_fused.startswith(Refusal.TILE.value)
    assert [reason for _, reason in fuse.skipped] == [note.not_fused]
    names = [str(index) for index in range(len(given))]
    found, expected = (dict(zip(names, results(each, given), strict=True)) for each in (module, plain))
    assert_within_contract(found, expected)


def test_a_weight_at_full_rank_in_groups_too_wide_for_a_block_stays(calls: Calls) -> None:
    group = 1 << 15

    def step(g: Tensor, *stored: Tensor) -> None:
        weight = formats.dequantize_int8(*stored, group) - 0.1 * g
        for part, new in zip(stored, formats.quantize_int8(weight, group)[:3], strict=True):
            aten.copy_.default(part, new)

    given = [torch.randn(2, group), *formats.quantize_int8(torch.randn(2, group), group)[:3]]
    module = traced(step, *given)
    manager = after(module, *NAMES)
    record = next(record for record in manager.records if record.name == "fuse")
    assert record.matches == []
    assert any(Refusal.TILE.value in reason for _, reason in record.skipped)


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="the stand-ins are for builds of torch without CUDA")
def test_a_whole_step_for_a_gpu_compiles_without_the_kernel() -> None:
    torch._dynamo.reset()
    with fake_cuda():
        with FakeTensorMode():
            model = nn.Sequential(nn.Linear(4096, 16, bias=False, device="cuda"))
            qg.quantize_(model, group_size=4096)
            opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=8), lr=1e-2)
            batch = torch.zeros(8, 4096, device="cuda")

        def step(batch: Tensor) -> Tensor:
            loss = model(batch).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()

        program = emitted(step, batch, backend="qgalore")
    assert program.launches()["write-back"] == 0
    assert "run_gemm" not in program.text
