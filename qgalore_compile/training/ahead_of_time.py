"""``qgalore compile``: the GPU kernels of a preset's step, compiled on a machine that needs no GPU.

The step is traced on tensors without contents, the passes run as they would for that GPU, and every kernel that the
graph calls is compiled and looked into.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.table import Table

from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.optim.groups import param_groups
from qgalore_compile.training.llama import Llama, find_preset, move_
from qgalore_compile.weights import quantize_

if TYPE_CHECKING:
    from qgalore_compile.kernels.ir.gemm import Operand
    from qgalore_compile.kernels.triton.ahead import Binary
    from qgalore_compile.kernels.triton.kernels import Kernel
    from qgalore_compile.kernels.triton.targets import Target

LAYERS = 2
"""Layers that are traced: the first and the last call whatever those between them call."""


@dataclass(frozen=True)
class Row:
    """One kernel on one target.

    Attributes:
        kernel: name of its files.
        what: formats of its operands and whether a program follows.
        calls: in a step of the layers that were traced.
        registers: of a thread.
        spills: bytes that a thread keeps in local memory; 0 where all values stay in registers.
        shared: bytes of a block.
        occupancy: of a multiprocessor's warps, those that are resident.
        tensor: tensor-core instructions in the machine code.
        widest, narrowest: bytes of a thread's accesses to global memory.
        bytes: that must move, each buffer once in each direction that it is used in.
        issued: that loads and stores ask for.
        dram: of those, what passes an L2 cache of the chip's size (``kernels/triton/tiling.py`` has the model).
        operations: a multiply-add counts two.
        floor_us: the longer of those bytes at the chip's bandwidth and those operations at its peak, µs.
        limit: which of the two, "bytes" or "operations".
        block: the tile of a product, or the groups of a region, that a block of so many warps works on.
        passed: faster ones by the model, and what their machine code did.
    """

    kernel: str
    what: str
    calls: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    tensor: int
    widest: int
    narrowest: int
    bytes: int
    issued: int
    dram: int
    operations: int
    floor_us: float
    limit: str
    block: str
    passed: str


def compile_ahead(
    preset: str,
    target: str,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    tf32: bool = False,
    batch: int | None = None,
    seq: int | None = None,
    weight_format: str | None = None,
    projector_format: str | None = None,
    moments: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Compile every generated kernel of a preset's training step for a GPU.

    Args:
        preset: of the model, as for ``qgalore train``.
        target: "sm_90", "gfx942", …: see :mod:`qgalore_compile.kernels.triton.targets`.
        out: folder for each kernel's source, PTX (or AMD's counterpart) and machine code, and ``kernels.csv``.
        dtype: of weights and activations, "bfloat16" or "float32".
        tf32: let float32 products use tensor cores.
        batch, seq: of a step; the preset's by default.
        weight_format, projector_format, moments: storage, as ``qgalore train`` has it.
        progress: is told each kernel's name.

    Raises:
        ValueError: an unknown preset, target or dtype.
        CompileError: a kernel does not compile; what was compiled before it is in ``out``.
    """
    from qgalore_compile.kernels.triton.looked_at import compiled
    from qgalore_compile.kernels.triton.targets import Target

    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype is bfloat16 or float32, got {dtype!r}")
    chip, folder = Target.named(target), Path(out)
    keys = {name: value for name, value in (("projector_format", projector_format), ("moments", moments)) if value}
    kernels = traced(
        preset,
        chip,
        getattr(torch, dtype),
        tf32=tf32,
        batch=batch,
        seq=seq,
        weight_format=weight_format,
        keys=keys,
        look=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for kernel, calls in kernels.items():
        name = f"{len(rows):02}-{name_of(kernel)}"
        progress(name)
        binary = compiled(kernel, chip)
        _keep(folder / name, kernel, binary, chip)
        rows.append(row(kernel, binary, name, calls))
        _write(folder / "kernels.csv", rows)
    return rows


def _keep(path: Path, kernel: Kernel, binary: Binary, chip: Target) -> None:
    """A kernel's source, and what became of it, in files of one stem."""
    text, code = (".ptx", ".cubin") if chip.backend == "cuda" else (".amdgcn", ".hsaco")
    path.with_name(f"{path.name}.py").write_text(kernel.source)
    path.with_name(f"{path.name}{text}").write_text(binary.text)
    path.with_name(f"{path.name}{code}").write_bytes(binary.code)
    path.with_name(f"{path.name}.asm").write_text(binary.assembly)


def traced(
    preset: str,
    target: Target,
    dtype: torch.dtype,
    *,
    tf32: bool = False,
    batch: int | None = None,
    seq: int | None = None,
    weight_format: str | None = None,
    keys: Mapping[str, Any] | None = None,
    look: bool = False,
) -> dict[Kernel, int]:
    """The kernels of a preset's step, and how often a step of ``LAYERS`` layers calls each.

    Args:
        preset, target, dtype, tf32, batch, seq, weight_format: as for :func:`compile_ahead`.
        keys: of the parameter groups.
        look: tiles are those that a GPU would take, without spills.
    """
    from qgalore_compile._torch import FakeTensorMode, dynamo_config
    from qgalore_compile.kernels.triton.kernels import made_for
    from qgalore_compile.reports.report import explain

    chosen = find_preset(preset)
    with FakeTensorMode():
        model = Llama(replace(chosen.model, num_layers=min(LAYERS, chosen.model.num_layers)))
        quantize_(move_(model, dtype), format=weight_format)
        optimizer = QGaLoreAdamW(param_groups(model, rank=chosen.rank, **(keys or {})), lr=chosen.lr)
        tokens = torch.zeros((batch or chosen.batch, seq or chosen.seq), dtype=torch.int64)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        # this function's second model must not count as the first one with other, symbolic sizes
        with made_for(target, look=look) as kernels, dynamo_config.patch(automatic_dynamic_shapes=False):
            explain(step, tokens, tokens.clone())
    finally:
        torch.set_float32_matmul_precision(before)
    return kernels


def row(kernel: Kernel, binary: Binary, name: str, calls: int) -> Row:
    """What there is to say of a compiled kernel."""
    from qgalore_compile.kernels.triton.looked_at import spills

    widths = {**binary.loads, **binary.stores}
    bound = floor(kernel, binary.target, max(1, binary.occupancy.blocks))
    return Row(
        name,
        what(kernel),
        calls,
        binary.registers,
        spills(binary),
        binary.shared,
        round(binary.occupancy.fraction, 3),
        sum(binary.tensor.values()),
        max(widths),
        min(widths),
        bound.least,
        bound.issued,
        bound.dram,
        bound.operations,
        round(bound.seconds * 1e6, 4),
        bound.limit,
        kernel.blocks,
        "; ".join(kernel.passed),
    )


class Floor(NamedTuple):
    """What bounds a kernel from below on a chip; bytes and operations as in :class:`Row`."""

    least: int
    issued: int
    dram: int
    operations: int
    seconds: float
    limit: str


def floor(kernel: Kernel, chip: Target, held: int = 1) -> Floor:
    """The least time that a kernel can take; ``held`` blocks are on a multiprocessor at a time."""
    from qgalore_compile.kernels.ir.program import BlockProgram
    from qgalore_compile.kernels.triton.tiling import peak, traffic

    work = kernel.work
    if isinstance(work, BlockProgram):
        least = issued = dram = work.bytes()
        operations = _work(work)
        seconds = operations / chip.fp32_flops
    else:
        assert kernel.tiling is not None
        moved = traffic(work, kernel.tiling, chip, held)
        least, issued, dram = (round(each) for each in (moved.least, moved.issued, moved.dram))
        own = 2 * math.prod(size or 0 for size in work.sizes)
        after = _work(work.program.epilogue) if work.program.epilogue else 0
        operations, seconds = own + after, own / peak(work, chip) + after / chip.fp32_flops
    moving = least / chip.dram_bytes_per_second
    limit = "bytes" if moving >= seconds else "operations"
    return Floor(least, issued, dram, operations, max(moving, seconds), limit)


def _work(program: Any) -> int:
    """Operations of a program: an instruction an element, or a group, or a row."""
    rows, columns, _ = program.space
    counts = {"element": rows * columns, "group": rows * program.space.groups, "row": rows, "column": columns}
    return sum(
        counts.get(each.extent, 1) for each in program.instructions if each.operation not in ("load", "constant")
    )


def name_of(kernel: Kernel) -> str:
    """What tells a kernel from most others: its sizes."""
    from qgalore_compile.kernels.ir.program import BlockProgram

    if isinstance(kernel.work, BlockProgram):
        rows, columns, width = kernel.work.space
        return f"region-{rows}x{columns}-groups-of-{width}"
    sizes = "x".join("T" if size is None else str(size) for size in kernel.work.sizes)
    return f"gemm-{sizes}{'-write-back' if kernel.work.program.epilogue else ''}"


def what(kernel: Kernel) -> str:
    """Formats of a kernel's operands, and whether a program follows."""
    from qgalore_compile.kernels.ir.program import BlockProgram

    if isinstance(kernel.work, BlockProgram):
        formats = dict.fromkeys(each.memory for each in kernel.work.buffers if each.extent == "element")
        return f"{len(kernel.work.instructions)} instructions on {', '.join(formats)}"
    program = kernel.work.program
    left, right = (_format(each, kernel.work.memory) for each in (program.left, program.right))
    return f"{left} × {right}{' → write-back' if program.epilogue else ''}"


def _format(operand: Operand, memory: str) -> str:
    """What a tile loads of an operand: its memory, or how many bits a code has."""
    from qgalore_compile.kernels.ir.memory import MEMORY

    if operand.prologue is None:
        return f"{memory}{'ᵀ' if operand.transposed else ''}"
    codes = (each.memory for each in operand.prologue.buffers if each.access == "in" and each.extent == "element")
    return f"{sum(MEMORY[each].bits for each in codes)}-bit{'ᵀ' if operand.transposed else ''}"


def _write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def table(rows: Iterable[Row], target: str, preset: str) -> Table:
    """The rows for a terminal."""
    found = Table(title=f"{preset} on {target}: bytes as least / issued / DRAM by the model of its L2, MB")
    for column in (
        "kernel",
        "what",
        "calls",
        "registers",
        "spills",
        "shared",
        "occupancy",
        "tensor",
        "access",
        "bytes",
        "operations",
        "floor, µs",
        "block",
        "passed over",
    ):
        found.add_column(column, justify="left" if column in ("kernel", "what", "block", "passed over") else "right")
    for each in rows:
        moved = " / ".join(f"{count / 1e6:.3g}" for count in (each.bytes, each.issued, each.dram))
        found.add_row(
            each.kernel,
            each.what,
            str(each.calls),
            str(each.registers),
            str(each.spills),
            str(each.shared),
            f"{each.occupancy:.2f}",
            str(each.tensor),
            f"{each.narrowest}-{each.widest}",
            moved,
            f"{each.operations:.3g}",
            f"{each.floor_us:.1f} ({each.limit})",
            each.block,
            each.passed,
        )
    return found
