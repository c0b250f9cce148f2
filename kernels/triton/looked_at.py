"""Of several tiles for a kernel, the first whose machine code keeps every value in registers.

A model chooses tiles (``tiling.py``), but what a thread's values come to is the compiler's to
say, and differs from version to version: with Triton 3.7 the write-back of a 2048 × 2048 weight in tiles of 128 × 256
needs 128 registers on sm_90, with 3.9 it spills 168 bytes.  So what came out is looked at, and the next tile is taken
where something was spilled or did not compile.  That needs the compiler and no GPU.

What was seen is kept beside Inductor's cache, by version, target and source: a process compiles to look once for each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qgalore_compile.files import replacing
from qgalore_compile.kernels.triton.targets import Target

if TYPE_CHECKING:
    from qgalore_compile.kernels.triton.ahead import Binary
    from qgalore_compile.kernels.triton.kernels import Kernel

MOST_TILES = 4
"""Tiles that are compiled to be looked at, at most; of those that all spill, the one that spills least is taken."""


class Seen(NamedTuple):
    """What a compiler made of a kernel: bytes that a thread spills, or why there is no machine code."""

    spilled: int
    problem: str = ""


def choose(kernels: Iterable[Kernel], target: Target) -> Kernel:
    """The first kernel without spills, or of ``MOST_TILES`` the one that spills least; its ``passed`` tells of those
    before it.  Where none compiles the first, whose error the compiler will tell again."""
    found: list[tuple[Kernel, Seen]] = []
    for kernel in islice(kernels, MOST_TILES):
        seen = look(kernel, target)
        if seen == Seen(0):
            return dataclasses.replace(kernel, passed=tuple(map(_told, found)))
        found.append((kernel, seen))
    best = min(found, key=lambda each: (bool(each[1].problem), each[1].spilled))
    return dataclasses.replace(best[0], passed=tuple(_told(each) for each in found if each is not best))


def _told(found: tuple[Kernel, Seen]) -> str:
    kernel, seen = found
    return f"{kernel.blocks} {seen.problem or f'spills {seen.spilled} bytes'}"


def look(kernel: Kernel, target: Target) -> Seen:
    """What becomes of a kernel: from the disk, or by compiling it."""
    path = _folder() / f"{_key(kernel, target)}.json"
    try:
        spilled, problem = json.loads(path.read_text())
        return Seen(int(spilled), str(problem))
    except (OSError, ValueError, TypeError):  # not there, or damaged
        seen = _looked(kernel, target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(seen).encode())
    except OSError:  # a full or read-only disk costs the next process a compilation
        pass
    return seen


def _looked(kernel: Kernel, target: Target) -> Seen:
    from qgalore_compile.kernels.triton.ahead import CompileError

    try:
        binary = compiled(kernel, target)
    except CompileError as error:
        return Seen(0, f"does not compile: {(error.reason.splitlines() or ['no reason given'])[0]}")
    return Seen(spills(binary))


def compiled(kernel: Kernel, target: Target) -> Binary:
    """A kernel's machine code for a target; CompileError where it has none."""
    from qgalore_compile.kernels.triton.ahead import compile_kernel
    from qgalore_compile.kernels.triton.kernels import FP_FUSION, load

    # sizes that are not known before the step are multiples of 16 or Triton compiles another variant then
    sizes = tuple(name for name in ("m", "n") if name in kernel.signature)
    return compile_kernel(
        load(kernel), kernel.signature, {}, target, num_warps=kernel.warps, num_stages=kernel.stages,
        fp_fusion=FP_FUSION, multiples=sizes,
    )  # fmt: skip


def spills(binary: Binary) -> int:
    """Bytes that a thread keeps in memory of its own; 0 where all values stay in registers.

    A stack alone tells of none: of a table's bounds, which are compared and counted, Triton 3.7 leaves an array that no
    instruction touches.
    """
    # without a stack there are none; the disassembler, which counts them, takes a second
    if not binary.stack or not binary.spilled:
        return 0
    return max(binary.stack, binary.spilled)


def _folder() -> Path:
    from qgalore_compile._torch import cache_dir

    return Path(cache_dir()) / "qgalore-tiles"


def _key(kernel: Kernel, target: Target) -> str:
    import triton

    told = [triton.__version__, target.name, kernel.source, list(kernel.signature.items()), kernel.warps, kernel.stages]
    return hashlib.sha256(json.dumps(["spills", *told]).encode()).hexdigest()[:32]
