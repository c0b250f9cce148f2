"""How a step's launches become a graph that the device replays: a small interface, and CUDA's side of it.

**CUDA's side has not run on a GPU yet.**  What the interface asks for is tested with a stand-in on the CPU
(``tests/helpers/fake_capture.py``) that forgets, repeats and overwrites what a GPU would.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from qgalore_compile._torch import FakeTensor, StorageWeakRefWrapper, check_memory_pool, clear_cublas_manager

Program = Callable[[list[Any]], list[Any]]
"""What Inductor made of a graph: from a list of inputs, which it empties, to outputs."""


class Captured(Protocol):
    """A graph of one call.

    Attributes:
        outputs: the call's, in the pool: each replay writes them anew.
    """

    outputs: list[Any]

    def replay(self) -> None:
        """Queue all of it on the current stream."""


class Capturer(Protocol):
    """One device, with one stream and one pool of memory that every captured graph and every call beside one shares."""

    def on_host(self, tensor: Tensor) -> bool:
        """Whether kernels do not reach a tensor, so that a launch would take its value as an argument."""

    def place_for(self, number: Tensor) -> Tensor:
        """A 0-d tensor of the device, of a number's dtype."""

    def beside(self, program: Program, inputs: list[Any]) -> list[Any]:
        """Run a call in the pool, where its tensors take the place of the graphs' own; the outputs are of the pool, and
        valid until the next call or replay."""

    def left_alive(self, outputs: list[Any]) -> str | None:
        """What lives in the pool behind a call beside its outputs and those of graphs, in words: a replay would write
        over it."""

    def capture(self, program: Program, inputs: list[Any]) -> Captured:
        """Record what a call launches.  The host does all of its part; the device does nothing until a replay.

        Raises:
            RuntimeError: the device, or the call, does what cannot be part of a graph; or something of it lives on.
        """


class CudaCapturer:
    """:class:`Capturer` of an NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs: WeakSet[_CudaGraph] = WeakSet()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Blocks of a pool belong to the stream that they were allocated on: with another, nothing would be reused."""
        return torch.cuda.Stream(self.device)

    @cached_property
    def pool(self) -> torch.cuda.MemPool:
        """Alive as long as this: what a graph's memory is taken from must not go with the first graph."""
        return torch.cuda.MemPool()

    def on_host(self, tensor: Tensor) -> bool:
        """As :class:`Capturer` says."""
        return tensor.device.type == "cpu"

    def place_for(self, number: Tensor) -> Tensor:
        """As :class:`Capturer` says."""
        with number.fake_mode if isinstance(number, FakeTensor) else nullcontext():
            return torch.zeros((), dtype=number.dtype, device=self.device)

    def beside(self, program: Program, inputs: list[Any]) -> list[Any]:
        """As :class:`Capturer` says."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        # A workspace of cuBLAS' that was made in the pool would outlive the call.
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(self.stream),
            clear_cublas_manager(),
            torch.cuda.use_mem_pool(self.pool, self.device),
        ):
            outputs = program(list(inputs))
        here.wait_stream(self.stream)
        return outputs

    def capture(self, program: Program, inputs: list[Any]) -> Captured:
        """As :class:`Capturer` says."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": a thread that pins memory for a data loader may go on.  Entering waits for the device, and
        # gives back what the allocator holds unused: what the first calls took in the common pool.
        pool: Any = self.pool.id  # a handle, of which torch's annotations have a type of its own
        with (
            torch.cuda.device(self.device),
            clear_cublas_manager(),
            torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            outputs = program(list(inputs))
        captured = _CudaGraph(graph, outputs)
        self.graphs.add(captured)
        if left := self.left_alive([]):
            raise RuntimeError(left)
        return captured

    def left_alive(self, outputs: list[Any]) -> str | None:
        """As :class:`Capturer` says."""
        alive = [*outputs, *(each for graph in self.graphs for each in graph.outputs)]
        in_pool = {each["address"]: each["total_size"] for each in self.pool.snapshot()}
        storages = [each.untyped_storage() for each in alive if isinstance(each, Tensor)]
        ours = [storage for storage in storages
                if any(0 <= storage.data_ptr() - start < size for start, size in in_pool.items())]  # fmt: skip
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        try:
            check_memory_pool(index, self.pool.id, [StorageWeakRefWrapper(each) for each in ours])
        except RuntimeError as error:
            return str(error)
        return None


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: list[Any]) -> None:
        self.graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self.graph.replay()


CAPTURERS: dict[str, Callable[[torch.device], Capturer]] = {"cuda": CudaCapturer}
"""By the type of device."""

_made: dict[torch.device, Capturer] = {}


def capturer_of(device: torch.device) -> Capturer | None:
    """The one capturer of a device; None where steps cannot be captured."""
    if device.type not in CAPTURERS:
        return None
    if device not in _made:
        _made[device] = CAPTURERS[device.type](device)
    return _made[device]
