"""The operators that a fused graph calls: a program's text and its tensors.

The text is an argument of the operator, not a key into a registry: what a compiled graph calls is complete in itself,
for the caches of compiled graphs and for other processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from qgalore_compile._ops import define
from qgalore_compile.kernels.cpp import gemm as gemm_cpu
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.gemm import GemmProgram, named, parsed
from qgalore_compile.kernels.ir.program import BlockProgram

DEVICES = ("cpu", "cuda")
"""Kinds of devices that programs run on; "cuda" is PyTorch's name for AMD's GPUs too."""


def _on_gpu(tensors: Sequence[Tensor]) -> bool:
    kind = tensors[0].device.type
    if kind not in DEVICES:
        raise NotImplementedError(f"generated kernels run on {' and '.join(DEVICES)}, these tensors are on {kind!r}")
    return kind == "cuda"


def _run(program: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    if _on_gpu(written):
        # here: a machine without a GPU need not have Triton
        from qgalore_compile.kernels.triton import kernels as triton_kernels

        triton_kernels.run_region(program, written, read, numbers)
        return
    kernel = cpu.kernel(program)
    kernel(named(kernel.program, written, read), numbers)


def _run_gemm(program: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    if _on_gpu(written):
        from qgalore_compile.kernels.triton import kernels as triton_kernels

        triton_kernels.run_product(program, written, read, numbers)
        return
    gemm_cpu.run(program, written, read, numbers)


def _nothing(program: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    return None


run_program = define(
    "run_program(str program, Tensor(a!)[] written, Tensor[] read, int[] numbers) -> ()", _run, _nothing
)
"""Run a :class:`BlockProgram` (its text) over its whole space; tensors as for ``gemm.named``."""

run_gemm = define(
    "run_gemm(str program, Tensor(a!)[] written, Tensor[] read, int[] numbers) -> ()", _run_gemm, _nothing
)
"""Run a :class:`GemmProgram` (its text); tensors as for ``GemmProgram.share``."""


def _gemm(program: str, read: Sequence[Tensor]) -> Tensor:
    if _on_gpu(read):
        from qgalore_compile.kernels.triton import kernels as triton_kernels

        return triton_kernels.product(program, read)
    return gemm_cpu.product(program, read)


def _gemm_fake(program: str, read: Sequence[Tensor]) -> Tensor:
    gemm = parsed(program)
    left, right = gemm.operands(read)
    shape = (gemm.left.size(left, 0), gemm.right.size(right, 1))
    plain = left[0] if gemm.left.prologue is None else right[0]
    return plain.new_empty(shape)


gemm = define("gemm(str program, Tensor[] read) -> Tensor", _gemm, _gemm_fake)
"""The product of a :class:`GemmProgram` (its text) without an epilogue; at least one operand is a tensor as it is."""


@cache
def program_of(text: str) -> BlockProgram | GemmProgram:
    """The program that an operator's first argument spells; one a process."""
    return parsed(text) if text.startswith("gemm ") else BlockProgram.parse(text)


def kernels(text: str) -> list[cpu.Kernel]:
    """The kernels that an operator with this text launches on a CPU; their compilation begins here."""
    if text.startswith("gemm "):
        return [each for each in gemm_cpu.kernels(text) if each is not None]
    return [cpu.kernel(text)]
