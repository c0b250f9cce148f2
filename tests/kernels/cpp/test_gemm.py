"""Products in blocks are those of whole matrices, and nothing larger than a block is allocated."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from kernels_support import load, program
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qgalore_compile import formats
from qgalore_compile.kernels.cpp import gemm as gemm_cpu
from qgalore_compile.kernels.ir.gemm import VALUE, Factors, GemmProgram, Operand
from qgalore_compile.kernels.ir.program import BlockProgram, Space

M, N, K = 37, 45, 13
GROUP = 8
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def epilogue(memory: str) -> BlockProgram:
    """w ← w - lr · product, and each group's largest."""
    made = program(
        Space(M, N, GROUP), f"product {memory} element in", "w f32 element inout", "lr f32 scalar in",
        "most f32 group out",
    )  # fmt: skip
    new = made.emit("sub", (load(made, "w"), made.emit("mul", (load(made, "lr"), load(made, "product")))))
    made.store("w", new)
    made.store("most", made.emit("group_max", (new,)))
    return made


def decoding(rows: int, columns: int, memory: str) -> BlockProgram:
    """INT4 groups to floats."""
    space = Space(rows, columns, GROUP)
    made = program(
        space, "codes u4 element in", "scale f32 group in", "offset f32 group in", f"{VALUE} {memory} element out"
    )
    value = made.emit("mul", (made.emit("f32", (load(made, "codes"),)), load(made, "scale")))
    made.store(VALUE, made.emit("add", (value, load(made, "offset"))))
    return made


class Allocations(TorchDispatchMode):
    """The largest tensor, in bytes, that is allocated under it."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and (kwargs or {}).get("out") is None:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


class Side:
    """One operand: how it is stored, and the matrix that it stands for."""

    def __init__(self, rows: int, columns: int, *, quantised: bool, transposed: bool, dtype: torch.dtype) -> None:
        matrix = torch.randn(rows, columns)
        stored = (matrix.t() if transposed else matrix).contiguous()
        self.tensors = [stored.to(dtype)]
        self.program = None
        if quantised:
            codes = formats.quantize_int4(stored, GROUP)
            self.tensors = list(codes[:3])
            self.program = decoding(*stored.shape, DTYPES[dtype])
            stored = formats.dequantize_int4(*codes[:3], stored.shape[1], GROUP)
        stored = stored.to(dtype)
        self.matrix = stored.t() if transposed else stored
        self.operand = Operand(self.program, transposed)


def run(left: Side, right: Side, dtype: torch.dtype, block_bytes: int, patch: pytest.MonkeyPatch) -> int:
    """Run a product, compare it with whole matrices; the largest allocation."""
    patch.setattr(gemm_cpu, "PRODUCT_BYTES", block_bytes)
    patch.setattr(gemm_cpu, "OPERAND_BYTES", block_bytes)
    gemm = GemmProgram(left.operand, right.operand, epilogue(DTYPES[dtype]), "product")
    old, most, lr = torch.randn(M, N), torch.empty(M, 6), torch.tensor(0.1)
    w, expected = old.clone(), old - lr * (left.matrix @ right.matrix).float()
    text = str(gemm)
    gemm_cpu.run(text, [w, most], [*left.tensors, *right.tensors, lr], [])  # compiles
    w.copy_(old)
    with Allocations() as seen:
        gemm_cpu.run(text, [w, most], [*left.tensors, *right.tensors, lr], [])
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2  # bf16: a block's sum may be rounded the other way
    assert (w - expected).abs().max() <= tolerance * expected.abs().max()
    padded = torch.nn.functional.pad(w, (0, 48 - N), value=-torch.inf)
    assert torch.equal(most, padded.view(M, 6, GROUP).amax(-1))
    return seen.largest


@pytest.mark.parametrize("block_bytes", [1 << 20, 2048, 64])
@pytest.mark.parametrize(
    ("dtype", "which", "transposed"),
    [
        *((torch.float32, which, transposed) for which in ("none", "left", "right") for transposed in (False, True)),
        *((torch.bfloat16, which, False) for which in ("none", "right")),
    ],
)
def test_a_product_in_blocks_is_that_of_whole_matrices(
    dtype: torch.dtype, which: str, transposed: bool, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven compiles in all: the epilogue, and the decoding of either side in either orientation."""
    left = Side(M, K, quantised=which == "left", transposed=transposed, dtype=dtype)
    right = Side(K, N, quantised=which == "right", transposed=not transposed, dtype=dtype)
    largest = run(left, right, dtype, block_bytes, monkeypatch)
    # one row, or as many as there are columns in a group, of the product or of a decoded operand is the least
    least = {"none": N, "left": GROUP * N if transposed else N, "right": K * GROUP}[which] * dtype.itemsize
    assert largest <= max(block_bytes, least)


def test_both_operands_may_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    left = Side(M, K, quantised=True, transposed=True, dtype=torch.float32)
    right = Side(K, N, quantised=True, transposed=False, dtype=torch.float32)
    largest = run(left, right, torch.float32, 2048, monkeypatch)
    assert largest <= 2048


