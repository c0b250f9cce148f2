"""Programs as Triton kernels in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import interpreted
from kernels_support import Tensors

from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.triton.kernels import Kernel, region_kernel
from qgalore_compile.kernels.triton.printer import print_region


def kernel_of(made: BlockProgram, rows: int | None = None) -> Kernel:
    """A program's kernel, with so many groups an instance where that is said."""
    kernel = region_kernel(made)
    if rows is None:
        return kernel
    grid = -(-made.space.rows * made.space.groups // rows)
    return dataclasses.replace(kernel, source=print_region(made, rows), grid=grid)


def ran(
    made: BlockProgram, tensors: Tensors, numbers: Mapping[str, int] | None = None, rows: int | None = None
) -> Tensors:
    """What the kernel leaves in the buffers; ``tensors`` stay."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    interpreted.launch(kernel_of(made, rows), copies, dict(numbers or {}))
    return copies
