"""Triton kernels compiled ahead of time, for GPUs that need not be there, and what their machine code contains.

Nothing here runs a kernel or asks for a driver: the compiler is given a :class:`Target`, and what it made is read from
its assembly, for NVIDIA's GPUs with the ``cuobjdump`` that Triton's package carries.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qgalore_compile.kernels.triton.targets import Occupancy, Target

_TENSOR_MEMORY = 512
"""Columns of tensor memory that a block can have, where there is any (PTX ISA, "Tensor Memory")."""

# An instruction's name at its line's place for one, after a predicate: a search of the whole text for "MMA" or "DADD"
# finds symbols, comments and debug information too.
_SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_AMD_LINE = re.compile(r"^\t([a-z]\w*)", re.MULTILINE)

# SASS is written in capitals and AMD's assembly is not, so that one expression names the instructions of both.
_LOAD = re.compile(r"(?:LDG|LDGSTS|LD|UTMALDG)(?:\.|$)|UBLKCP\.S\.G|(?:global|buffer|flat)_load_")
_STORE = re.compile(r"(?:STG|ST|UTMASTG)(?:\.|$)|UBLKCP\.G\.S|(?:global|buffer|flat)_store_")
_SPILL_LOAD = re.compile(r"LDL(?:\.|$)|scratch_load_")
_SPILL_STORE = re.compile(r"STL(?:\.|$)|scratch_store_")
_TENSOR = re.compile(r"(?:[A-Z]G?MMA|UTC[A-Z]*MMA)(?:\.|$)|v_(?:mfma|smfmac)_")
_FP64 = re.compile(r"D(?:ADD|MUL|FMA|MNMX|SETP|MMA)(?:\.|$)|v_(?!cvt_)\w*f64")

_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_WIDTHS |= {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "ushort": 2, "sshort": 2, "short": 2}
_WIDTHS |= {"ubyte": 1, "sbyte": 1, "byte": 1}


class CompileError(Exception):
    """A kernel that a target cannot run.

    Attributes:
        kernel: its name.
        target: the target's name.
        reason: the compiler's message, or the limit of the target that is exceeded.
    """

    def __init__(self, kernel: str, target: str, reason: str) -> None:
        super().__init__(f"{kernel} does not compile for {target}: {reason}")
        self.kernel, self.target, self.reason = kernel, target, reason


@dataclass(frozen=True, eq=False)
class Binary:
    """A compiled kernel, and what its machine code contains.

    Counts are of the code as it stands: what is in a loop counts once.  They are taken when first asked for, since the
    disassembler needs a second.

    Attributes:
        kernel: its name.
        target: what it was compiled for.
        text: PTX, or AMD's assembly.
        code: the file that a driver loads: cubin or hsaco.
        warps: of a block; more than were asked for where warps are specialised.
        registers: a thread, 32 bits each; on AMD's, vector and accumulation registers.
        stack: bytes of its own that a thread has in memory: the slots of spilled registers, if it has no arrays.
        shared: bytes of a block, static and dynamic, without what the driver reserves.
        tensor_memory: columns of a block (sm_100), or 0.
    """

    kernel: str
    target: Target
    text: str = field(repr=False)
    code: bytes = field(repr=False)
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int

    @cached_property
    def assembly(self) -> str:
        """The machine code as text: SASS, or AMD's assembly."""
        return _cuobjdump(self.code, "-sass") if self.target.backend == "cuda" else self.text

    @cached_property
    def instructions(self) -> Counter[str]:
        """How many there are of each, named with modifiers: "LDG.E.128", "v_add_f32_e32"."""
        line = _SASS_LINE if self.target.backend == "cuda" else _AMD_LINE
        return Counter(line.findall(self.assembly))

    @property
    def loads(self) -> Counter[int]:
        """How many instructions load from global memory, by bytes a thread; a bulk copy counts as 16."""
        return self._widths(_LOAD)

    @property
    def stores(self) -> Counter[int]:
        """How many instructions store to global memory, by bytes a thread; atomic ones are left out."""
        return self._widths(_STORE)

    @property
    def spill_loads(self) -> Counter[int]:
        """How many instructions load from the stack, by bytes a thread."""
        return self._widths(_SPILL_LOAD)

    @property
    def spill_stores(self) -> Counter[int]:
        """How many instructions store to the stack, by bytes a thread."""
        return self._widths(_SPILL_STORE)

    @property
    def spilled(self) -> int:
        """Bytes that those instructions move: the spill stores and spill loads of ``ptxas -v``, added."""
        return sum(width * count for width, count in (self.spill_loads + self.spill_stores).items())

    @property
    def tensor(self) -> Counter[str]:
        """The tensor cores' instructions among :attr:`instructions`."""
        return self._matching(_TENSOR)

    @property
    def fp64(self) -> Counter[str]:
        """Arithmetic and comparisons in fp64 among :attr:`instructions`; conversions alone are none."""
        return self._matching(_FP64)

    @property
    def occupancy(self) -> Occupancy:
        """How many blocks a multiprocessor of the target holds at once."""
        return self.target.occupancy(self.registers, self.shared, self.warps)

    def _matching(self, pattern: re.Pattern[str]) -> Counter[str]:
        return Counter({name: count for name, count in self.instructions.items() if pattern.match(name)})

    def _widths(self, pattern: re.Pattern[str]) -> Counter[int]:
        widths: Counter[int] = Counter()
        for name, count in self._matching(pattern).items():
            widths[_width(name)] += count
        return widths


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    target: Target,
    num_warps: int,
    num_stages: int,
    *,
    fp_fusion: bool = False,
    multiples: Collection[str] = (),
    unaligned: Collection[str] = (),
    options: Mapping[str, object] | None = None,
    cache: Path | None = None,
) -> Binary:
    """Compile a kernel for a target.

    Args:
        fn: what ``triton.jit`` made.
        signature: the type of each argument that is not in ``constexprs``: "*bf16", "fp32", "i32".
        constexprs: the value of each compile-time argument.
        target: need not be in the machine.
        num_warps: of a block, a power of two.
        num_stages: of the software pipeline of loops.
        fp_fusion: whether a × b + c may become one multiply-add, rounded once.  Triton's own default differs from
            version to version; False gives what the operators of PyTorch give.
        multiples: integer arguments that are multiples of 16 in every launch.
        unaligned: pointers that may not be 16-byte aligned.  All others are taken to be, as Triton's launcher takes
            them from PyTorch's allocator: without that, no access is wider than an element.
        options: more of Triton's for this backend: "maxnreg", "waves_per_eu".
        cache: folder for what Triton compiled; None is Triton's own, ``TRITON_CACHE_DIR``.

    Raises:
        CompileError: the compiler refuses the kernel, or it exceeds a limit of the target that the compiler does not
            know: shared memory, tensor memory, threads.  A driver would say so at the first launch.
        ValueError: signature and constexprs are not the kernel's arguments, each once.
        TypeError: ``fn`` is wrapped, or was defined under ``TRITON_INTERPRET``.
    """
    import triton
    from triton.errors import TritonError

    if not isinstance(fn, triton.JITFunction):
        raise TypeError(f"not a function that triton.jit made to be compiled: {fn!r}")
    source = _source(fn, signature, constexprs, unaligned, multiples)
    every = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion, **(options or {})}
    try:
        with _cached_in(cache):
            compiled = _again_after_a_race(lambda: triton.compile(source, target=target.triton, options=every))
    # What the parts of Triton raise: its own for the kernel's text and ptxas, RuntimeError for MLIR's passes,
    # ValueError and AssertionError for options.
    except (TritonError, RuntimeError, ValueError, AssertionError) as error:
        raise CompileError(fn.__name__, target.name, str(error)) from error
    binary = _binary(compiled, target)
    if excess := _excess(binary, target):
        raise CompileError(fn.__name__, target.name, excess)
    return binary


