"""What runs generated kernels on which kind of device: a row for each lowering, and the look-up.

A device is added by a row: a :class:`Lowering` that is registered before anything is compiled.  Passes ask which
lowering a graph is made for (:func:`of_graph`) and what that accepts, so that a region which none takes is refused,
with a reason, when the graph is compiled; operators ask which runs the tensors that they are given (:func:`of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qgalore_compile.kernels.cpp import gemm as gemm_cpu
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.cpp import loss as loss_cpu
from qgalore_compile.kernels.cpp import rows as rows_cpu
from qgalore_compile.kernels.ir.gemm import GemmProgram
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.read.region import Refusal
from qgalore_compile.kernels.triton import kernels as triton_kernels

Program = BlockProgram | GemmProgram


class Prepared(Protocol):
    """A kernel whose compilation has begun."""

    def wait(self) -> None:
        """Return when it can be launched; raise where it cannot be compiled."""


@dataclass(frozen=True)
class Lowering:
    """How programs run on some kinds of devices.

    Attributes:
        name: for people, and for the names under which compiled graphs are cached.
        devices: kinds of devices, as ``torch.device.type`` has them; "cuda" is PyTorch's name for AMD's GPUs too.
        accepts: why it does not take a program, given the tensors of a product's operands (fake ones, none for a
            region) and their device; None where it does.
        prepare: begins to compile the kernels that a program's text launches, where it compiles before the step.
        run_program: runs a :class:`BlockProgram` (its text) on (written, read, numbers), as ``gemm.named`` takes them.
        run_gemm: runs a :class:`GemmProgram` with an epilogue likewise; tensors as for ``GemmProgram.share``.
        gemm: the product of one without an epilogue, from the tensors of its operands.
        run_rows: runs a :class:`RowsProgram` (its text); None where none is made for its devices.
        run_loss: runs a :class:`LossProgram` (its text), likewise.
        passes: names of the passes that are for its devices alone.
        products: whether an epilogue may read several products.
        lengths: whether the length that a product sums over may be known only when the step runs.
        instead: whether graphs are made for it now, whatever device their tensors are on.
    """

    name: str
    devices: tuple[str, ...]
    accepts: Callable[[Program, Sequence[Tensor], torch.device], Refusal | None]
    prepare: Callable[[str], Sequence[Prepared]]
    run_program: Callable[[str, Sequence[Tensor], Sequence[Tensor], Sequence[int]], None]
    run_gemm: Callable[[str, Sequence[Tensor], Sequence[Tensor], Sequence[int]], None]
    gemm: Callable[[str, Sequence[Tensor]], Tensor]
    run_rows: Callable[[str, Sequence[Tensor], Sequence[Tensor], Sequence[int]], None] | None = None
    run_loss: Callable[[str, Sequence[Tensor], Sequence[Tensor], Sequence[int]], None] | None = None
    passes: tuple[str, ...] = ()
    products: bool = False
    lengths: bool = False
    instead: Callable[[], bool] = lambda: False


def of(device: torch.device) -> Lowering | None:
    """What runs kernels on a device's tensors; None where nothing does."""
    kind = device.type
    for each in _registered:  # in every call of a kernel: a third of the time that a generator takes
        if kind in each.devices:
            return each
    return None


def of_graph(device: torch.device) -> Lowering | None:
    """What a graph with tensors on a device is made for: :func:`of`, unless one stands in for all."""
    return next((each for each in _registered if each.instead()), None) or of(device)


def runs(name: str, device: torch.device) -> bool:
    """Whether a pass that is for some devices alone is for this one."""
    lowering = of_graph(device)
    return lowering is not None and name in lowering.passes


def devices() -> tuple[str, ...]:
    """Kinds of devices that there is a lowering for."""
    return tuple(dict.fromkeys(device for each in _registered for device in each.devices))


def names() -> tuple[str, ...]:
    """Of the lowerings, in the order in which they are asked."""
    return tuple(each.name for each in _registered)


def register(lowering: Lowering) -> None:
    """Add a lowering; of two for one device the later one counts."""
    _registered.insert(0, lowering)


@contextmanager
def registered(lowering: Lowering) -> Iterator[None]:
    """Add a lowering for a while."""
    register(lowering)
    try:
        yield
    finally:
        _registered.remove(lowering)


# -- CPUs -------------------------------------------------------------------------------------------------------------


def _run_on_cpu(text: str, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
    cpu.kernel(text).run(written, read, numbers)


_KERNEL_OF = {"rows": rows_cpu.kernel, "loss": loss_cpu.kernel}
"""By the first word of a text, what makes its kernel."""


def _prepare_for_cpu(text: str) -> Sequence[Prepared]:
    if text.startswith("gemm "):
        return [each for each in gemm_cpu.kernels(text) if each is not None]
    return [_KERNEL_OF.get(text.partition(" ")[0], cpu.kernel)(text)]


CPP = Lowering(
    "cpp",
    ("cpu",),
    accepts=lambda program, read, device: None,
    prepare=_prepare_for_cpu,
    run_program=_run_on_cpu,
    run_gemm=gemm_cpu.run,
    gemm=gemm_cpu.product,
    run_rows=rows_cpu.run,
    run_loss=loss_cpu.run,
    passes=("embedding_gradient", "row_blocks", "chunked_loss"),
    products=True,
    lengths=True,
)


# -- GPUs -------------------------------------------------------------------------------------------------------------


def _fits_a_gpu(program: Program, read: Sequence[Tensor], device: torch.device) -> Refusal | None:
    target = triton_kernels.target_of(device)
    return None if triton_kernels.has_tile(program, read, target, triton_kernels.precision()) else Refusal.TILE


TRITON = Lowering(
    "triton",
    ("cuda",),
    accepts=_fits_a_gpu,
    prepare=lambda text: (),  # `triton_calls` chooses kernels, and Inductor compiles them
    run_program=triton_kernels.run_region,
    run_gemm=triton_kernels.run_product,
    gemm=triton_kernels.product,
    passes=("decode_first", "triton_calls"),
    products=True,
    instead=triton_kernels.is_made_for,
)

_registered = [CPP, TRITON]
