"""Programs on a GPU: choose tiles, print, load and launch.

A kernel is specialised by its program's text, by what is known of its arguments' memory, and by the target; every call
that agrees in these shares one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from qgalore_compile._torch import PyCodeCache
from qgalore_compile.kernels.ir.dynamic8 import expanded
from qgalore_compile.kernels.ir.gemm import VALUE, Factors, GemmProgram, named, parsed
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.triton import looked_at
from qgalore_compile.kernels.triton.decode_first import decodes_first
from qgalore_compile.kernels.triton.gemm import Further, Matrix, Product, Tiling, names_of, print_gemm
from qgalore_compile.kernels.triton.printer import params, print_region, signature
from qgalore_compile.kernels.triton.targets import Target
from qgalore_compile.kernels.triton.tiling import NoTilingError, in_bands, region_blocks, tiling, tilings

FP_FUSION = True
"""Whether a product and a sum become one rounding: Triton's default for NVIDIA's GPUs, which is also what Inductor
compiles a user's kernel with.  Set explicitly wherever it can be, since the default is about to change."""

LOOK = True
"""Whether a GPU's kernels are compiled and looked at before their tiles are taken: False for one that is not there."""

FORMATS = {MEMORY[name].dtype: name for name in ("f32", "bf16", "f16")}
"""Of the matrices of a product; there are no others."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A printed kernel and how it is launched.

    Attributes:
        name: of the function in ``source``.
        source: a module that needs Triton alone.
        signature: by argument, Triton's type: "*bf16", "i64", ….
        params: arguments that hold a parameter's number, as pointers to one i32.
        grid: instances, where that is known; else
        tile: (rows, columns) from one tile of the product to the next; of a region, (groups, 0).
        warps, stages: of a block; of the pipelined loop.
        work: what it computes.
        tiling: of a product.
        passed: tiles that would have been faster, and what speaks against each (``looked_at.py``).
    """

    name: str
    source: str
    signature: dict[str, str]
    params: frozenset[str]
    grid: int | None
    tile: tuple[int, int]
    warps: int
    stages: int
    work: BlockProgram | Product
    tiling: Tiling | None = None
    passed: tuple[str, ...] = ()

    @property
    def blocks(self) -> str:
        """What a block works on, for people."""
        if self.tiling is None:
            return f"{self.tile[0]} groups, {self.warps} warps"
        return f"{self.tiling.m}×{self.tiling.n}×{self.tiling.k}, {self.warps} warps, {self.stages} stages"

    def instances(self, m: Any = 1, n: Any = 1) -> Any:
        """How many instances a product of m × n takes; sizes may be symbolic."""
        if self.grid is not None:
            return self.grid
        return ((m + self.tile[0] - 1) // self.tile[0]) * ((n + self.tile[1] - 1) // self.tile[1])


def region_kernel(program: BlockProgram, look: Target | None = None) -> Kernel:
    """The kernel of a region; its work is what is computed, without names for several steps.  ``look``: the target
    whose machine code chooses among blocks."""
    program = expanded(program)
    kernels = (_region_kernel(program, *block) for block in region_blocks(program))
    return next(kernels) if look is None else looked_at.choose(kernels, look)


def _region_kernel(program: BlockProgram, rows: int, warps: int) -> Kernel:
    grid = -(-program.space.rows * program.space.groups // rows)
    return Kernel(
        "region", print_region(program, rows), signature(program), params(program), grid, (rows, 0), warps, 1, program
    )


def product_kernel(product: Product, target: Target, *, look: bool = False) -> Kernel:
    """The kernel of a product; ``look``: its machine code chooses among the model's tiles."""
    if not look:
        return _product_kernel(product, tiling(product, target))
    # what is spilled depends on a tile's sides and warps, hardly on how deep it is and how many are loaded ahead
    distinct: dict[tuple[int, int, int], Tiling] = {}
    for each in tilings(product, target):
        distinct.setdefault((each.m, each.n, each.warps), each)
    kernels = (_product_kernel(product, in_bands(product, each, target)) for each in distinct.values())
    return looked_at.choose(kernels, target)


def _product_kernel(product: Product, chosen: Tiling) -> Kernel:
    m, n, _ = product.sizes
    epilogue = product.program.epilogue
    numbers = params(epilogue, "e_") if epilogue else frozenset[str]()
    step = (chosen.m, product.step(chosen.n))
    grid = None if m is None or n is None else -(-m // step[0]) * -(-n // step[1])
    return Kernel(
        "gemm", print_gemm(product, chosen), product.signature(), numbers, grid, step, chosen.warps, chosen.stages,
        product, chosen,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def kernel_of(
    text: str, left: Matrix | None, right: Matrix | None, sizes: tuple[int | None, int | None, int], memory: str,
    precision: str, target: Target, look: bool = False, further: tuple[Further, ...] = (),
) -> Kernel:  # fmt: skip
    """The kernel of a product's text; one a process."""
    return product_kernel(Product(parsed(text), left, right, sizes, memory, precision, further), target, look=look)


@lru_cache(maxsize=1024)
def region_of(text: str, look: Target | None = None) -> Kernel:
    """The kernel of a region's text; one a process."""
    return region_kernel(BlockProgram.parse(text), look)


def looking(target: Target) -> Target | None:
    """The target, where machine code is looked at before a tile is taken: on a GPU, and ahead of time on request."""
    made_for = _made_for.get()
    if made_for is None:
        return target if LOOK and torch.cuda.is_available() else None
    return target if made_for[2] else None


def choose_together(calls: Iterable[tuple[str, Sequence[Tensor], torch.device]]) -> None:
    """Choose the kernels of several calls (text, operands' tensors or none, device), each on a thread of its own, where
    that means to compile them; :func:`of_call` and :func:`region_of` find them chosen."""
    jobs: dict[Any, Callable[[], Kernel]] = {}
    for text, read, device in calls:
        target = target_of(device)
        if looking(target) is None:
            return
        if not text.startswith("gemm "):
            jobs[text, target] = partial(region_of, text, target)
            continue
        found, _ = product_of(parsed(text), read, target, precision())
        if all(known is not None or operand.prologue is not None for part in found.parts for known, operand in (
            (part.left, part.program.left), (part.right, part.program.right)
        )):  # fmt: skip
            jobs[text, found[1:], target] = partial(kernel_of, text, *found[1:6], target, True, found.further)

    def chosen(job: Callable[[], Kernel]) -> None:
        with suppress(NoTilingError):  # said where the kernel is asked for
            job()

    if jobs:
        with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            list(pool.map(chosen, jobs.values()))


def load(kernel: Kernel) -> Any:
    """The kernel as Triton's function; one as long as Inductor's cache is the same.

    Inductor reads the function's source again when it compiles a graph that calls it: the file must be there, in the
    cache of that moment, and not in one that has been cleared since.
    """
    return getattr(PyCodeCache.load(kernel.source), kernel.name)


def tuned(kernel: Kernel) -> Any:
    """The kernel with its warps and stages, as launches take it."""
    return _tuned(load(kernel), kernel.warps, kernel.stages)


@lru_cache(maxsize=1024)
def _tuned(function: Any, warps: int, stages: int) -> Any:
    import triton

    return triton.autotune([triton.Config({}, num_warps=warps, num_stages=stages)], key=[])(function)


def has_tile(program: BlockProgram | GemmProgram, read: Sequence[Tensor], target: Target, precision: str) -> bool:
    """Whether there is a kernel of a region, or of a product from its operands' tensors, real or fake: one that decodes
    them itself or one behind kernels that do."""
    if isinstance(program, GemmProgram):
        product, _ = product_of(program, read, target, precision)
        return _has_tile(str(program), *product[1:], target)
    try:
        return bool(region_blocks(program))
    except NoTilingError:
        return False


@lru_cache(maxsize=1024)
def _has_tile(
    text: str, left: Matrix | None, right: Matrix | None, sizes: tuple[int | None, int | None, int], memory: str,
    precision: str, further: tuple[Further, ...], target: Target,
) -> bool:  # fmt: skip
    product = Product(parsed(text), left, right, sizes, memory, precision, further)
    try:
        return bool(tilings(product, target))
    except NoTilingError:
        return decodes_first(product, target)


# -- what is known of a call's arguments -------------------------------------------------------------------------------


def matrix(tensor: Tensor) -> Matrix | None:
    """What a kernel must know of a plain operand; None where its strides are known only when the step runs."""
    rows, columns = tensor.stride()
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    return Matrix(FORMATS[tensor.dtype], (rows, columns))


def of_call(program: GemmProgram, text: str, read: Sequence[Tensor], target: Target, precision: str) -> tuple[
    Kernel, tuple[Any, Any]
]:  # fmt: skip
    """(the kernel of a product's call, the product's m and n), from its operands' tensors, real or fake."""
    found, sizes = product_of(program, read, target, precision)
    return kernel_of(text, *found[1:6], target, looking(target) is not None, found.further), sizes


def product_of(
    program: GemmProgram, read: Sequence[Tensor], target: Target, precision: str
) -> tuple[Product, tuple[Any, Any]]:
    """(a call's product and what is known of its operands, its m and n), from their tensors, real or fake."""
    (left, right), *_ = operands = program.operands(read)
    m, n = program.left.size(left, 0), program.right.size(right, 1)
    (first, second, k), *further = (
        _known(factors, each) for factors, each in zip(program.products, operands, strict=True)
    )
    memory = next(
        FORMATS[tensors[0].dtype] if operand.prologue is None else operand.prologue.buffer(VALUE).memory
        for operand, tensors in ((program.left, left), (program.right, right))
    )
    if target.name == "sm_100" and precision == "ieee" and memory == "f32":
        # Triton 3.7 takes what was decoded from bytes for exact in 10 bits, and multiplies it in tf32; 3.9 does not
        precision = "tf32x3"
    sizes = tuple(each if isinstance(each, int) else None for each in (m, n))
    return Product(program, first, second, (sizes[0], sizes[1], k), memory, precision, tuple(further)), (m, n)


def _known(factors: Factors, tensors: tuple[list[Tensor], list[Tensor]]) -> Further:
    """What is known of one product's operands."""
    (left, right), operands = tensors, (factors.left, factors.right)
    first, second = (
        matrix(given[0]) if each.prologue is None else None for each, given in zip(operands, tensors, strict=True)
    )
    k = factors.left.size(left, 1)
    return Further(first, second, k if isinstance(k, int) else factors.right.size(right, 0))


def bind(
    program: BlockProgram | GemmProgram, written: Sequence[Any], read: Sequence[Any], numbers: Sequence[int]
) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """(tensors by argument, numbers by argument, the arguments that are written) of a call."""
    if isinstance(program, BlockProgram):
        found = named(program, written, read)
        values = dict(zip(program.numbers, numbers, strict=True))
        return dict(found), values, [each.name for each in program.written()]
    operands, own = program.share(written, read)
    tensors: dict[str, Any] = {}
    for index, (factors, pair) in enumerate(zip(program.products, operands, strict=True)):
        for (prefix, name), operand, given in zip(names_of(index), factors[:2], pair, strict=True):
            if operand.prologue is None:
                tensors[name] = given[0]
            else:
                tensors |= {f"{prefix}{each}": tensor for each, tensor in operand.named(given).items()}
    if program.epilogue is None:
        return tensors, {}, []
    tensors |= {f"e_{each}": tensor for each, tensor in own.items()}
    values = {f"e_{each}": number for each, number in zip(program.epilogue.numbers, numbers, strict=True)}
    return tensors, values, [f"e_{each.name}" for each in program.epilogue.written()]


def called(kernel: Kernel) -> Any:
    """The kernel as a graph calls it."""
    made_for = _made_for.get()
    if made_for is not None:
        made_for[1][kernel] = made_for[1].get(kernel, 0) + 1
    return tuned(kernel)


def launch(kernel: Kernel, tensors: dict[str, Tensor], numbers: dict[str, int], m: int = 1, n: int = 1) -> None:
    """Run a kernel on tensors."""
    device = next(iter(tensors.values())).device
    given: dict[str, Any] = dict(tensors)
    for name, number in numbers.items():
        is_param = name in kernel.params
        given[name] = torch.tensor(number, dtype=torch.int32, device=device) if is_param else number
    if kernel.grid is None:  # else m and n may be names of a region's buffers
        given |= {name: count for name, count in (("m", m), ("n", n)) if name in kernel.signature}
    tuned(kernel)[(kernel.instances(m, n),)](*(given[name] for name in kernel.signature), enable_fp_fusion=FP_FUSION)


def run_region(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Run a :class:`BlockProgram` (its text) on tensors of a GPU; they are as for ``gemm.named``."""
    tensors, values, _ = bind(BlockProgram.parse(text), written, read, numbers)
    launch(region_of(text, looking(target_of(written[0].device))), tensors, values)


def run_product(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Run a :class:`GemmProgram` (its text) with an epilogue likewise; tensors as for ``GemmProgram.share``."""
    program = parsed(text)
    kernel, (m, n) = of_call(program, text, read, target_of(read[0].device), precision())
    tensors, values, _ = bind(program, written, read, numbers)
    launch(kernel, tensors, values, m, n)


def product(text: str, read: Sequence[Tensor]) -> Tensor:
    """The product (m, n) of a :class:`GemmProgram` without an epilogue."""
    program = parsed(text)
    kernel, (m, n) = of_call(program, text, read, target_of(read[0].device), precision())
    tensors, _, _ = bind(program, (), read, ())
    plain = tensors["left" if program.left.prologue is None else "right"]
    out: Tensor = plain.new_empty((m, n))
    launch(kernel, {**tensors, "product": out}, {}, m, n)
    return out


def is_made_for() -> bool:
    """Whether graphs get kernels for a target now, whatever device their tensors are on: within :func:`made_for`."""
    return _made_for.get() is not None


def target_of(device: torch.device) -> Target:
    """What a GPU is, as kernels are made for it."""
    made_for = _made_for.get()
    return _target_of(device) if made_for is None else made_for[0]


@cache
def _target_of(device: torch.device) -> Target:
    if torch.version.hip:
        return Target.named(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    return Target.of(torch.cuda.get_device_capability(device))


_made_for: ContextVar[tuple[Target, dict[Kernel, int], bool] | None] = ContextVar("made_for", default=None)


@contextmanager
def made_for(target: Target, *, look: bool = False) -> Iterator[dict[Kernel, int]]:
    """Graphs get kernels for a target, whatever device their tensors are on; how often each kernel is called.
    ``look``: at their machine code, as on a GPU."""
    kernels: dict[Kernel, int] = {}
    token = _made_for.set((target, kernels, look))
    try:
        yield kernels
    finally:
        _made_for.reset(token)


def precision() -> str:
    """Of float32 products, as the user has set it for PyTorch's own."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