_RACES = 5
"""Attempts at most; a race is met about once in a thousand kernels that two threads compile."""


def _again_after_a_race(compile_it: Callable[[], Any], attempts: int = _RACES) -> Any:
    """What a call returns, made again where ``ast.parse`` has counted the recursion of another thread as its own.

    CPython 3.11 keeps that count for all threads together (https://github.com/python/cpython/issues/106905).
    """
    try:
        return compile_it()
    except SystemError as error:
        if "recursion depth mismatch" not in str(error) or attempts == 1:
            raise
    return _again_after_a_race(compile_it, attempts - 1)


def _source(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    unaligned: Collection[str],
    multiples: Collection[str],
) -> Any:
    """The kernel with its arguments' types, values and alignments, as Triton's compiler takes it."""
    from triton.compiler import ASTSource

    names = fn.arg_names
    if sorted(names) != sorted([*signature, *constexprs]):
        raise ValueError(f"arguments of {fn.__name__} are {names}, not {[*signature, *constexprs]}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    aligned = {name for name, kind in types.items() if kind.startswith("*")}.difference(unaligned).union(multiples)
    return ASTSource(
        fn,
        types,
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def _excess(binary: Binary, target: Target) -> str:
    """Which limit of the target, unknown to the compiler, the kernel exceeds and by how much; empty for none."""
    for what, used, most in (
        ("bytes of shared memory", binary.shared, target.shared_per_block),
        ("columns of tensor memory", binary.tensor_memory, _TENSOR_MEMORY),
        ("threads a block", binary.warps * target.warp_size, target.threads_per_block),
    ):
        if used > most:
            return f"{used} {what}, of at most {most}"
    return ""


@contextmanager
def _cached_in(folder: Path | None) -> Iterator[None]:
    """Let Triton keep what it compiles in a folder, for so long; the setting is the process's, not a thread's."""
    if folder is None:
        yield
        return
    from triton import knobs

    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        yield


def _binary(compiled: Any, target: Target) -> Binary:
    metadata = compiled.metadata
    if target.backend == "cuda":
        text, code = compiled.asm["ptx"], compiled.asm["cubin"]
        usage = _cuobjdump(code, "-res-usage")
        registers, stack, static = (max(_numbers(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK", "SHARED"))
        # From sm_90 on, what the driver reserves is counted in, in kernels that use shared memory at all.
        if target.capability is not None and target.capability >= (9, 0):
            static = max(0, static - target.shared_reserved)
    else:
        text, code = compiled.asm["amdgcn"], compiled.asm["hsaco"]
        fields = ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
        registers, stack, static = (max(_numbers(rf"^\s+\.{name}:\s+(\d+)", text)) for name in fields)
    return Binary(
        kernel=compiled.name,
        target=target,
        text=text,
        code=code,
        warps=metadata.num_warps,
        registers=registers,
        stack=stack,
        shared=static + metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
    )


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text, re.MULTILINE)]


def _cuobjdump(code: bytes, option: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        # stderr too, or sm_80's warnings of an older file format would be shown at every call
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _width(instruction: str) -> int:
    """Bytes a thread of a memory instruction."""
    if instruction.startswith("U"):  # a bulk copy, whose size is in a register: a multiple of 16 (PTX ISA)
        return 16
    return next((_WIDTHS[part] for part in re.split(r"[._]", instruction) if part in _WIDTHS), 4)
