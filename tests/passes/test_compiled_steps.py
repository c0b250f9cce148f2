"""One random update by compiled kernels and by eager PyTorch, from equal state: equal within the contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from graphs import after, results, targets, traced
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import assert_within_contract
from torch import Tensor

from qgalore_compile import formats, rng
from qgalore_compile.kernels.cpp import gemm as gemm_cpu
from qgalore_compile.passes.nodes import FUNCTIONALIZED

aten = torch.ops.aten
SIZES = st.sampled_from([3, 5, 8, 13, 20, 33, 47])


@dataclass(frozen=True)
class Update:
    """An update of Q-GaLore's, as drawn.

    Attributes:
        m, n, rank: of the weight and the projector.
        right: the side.
        weight, projector, moments: "float", "int8", "int4", "dynamic8".
        weight_group, projector_group: columns to a group; rows may end in a short one.
        seed, step, param: of the random bits.
        block_bytes: of a product's and an operand's block.
    """

    m: int
    n: int
    rank: int
    right: bool
    weight: str
    projector: str
    moments: str
    weight_group: int
    projector_group: int
    seed: int
    step: int
    param: int
    block_bytes: int

    def inputs(self) -> dict[str, list[Tensor]]:
        """Random state, by part."""
        low = (self.m, self.rank) if self.right else (self.rank, self.n)
        first, second = torch.randn(low) * 0.1, torch.rand(low) * 0.1 + 1e-3
        projector = torch.randn((self.rank, self.n) if self.right else (self.m, self.rank))
        eight = self.moments == "dynamic8"
        return {
            "gradient": [torch.randn(self.m, self.n)],
            "lr": [torch.tensor(0.01)],
            "step": [torch.tensor(self.step)],
            "projector": encoded(self.projector, projector, self.projector_group),
            "weight": encoded(self.weight, torch.randn(self.m, self.n), self.weight_group),
            "first": list(formats.quantize_dynamic8(first, signed=True)[:2]) if eight else [first],
            "second": list(formats.quantize_dynamic8(second, signed=False)[:2]) if eight else [second],
            "bits": [torch.zeros(self.m, self.n, dtype=torch.int32)],
        }

    def run(self, t: dict[str, Sequence[Tensor]]) -> None:
        """Change the state; ``bits`` takes the random bits that the write-back draws."""
        (gradient,), (lr,), (step,) = t["gradient"], t["lr"], t["step"]
        columns = self.n if self.right else self.rank
        projector = decoded(self.projector, t["projector"], columns, self.projector_group)
        low = gradient @ projector.t() if self.right else projector.t() @ gradient
        eight = self.moments == "dynamic8"
        old = [formats.dequantize_dynamic8(*t[name], name == "first") if eight else t[name][0]
               for name in ("first", "second")]  # fmt: skip
        new = {"first": 0.9 * old[0] + 0.1 * low, "second": 0.99 * old[1] + 0.01 * low * low}
        inner = new["first"] / (new["second"].sqrt() + 1e-8)
        update = inner @ projector if self.right else projector @ inner
        weight = decoded(self.weight, t["weight"], self.n, self.weight_group) - lr * update
        noise = rng.random_bits((self.m, self.n), seed=self.seed, step=step, param=self.param)
        writes = {
            "weight": encoded(self.weight, weight, self.weight_group, noise),
            "bits": [torch.where(update == update, noise, -1)],
            **{name: formats.quantize_dynamic8(value, signed=name == "first")[:2] if eight else [value]
               for name, value in new.items()},
        }  # fmt: skip
        for name, parts in writes.items():
            for target, value in zip(t[name], parts, strict=True):
                aten.copy_.default(target, value)


def encoded(form: str, value: Tensor, group: int, noise: Tensor | None = None) -> list[Tensor]:
    """The stored tensors of a float one."""
    if form == "float":
        return [value]
    quantise = formats.quantize_int4 if form == "int4" else formats.quantize_int8
    return list(quantise(value, group, noise=noise)[:3])


def decoded(form: str, stored: Sequence[Tensor], columns: int, group: int) -> Tensor:
    """The float tensor of stored ones."""
    if form == "float":
        return stored[0]
    if form == "int4":
        return formats.dequantize_int4(*stored, columns, group)
    return formats.dequantize_int8(*stored, group)


@st.composite
def updates(draw: st.DrawFn) -> Update:
    m, n = draw(SIZES), draw(SIZES)
    return Update(
        m, n, draw(st.integers(2, min(m, n))), draw(st.booleans()),
        weight=draw(st.sampled_from(["int8", "float"])),
        projector=draw(st.sampled_from(["int4", "int8", "float"])),
        moments=draw(st.sampled_from(["dynamic8", "float"])),
        weight_group=draw(st.sampled_from([4, 8, 16])),
        projector_group=draw(st.sampled_from([4, 8, 16])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        step=draw(st.integers(0, 2**31 - 1)),
        param=draw(st.integers(0, 2**31 - 1)),
        block_bytes=draw(st.sampled_from([256, 2048, 1 << 20])),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.compiles
@settings(max_examples=settings().max_examples // 10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(update=updates())
def test_a_compiled_update_equals_the_eager_one_whatever_its_formats_and_shapes(update: Update) -> None:
    """Up to four compiles an example."""
    state = update.inputs()
    names = [f"{name}.{part}" for name, parts in state.items() for part in range(len(parts))]
    flat = [each for parts in state.values() for each in parts]

    def by_name(tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        left = iter(tensors)
        return {name: [next(left) for _ in parts] for name, parts in state.items()}

    module = traced(lambda *tensors: update.run(by_name(tensors)), *flat)
    record = after(module, "update", "fuse", "fuse_products").records[1]
    assert (len(record.matches), record.skipped) == (1, [])
    assert targets(module.graph).count(FUNCTIONALIZED) == 2
    with mock.patch.multiple(gemm_cpu, PRODUCT_BYTES=update.block_bytes, OPERAND_BYTES=update.block_bytes):
        found = dict(zip(names, results(module, flat), strict=True))
    update.run(state)
    expected = dict(zip(names, flat, strict=True))
    assert torch.equal(found["bits.0"], expected["bits.0"])
    assert_within_contract(found, expected)
