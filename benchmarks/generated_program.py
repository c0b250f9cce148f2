"""A program that Inductor generated, run on fake tensors: which buffers are live, call by call.

The module runs as it is, its C++ kernels replaced by stand-ins that only note what they write.  So allocations, `del`,
reuse, views, outputs of library calls and outlined subgraphs mean what they mean in Python; nothing is parsed.  What an
op allocates inside is not seen.  Used by `live_bytes.py`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import weakref
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FILE = "<generated program>"
NOT_WRITTEN = "not written yet"
NO_CALLS = ("prim.", "aten.as_strided", "aten.view", "aten.permute", "aten.t.", "aten.detach", "aten.empty_strided")


class Program(NamedTuple):
    """A module that Inductor generated, and what it is called with."""

    source: str
    inputs: list[Any]
    constants: dict[str, Any]


@dataclasses.dataclass
class Buffer:
    """A storage that the program made.

    `writer` is the kernel or op that wrote it last; NOT_WRITTEN at the peak means: the call at the peak writes it.
    """

    name: str
    shape: list[int]
    dtype: str
    bytes: int
    writer: str = NOT_WRITTEN


class Point(NamedTuple):
    """Live bytes when the program calls `op` in line `line`: with its output, and with what it lets go after."""

    line: int
    op: str
    live: int


class Ledger(TorchDispatchMode):
    """Follows the storages of a program while it runs.

    Attributes:
        points: one for each call of a kernel or op.
        live, peak: bytes that are live, and the most that were.
        peak_allocation: the number of the allocation that reached the peak.
        at_peak: the buffers at allocation `snapshot`, largest first.
    """

    def __init__(self, source: str, inputs: list[Any], snapshot: int) -> None:
        super().__init__()
        self.lines, self.snapshot = source.splitlines(), snapshot
        self.resident = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in inputs if _is(t)}
        self.buffers: dict[int, Buffer] = {}
        self.live = self.peak = self.allocations = self.peak_allocation = 0
        self.at_peak: list[Buffer] = []
        self.points: list[Point] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        op, tensors = str(func), [leaf for leaf in tree_leaves(result) if _is(leaf)]
        for tensor in tensors:
            self._own(tensor)
        if not op.startswith(NO_CALLS):
            self.called(op, tensors)
        return result

    def called(self, op: str, written: list[Tensor]) -> None:
        """The program has called `op`, which wrote `written`."""
        frames = _frames()
        above = self.lines[frames[0].f_lineno - 2] if frames else ""
        if origin := re.search(r"Source Nodes: \[(.*?)\]", above):  # Inductor's comment: which of many mm it is
            op = f"{op} [{origin[1][-80:]}]"
        for tensor in written:
            if buffer := self.buffers.get(tensor.untyped_storage()._cdata):
                buffer.writer = op
        self.points.append(Point(frames[0].f_lineno if frames else 0, op, self.live))

    def _own(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.buffers or key in self.resident:
            return
        frames = _frames()
        target = self.lines[frames[0].f_lineno - 1].split(" = ")[0].strip() if frames else "?"
        self.buffers[key] = Buffer(target, list(tensor.shape), str(tensor.dtype)[6:], storage.nbytes())
        self.live += self.buffers[key].bytes
        weakref.finalize(storage, self._free, key).atexit = False
        self.allocations += 1
        if self.live > self.peak:
            self.peak, self.peak_allocation = self.live, self.allocations
        if self.allocations == self.snapshot:
            self.at_peak = self._named()

    @property
    def peak_place(self) -> int:
        """The number of the call, from 0, when most was live."""
        return max(range(len(self.points)), key=lambda index: self.points[index].live)

    def _free(self, key: int) -> None:
        self.live -= self.buffers.pop(key).bytes

    def _named(self) -> list[Buffer]:
        """The live buffers, by the names and shapes that they have now: one that is reused changes both."""
        now = {key: dataclasses.replace(buffer) for key, buffer in self.buffers.items()}
        variables = [item for frame in _frames() for item in frame.f_locals.items() if _is(item[1])]
        for name, value in sorted(variables, key=lambda item: item[1].nbytes):  # the whole after its views
            if buffer := now.get(value.untyped_storage()._cdata):
                buffer.name, buffer.shape, buffer.dtype = name, list(value.shape), str(value.dtype)[6:]
        return sorted(now.values(), key=lambda buffer: -buffer.bytes)


class Kernel:
    """In place of a C++ kernel: tells the ledger what it would have written."""

    def __init__(self, argument_types: list[str]) -> None:
        self.writes = ["*" in each and "const" not in each for each in argument_types]
        self.name, self.ledger = "", None

    def __call__(self, *arguments: Any) -> None:
        written = [each for each, writes in zip(arguments, self.writes, strict=True) if writes]
        self.ledger.called(self.name, written)


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _frames() -> list[FrameType]:
    """The frames of the generated program, the innermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename == FILE:
            found.append(frame)
        frame = frame.f_back
    return found


def walk(program: Program) -> Ledger:
    """Run the program on fake tensors: once to find the peak, once to say what it consists of.

    Twice, because Python before 3.13 holds on to a frame's locals once one has looked at them.
    """
    ledger = _walk(program, 0)
    ledger.at_peak = _walk(program, ledger.peak_allocation).at_peak
    assert sum(buffer.bytes for buffer in ledger.at_peak) == ledger.peak
    return ledger


def _walk(program: Program, snapshot: int) -> Ledger:
    """Run it once; `at_peak` is of allocation number `snapshot` (from 1)."""
    module: dict[str, Any] = {"__name__": "generated"}
    with mock.patch.object(AsyncCompile, "cpp_pybinding", lambda self, types, source: Kernel(types)):
        exec(compile(program.source, FILE, "exec"), module)
    with FakeTensorMode() as mode:
        inputs = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype) if _is(each) else each
            for each in program.inputs
        ]
        constants = {name: mode.from_tensor(c) if _is(c) else c for name, c in program.constants.items()}
        ledger = Ledger(program.source, [*inputs, *constants.values()], snapshot)
        for name, kernel in module.items():
            if isinstance(kernel, Kernel):
                kernel.name, kernel.ledger = name, ledger
        module |= constants | {  # in place of C functions that bypass dispatch
            "empty_strided_cpu": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
            "reinterpret_tensor": lambda t, size, stride, offset=0: t.as_strided(
                size, stride, t.storage_offset() + offset
            ),
            "assert_size_stride": lambda *_: None,
            "assert_alignment": lambda *_: None,
        }
        with ledger:
            module["call"](list(inputs))
    return ledger
