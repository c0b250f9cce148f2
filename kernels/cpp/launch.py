"""Programs on a CPU: compile, cache and launch."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from threading import Thread
from typing import Any

from torch import Tensor

from qgalore_compile import progress
from qgalore_compile._torch import (
    CppCodeCache,
    CppPythonBindingsCodeCache,
    InvalidCxxCompiler,
    ShortenTraceback,
    get_cpp_compiler,
)
from qgalore_compile._torch import inductor_config as config
from qgalore_compile.kernels.cpp.printer import print_cpp
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import BlockProgram

# Inductor's flags switch loop vectorisation off for GCC, since it vectorises itself; they keep errno, for which no
# square root vectorises, and with GCC end up with trapping arithmetic, for which no floor does.
_FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno", "-fno-trapping-math")

_INSTALL = {
    "linux": "`apt install g++` on Debian and Ubuntu, `dnf install gcc-c++` on Fedora, or conda's package gxx",
    "darwin": "`xcode-select --install`",
    "win32": 'the Visual Studio Build Tools, with "Desktop development with C++"',
}


class NoCompilerError(ShortenTraceback, RuntimeError):
    """No C++ compiler; the message says what was looked for and what to install.

    A ``ShortenTraceback``, which Dynamo hands through as it is instead of wrapping it.
    """

    def __init__(self) -> None:
        named = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else [config.cpp.cxx]
        looked_for = ", ".join(repr(each) for each in named if each)
        super().__init__(
            f"backend 'qgalore' found no C++ compiler: looked for {looked_for}, which the environment variable CXX "
            f"sets. Install one: {_INSTALL.get(sys.platform, 'GCC or Clang')}. On a CPU no option goes on without it, "
            "since Inductor's own code is C++ too; the step runs without torch.compile",
            first_useful_frame=None,
        )


def check_compiler() -> None:
    """Raise :class:`NoCompilerError` unless there is a C++ compiler that runs."""
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:  # OSError: found, but not to be executed
        raise NoCompilerError from error


_EMPTY = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(const float* x) {}\n'


@cache
def prepare() -> None:
    """Begin on a thread of its own, once a process, what the first kernel of Inductor's would wait for: to learn which
    vector instructions there are, by a compilation for each, and to compile its header ahead: seconds of one core,
    while the step is traced on another."""
    Thread(target=_prepare, name="qgalore-prepare", daemon=True).start()


def _prepare() -> None:
    with suppress(Exception):  # whoever needs it meets the error, and can tell it
        CppPythonBindingsCodeCache.load_pybinding(["const float*"], _EMPTY, needs_vec_isa=True)


@cache
def compilers() -> ThreadPoolExecutor:
    """Threads that each wait for a compiler; as many as Inductor would have processes for it."""
    return ThreadPoolExecutor(max(1, config.compile_threads or 1), thread_name_prefix="qgalore-compiler")


class Kernel:
    """A program, compiled on another thread from when this is made, and loaded when it is first needed.

    Attributes:
        program: what it runs.

    Raises:
        NoCompilerError: no C++ compiler.
    """

    def __init__(self, program: BlockProgram) -> None:
        self.program = program
        check_compiler()
        self._load: Any = CppCodeCache.load_async(
            print_cpp(program), needs_vec_isa=True, extra_flags=_FLAGS, submit_fn=progress.counted(compilers().submit)
        )

    @cached_property
    def _run(self) -> Any:
        run = self._load().run
        run.restype = None
        run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4
        return run

    def wait(self) -> None:
        """Return when it can be launched; raises ``torch._inductor.exc.CppCompileError``, with what the compiler says,
        where it cannot."""
        _ = self._run

    @cached_property  # anew for every launch it took 40 µs of an update of a 512×1376 weight, which takes 0.9 ms
    def pitches(self) -> tuple[int, ...]:
        """Of whole contiguous matrices: elements from one row to the next, of packed ones bytes."""
        columns = self.program.space.columns
        return tuple(MEMORY[buffer.memory].pitch(columns) for buffer in self.program.buffers)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Of the tensors that a call is given, those that are written before those that are read, each one's buffer."""
        places = range(len(self.program.buffers))
        written = [place for place in places if self.program.buffers[place].access != "in"]
        return (*written, *(place for place in places if place not in written))

    @cached_property
    def pack(self) -> Any:
        """From an address by buffer, as arguments, to what a launch takes: an array of ctypes takes three times as
        long to fill."""
        return struct.Struct(f"{len(self.program.buffers)}P").pack

    @cached_property
    def _whole(self) -> tuple[Any, int, int]:
        return (ctypes.c_int64 * len(self.pitches))(*self.pitches), self.program.space.rows, self.program.space.groups

    def addresses(self, order: Sequence[int], tensors: Sequence[Tensor]) -> list[int]:
        """Addresses by buffer, to be packed: of one tensor for each place in ``order``, 0 for others."""
        addresses = [0] * len(self.program.buffers)
        for place, tensor in zip(order, tensors, strict=True):
            addresses[place] = tensor.data_ptr()
        return addresses

    def launch(
        self, pointers: Any, pitches: Any, numbers: Any, row_0: int, row_1: int, group_0: int, group_1: int
    ) -> None:
        """Run the program on some rows and groups, given packed addresses and arrays of int64."""
        self._run(pointers, pitches, numbers, row_0, row_1, group_0, group_1)

    def run(self, written: Sequence[Tensor], read: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Run the program on its whole space; contiguous tensors as for ``gemm.named``."""
        pitches, rows, groups = self._whole
        pointers = self.pack(*self.addresses(self.order, [*written, *read]))
        self._run(pointers, pitches, packed(numbers), 0, rows, 0, groups)

    def __call__(self, tensors: Mapping[str, Tensor], numbers: Sequence[int] = ()) -> None:
        """Run the program on its whole space, given one contiguous tensor for each buffer by its name."""
        self.run([tensors[self.program.buffers[place].name] for place in self.order], (), numbers)


class BlockByBlock:
    """A kernel to one of whose buffers a block of rows is handed in at a time, shifted to where the whole would begin.

    Args:
        kernel: launched on some rows and groups.
        buffer: name of the one; each of its rows has ``columns`` elements.
    """

    def __init__(self, kernel: Kernel, buffer: str, columns: int) -> None:
        self.kernel, self.columns = kernel, columns
        names = [each.name for each in kernel.program.buffers]
        self.place = names.index(buffer)
        self.order = [place for place in kernel.order if place != self.place]
        self.pitches: Any = (ctypes.c_int64 * len(names))(*kernel.pitches)

    def on(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Callable[..., None]:
        """What launches it on a block (rows, columns), given its first row and the bounds of the launch; ``tensors``
        are those of the other buffers, those that are written before those that are read."""
        addresses, held = self.kernel.addresses(self.order, tensors), packed(numbers)

        def launch(block: Tensor, first: int, *bounds: int) -> None:
            addresses[self.place] = block.data_ptr() - first * self.columns * block.element_size()
            self.kernel.launch(self.kernel.pack(*addresses), self.pitches, held, *bounds)

        return launch


def packed(numbers: Sequence[int]) -> bytes | None:
    """Numbers as a launch takes them, an array of int64."""
    return struct.pack(f"{len(numbers)}q", *numbers) if numbers else None


@cache
def kernel(text: str) -> Kernel:
    """The kernel of a program's text, one a process, and its code one in torch's cache of compiled code."""
    return Kernel(BlockProgram.parse(text))
