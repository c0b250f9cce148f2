"""Whether a device computes what eager PyTorch computes there: what `gpu.py` asks before it measures anything."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch._dynamo
from gpu_measure import watched, writes_back
from torch import Tensor
from torch._inductor.utils import fresh_cache
from update_step import projected

import qgalore_compile as qg
from qgalore_compile import formats, rng
from qgalore_compile.kernels import ops
from qgalore_compile.kernels.ir.program import BlockProgram, Buffer, Space

GROUP = 256

CODES = {torch.bfloat16: 2e-2, torch.float32: 2e-3}
"""Share of an update's integer codes that may differ, by the dtype of its products: theirs are rounded in other places.
With products in float32 those of weights differ by one at most; the codes of moments next to zero stand closer than the
products' rounding.  With products in bfloat16 a code of a weight may be far off: where v is stored as 0 and m is not,
the step is ill-conditioned, and one rounding of G moves codes of 2048 x 5461 by up to 18 in eager on a CPU."""

PRODUCT = {torch.bfloat16: 2**-7, torch.float32: 2e-5}
"""Error of a product over its largest element: bfloat16 rounds the decoded weight and the result, by 2⁻⁹ each."""


class Case(NamedTuple):
    """An update of a weight (m, n), or products with it."""

    m: int
    n: int
    rank: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n} rank {self.rank} {str(self.dtype).removeprefix('torch.')}"


# Both sides; rows shorter than a group and no multiple of it; a rank that is no power of two; 1b's odd MLP.
_SHAPES = (
    (512, 1376, 128),
    (1376, 512, 128),
    (192, 512, 48),
    (512, 192, 48),
    (1000, 300, 40),
    (1024, 1024, 256),
    (2048, 5461, 512),
)
CASES = [Case(*shape, dtype) for shape in _SHAPES for dtype in (torch.bfloat16, torch.float32)]
QUICK = [Case(40, 72, 16, torch.bfloat16), Case(72, 40, 16, torch.float32)]


@dataclass(frozen=True)
class Finding:
    """One comparison: `value` must be at most `limit`."""

    what: str
    measure: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit  # NaN is not


def findings(cases: list[Case], device: torch.device, say: Callable[[str], None]) -> Iterator[Finding]:
    """All comparisons, one after the other; a check that raises is a finding too, and the next ones still run."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [("random bits", lambda: random_bits(device))]
    checks += [(f"update {case.name}", lambda case=case: update(case, device)) for case in cases]
    checks += [(f"products {case.name}", lambda case=case: products(case, device)) for case in cases]
    for name, check in checks:
        torch._dynamo.reset()
        try:
            yield from check()
        except Exception:  # whatever a compiler or a driver says of a kernel: it is told, and counts as wrong
            say(traceback.format_exc())
            yield Finding(name, "exceptions", 1, 0)


def random_bits(device: torch.device) -> Iterator[Finding]:
    """A generated kernel's random bits, and eager PyTorch's on the device, against eager PyTorch's on the CPU."""
    for space in (Space(3, 45, 11), Space(64, 1376, 256)):
        program = BlockProgram(space, numbers=["seed", "param"])
        program.buffers = [Buffer("step", "i64", "scalar", "in"), Buffer("bits", "i32", "element", "out")]
        step = program.emit("load", names=("step",))
        program.store("bits", program.emit("random_bits", (step,), ("seed", "param")))
        for seed, at, param in ((0, 0, 0), (-1, 2**31 - 1, 2**31 - 1), (2**63 - 1, 12345, 7)):
            expected = rng.random_bits(space[:2], seed=seed, step=at, param=param)
            now = torch.tensor(at, device=device)
            found = torch.zeros(space[:2], dtype=torch.int32, device=device)
            ops.run_program(str(program), [found], [now], [seed, param])
            plain = rng.random_bits(space[:2], seed=seed, step=now, param=param)
            what = f"random bits {space.rows}x{space.columns} seed {seed} step {at} parameter {param}"
            for measure, bits in (("of a kernel", found), ("of eager", plain)):
                yield Finding(what, f"{measure}: differing", float((bits.cpu() != expected).sum()), 0)


def update(case: Case, device: torch.device) -> Iterator[Finding]:
    """One step by the backend against one in eager, on copies of the same state."""
    optimizer, weight = projected(case.m, case.n, case.rank, str(device), case.dtype)
    assert isinstance(weight, qg.Int8Weight)
    with fresh_cache(), watched() as kernels:
        result = qg.check(optimizer.step)
    what = f"update {case.name}"
    if device.type == "cuda":
        yield Finding(
            what, "write-back that is no generated kernel", float(not any(map(writes_back, kernels.values()))), 0
        )
    for error in result.errors:
        yield Finding(what, f"{error.name}: relative error", error.relative, error.tolerance)
        if error.codes_differing is not None and error.code_distance is not None:
            yield Finding(what, f"{error.name}: share of codes differing", error.codes_differing, CODES[case.dtype])
            if "/" not in error.name and case.dtype == torch.float32:  # of a weight, no state of it
                yield Finding(what, f"{error.name}: distance of codes", error.code_distance, 1)


def products(case: Case, device: torch.device, tokens: int = 96) -> Iterator[Finding]:
    """A linear layer's forward and input gradient with an INT8 weight by the backend, against the same in float64."""
    torch.manual_seed(0)
    m, n, dtype = case.m, case.n, case.dtype
    stored = [part.to(device) for part in formats.quantize_int8(torch.randn(m, n) * 0.02, GROUP)[:3]]
    x, dy = (torch.randn(tokens, size).to(device, dtype) for size in (n, m))

    @torch.compile(backend="qgalore", fullgraph=True)
    def both(x: Tensor, dy: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        weight = formats.dequantize_int8(codes, scale, offset, GROUP, dtype=dtype)
        return x @ weight.t(), dy @ weight

    with fresh_cache(), watched() as kernels:
        found = both(x, dy, *stored)
    weight = formats.dequantize_int8(*stored, GROUP).double()
    expected = x.double() @ weight.t(), dy.double() @ weight
    what = f"products {case.name}"
    for name, mine, theirs in zip(("forward", "input gradient"), found, expected, strict=True):
        error = float((mine.double() - theirs).abs().max() / theirs.abs().max())
        yield Finding(what, f"{name}: largest error", error, PRODUCT[dtype])
    if device.type == "cuda":
        # products, or the one decoding before both
        yield Finding(what, "neither products nor a decoding that is a generated kernel", float(not kernels), 0)