def test_blocks_of_a_prologue_begin_at_a_group_of_both_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projector's groups are wider than the weight's: a block of columns holds whole groups of both."""
    left = Side(M, K, quantised=False, transposed=False, dtype=torch.float32)
    right = Side(K, N, quantised=False, transposed=False, dtype=torch.float32)
    codes = formats.quantize_int4(right.matrix.contiguous(), 12)
    made = program(
        Space(K, N, 12), "codes u4 element in", "scale f32 group in", "offset f32 group in",
        f"{VALUE} f32 element out",
    )  # fmt: skip
    value = made.emit("mul", (made.emit("f32", (load(made, "codes"),)), load(made, "scale")))
    made.store(VALUE, made.emit("add", (value, load(made, "offset"))))
    right.tensors, right.operand = list(codes[:3]), Operand(made, False)
    right.matrix = formats.dequantize_int4(*codes[:3], N, 12)
    run(left, right, torch.float32, 1500, monkeypatch)


# -- what calls have in common ----------------------------------------------------------------------------------------


def decoded_on_the_right() -> tuple[str, list[Tensor]]:
    """A product's text, with an epilogue, and what it reads."""
    left = Side(M, K, quantised=False, transposed=False, dtype=torch.float32)
    right = Side(K, N, quantised=True, transposed=True, dtype=torch.float32)
    gemm = GemmProgram(left.operand, right.operand, epilogue("f32"), "product")
    return str(gemm), [*left.tensors, *right.tensors, torch.tensor(0.1)]


def test_a_second_call_works_out_nothing_that_follows_from_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text, read = decoded_on_the_right()
    plain = str(GemmProgram(*GemmProgram.parse(text).products[0][:2]))
    first = torch.ones(M, N)
    gemm_cpu.run(text, [first, torch.empty(M, 6)], read, [])
    product = gemm_cpu.product(plain, read[:-1])
    for name in ("parsed", "kernels", "_Plan", "_Side", "_Decoding", "_view"):
        monkeypatch.delattr(gemm_cpu, name)
    again = torch.ones(M, N)
    gemm_cpu.run(text, [again, torch.empty(M, 6)], read, [])
    assert torch.equal(again, first)
    assert torch.equal(gemm_cpu.product(plain, read[:-1]), product)


def test_threads_that_run_one_text_do_not_meet() -> None:
    text, read = decoded_on_the_right()
    inputs = [[torch.randn(M, K), *read[1:]] for _ in range(4)]

    def updated(own: list[Tensor]) -> Tensor:
        w = torch.zeros(M, N)
        for _ in range(50):
            w.zero_()
            gemm_cpu.run(text, [w, torch.empty(M, 6)], own, [])
        return w

    alone = [updated(own) for own in inputs]
    with ThreadPoolExecutor(len(inputs)) as threads:
        assert all(map(torch.equal, threads.map(updated, inputs), alone))


def test_a_use_has_one_block_whose_views_are_kept_until_a_larger_one_is_needed() -> None:
    small, dtype = gemm_cpu.scratch("a test's", (2, 3), torch.float32), torch.float32
    turned = gemm_cpu.scratch("a test's", (2, 3), dtype, transposed=True)
    assert gemm_cpu.scratch("a test's", (2, 3), dtype) is small
    assert turned.shape == (3, 2)
    assert turned.data_ptr() == small.data_ptr() == gemm_cpu.scratch("a test's", (1, 6), dtype).data_ptr()
    large = gemm_cpu.scratch("a test's", (4, 3), dtype)
    held = gemm_cpu._held.__dict__["a test's"]
    assert large.data_ptr() == held.data_ptr()
    assert gemm_cpu.scratch("a test's", (2, 3), dtype).data_ptr() == held.data_ptr()
    assert set(gemm_cpu._views.of["a test's"]) == {((4, 3), dtype, False), ((2, 3), dtype, False)}


# -- several products -------------------------------------------------------------------------------------------------


def sum_of_three() -> BlockProgram:
    """w ← w - lr · (product + scale ∘ gradient ∘ other), the scale a number for each column."""
    made = program(
        Space(M, N, GROUP), "product f32 element in", "gradient f32 element in", "other f32 element in",
        "w f32 element inout", "lr f32 scalar in", "scale f32 column in",
    )  # fmt: skip
    scaled = made.emit("mul", (load(made, "gradient"), load(made, "scale")))
    total = made.emit("add", (load(made, "product"), made.emit("mul", (scaled, load(made, "other")))))
    made.store("w", made.emit("sub", (load(made, "w"), made.emit("mul", (load(made, "lr"), total)))))
    return made


@pytest.mark.parametrize("block_bytes", [1 << 20, 2048, 64])
def test_an_epilogue_may_read_products_of_other_lengths_none_of_which_exists_as_a_whole(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_cpu, "PRODUCT_BYTES", block_bytes)
    monkeypatch.setattr(gemm_cpu, "OPERAND_BYTES", block_bytes)
    lengths = {"product": 5, "gradient": K, "other": 1}
    sides = {
        name: (
            Side(M, k, quantised=False, transposed=name == "gradient", dtype=torch.float32),
            Side(k, N, quantised=name == "product", transposed=False, dtype=torch.float32),
        )
        for name, k in lengths.items()
    }
    first, *further = [Factors(left.operand, right.operand, name) for name, (left, right) in sides.items()]
    gemm = GemmProgram(first.left, first.right, sum_of_three(), first.product, tuple(further))
    assert GemmProgram.parse(str(gemm)) == gemm
    old, lr, scale = torch.randn(M, N), torch.tensor(0.1), torch.randn(N)
    product, gradient, other = (left.matrix @ right.matrix for left, right in sides.values())
    expected = old - lr * (product + gradient * scale * other)
    reads = [tensor for pair in sides.values() for side in pair for tensor in side.tensors]
    w = old.clone()
    gemm_cpu.run(str(gemm), [w], [*reads, lr, scale], [])  # compiles
    w.copy_(old)
    with Allocations() as seen:
        gemm_cpu.run(str(gemm), [w], [*reads, lr, scale], [])
    torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-5)
    assert seen.largest <= max(block_bytes, 5 * GROUP * 4, N * 4)
