"""A compiled step as a CUDA graph that is replayed, with the option ``cudagraphs``.

**This has not run on a GPU yet**: it is tested against a stand-in for the device (``capturing.py``).

A step of a small model queues some hundred launches from Python, one by one, and the GPU waits for them.  A CUDA graph
is one launch.  But a step decides on the host whether a subspace is due for a refresh; so, before each step, the host
asks the schedules (:func:`anything_due`): where nothing is due the graph is replayed and the host counts the schedules
itself (:func:`count`); where something is, the very same compiled code runs launch by launch, in the graph's pool of
memory.  Inductor's own CUDA graphs would cut the program at every refresh op and reorder it.

Two places wrap what is compiled.  Around all of it, where inputs are still Dynamo's, :meth:`CudaGraphs.around` asks the
schedules and puts numbers on the device.  Inside, around the program that Inductor made, :meth:`CudaGraphs.run`
captures and replays: what AOTAutograd does on the host around a program (counting writes, taking weights apart)
happens in every step.

=============  ======================================================================================================
input          in a captured graph
=============  ======================================================================================================
weights, …     where they are; one that moved (``load_state_dict(assign=True)``, ``p.data = …``, ``.to``) is seen by its
               pointer before a replay, and the graph is captured anew
given          batches of tokens, say: those that have been seen at two places are copied to one of the graph's own
numbers        lr, betas, …: 0-d tensors of the device, filled when the number on the host has changed
schedules, …   read by the host alone
=============  ======================================================================================================
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore_compile._torch import CUDAGraphPolicy, has_storage, is_traceable_wrapper_subclass
from qgalore_compile.backend import host_reads
from qgalore_compile.backend.capturing import Captured, Capturer, Program
from qgalore_compile.backend.host_reads import HostReadError, Plan
from qgalore_compile.backend.records import GraphsRecord
from qgalore_compile.subspace.scheduler import is_due, ticked_unless_due

WARM = 2
"""Calls of each size of input before it is captured: they load and tune kernels, and show which inputs move."""
KEPT = 4
"""Graphs of one program, each for other sizes of inputs; the one that was used longest ago goes first."""
FEW, FUTILE = 8, 4
"""So many captures in a row that were replayed less than so often each end capturing."""


class CudaGraphsWarning(UserWarning):
    """A step that was to be replayed runs launch by launch; the message says why."""


def anything_due(schedules: Sequence[Tensor]) -> bool:
    """Whether a step that is about to run will do more with one of its schedules than count it."""
    return any(map(is_due, schedules))


def count(schedules: Sequence[Tensor]) -> None:
    """What the refresh ops of a step in which nothing is due do to its schedules, on the CPU."""
    for schedule in schedules:
        ticked_unless_due(schedule)


class CudaGraphs:
    """Of one graph of Dynamo's.

    Attributes:
        policy: for ``torch._inductor.config.cudagraph_policy`` while it is compiled.
        told: what became of its calls so far, for the report.
    """

    def __init__(self, plan: Plan, capturer: Capturer, told: GraphsRecord) -> None:
        self.plan, self.capturer, self.told = plan, capturer, told
        self.policy = _Policy(self)
        self.problem: str | None = None
        self._programs = 0
        self._numbers: dict[int, Tensor] = {}
        self._filled: dict[int, float] = {}
        self._step: _Step | None = None
        self._ended = False
        self._seen: Counter[Any] = Counter()
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._given: list[int] | None = None  # places among the program's inputs
        self._moving: set[int] = set()
        self._last: dict[int, int] = {}
        self._futile = 0
        self._shares = True

    # -- while compiling ----------------------------------------------------------------------------------------------

    def examples(self, example_inputs: Sequence[Any]) -> list[Any]:
        """Inputs to compile for: numbers are tensors of the device."""
        self._numbers = {place: self.capturer.place_for(example_inputs[place]) for place in self.plan.numbers}
        return [self._numbers.get(place, given) for place, given in enumerate(example_inputs)]

    def take(self, code: Any) -> None:
        """Stand in front of a program of Inductor's."""
        if isinstance(code.current_callable, _InPlace):
            return
        self._programs += 1
        if self._programs > 1:
            self.problem = "it became more than one program"
        elif found := host_reads.in_program(code.source_code):
            self.problem = found
        code.current_callable = _InPlace(self, code.current_callable, frozenset(code.mutated_input_idxs))

    def check(self) -> None:
        """Raise HostReadError where what Inductor made cannot be captured."""
        if self.problem is not None:
            raise HostReadError(self.problem)

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What the step calls in place of ``compiled``."""

        def call(*inputs: Any) -> Any:
            values = self._with_numbers(inputs)
            schedules = [inputs[place] for place in self.plan.schedules]
            given = {_pointer(inputs[place]) for place in self.plan.given} if self._given is None else set()
            self._step = _Step(schedules, anything_due(schedules), given)
            try:
                return compiled(*values)
            finally:
                self._step = None

        return call

    def _with_numbers(self, inputs: Sequence[Any]) -> list[Any]:
        """A number that is filled in is an argument of its launch: nothing is copied that the host might change."""
        values = list(inputs)
        for place, tensor in self._numbers.items():
            number = inputs[place].item()
            if self._filled.get(place) != number:
                with torch.no_grad():
                    tensor.fill_(number)
                self._filled[place] = number
            values[place] = tensor
        return values

    # -- while running ------------------------------------------------------------------------------------------------

    def run(self, program: Program, written: frozenset[int], inputs: list[Any]) -> list[Any]:
        """One call of the program: a replay, or the program itself."""
        given = list(inputs)
        inputs.clear()  # as Inductor's own code does, so that what nobody else holds can go
        step = self._step
        if step is None or self._ended:
            return self._plainly(program, given)
        self._look(given, step)
        if step.due:
            self.told.due += 1
            return self._beside(program, given)
        key = self._key(given)
        if self._seen[key] < WARM:
            self._seen[key] += 1
            return self._beside(program, given)
        graph = self._graphs.get(key)
        if graph is not None and graph.moved(given):
            self._futile = self._futile + 1 if graph.replays < FEW else 0
            self._graphs.clear()  # where one tensor moved, the other graphs point to where it was as well
            graph = None
        if self._futile >= FUTILE:
            return self._end(
                f"its inputs live elsewhere in nearly every step: {FUTILE} graphs were replayed less than {FEW} times "
                "each; keep parameters, states and gradients where they are between steps",
                program, given,
            )  # fmt: skip
        if graph is not None:
            self._graphs.move_to_end(key)
            count(step.schedules)
            return self._replayed(graph, given)
        return self._captured(key, program, written, given, step)

    def _key(self, given: list[Any]) -> Any:
        """What a graph was captured for, beside places: numbers among the inputs, and sizes of what is given."""
        assert self._given is not None
        sizes = [(each.shape, each.stride()) for each in map(given.__getitem__, self._given)]
        return (*sizes, *(each for each in given if not isinstance(each, Tensor)))

    def _look(self, given: list[Any], step: _Step) -> None:
        """See which of the given inputs move."""
        if self._given is None:
            self._given = [place for place, each in enumerate(given)
                           if isinstance(each, Tensor) and each.numel() and each.data_ptr() in step.given]  # fmt: skip
        for place in self._given:
            if place not in self._moving:
                at = given[place].data_ptr()
                if self._last.setdefault(place, at) != at:
                    self._moving.add(place)
                    self._forget()

    def _forget(self) -> None:
        self._graphs.clear()  # whose memory is the pool's again

    def _plainly(self, program: Program, given: list[Any]) -> list[Any]:
        self.told.eager += 1
        return program(given)

    def _beside(self, program: Program, given: list[Any]) -> list[Any]:
        """Launch by launch; where there are graphs, in their memory."""
        if not self._graphs or not self._shares:
            return self._plainly(program, given)
        self.told.eager += 1
        try:
            outputs = self.capturer.beside(program, given)
        except BaseException:
            self._forget()  # what the call has left in the pool, or its traceback holds, no replay may write over
            raise
        left = self.capturer.left_alive(outputs)
        places = _storages(given)
        outputs = [_fresh(each, places) for each in outputs]
        if left is not None:
            self._forget()
            self._shares = False
            _warn(f"keeps memory apart for steps that are not replayed, for one left something alive: {left}")
        return outputs

    def _captured(
        self, key: Any, program: Program, written: frozenset[int], given: list[Any],
        step: _Step,
    ) -> list[Any]:  # fmt: skip
        """Capture a step, and have it replayed: that is when the device does it, once."""
        moving = sorted(self._moving)
        if both := written.intersection(moving):
            return self._end(
                f"{_described(given[min(both)])} is written by the step and lives elsewhere each time; keep it where "
                "it is", program, given,
            )  # fmt: skip
        while len(self._graphs) >= KEPT:
            self._graphs.popitem(last=False)
        static = list(given)
        for place in moving:
            static[place] = _beside(given[place])
        before = [each.clone() for each in step.schedules]
        try:
            captured = self.capturer.capture(program, static)
        except BaseException as error:
            self._forget()
            for schedule, old in zip(step.schedules, before, strict=True):
                schedule.copy_(old)  # as far as the host had come
            if not isinstance(error, Exception):
                raise
            return self._end(f"it cannot be captured: {type(error).__name__}: {error}", program, given)
        self.told.captures += 1
        graph = _Graph.of(captured, static, moving)
        self._graphs[key] = graph
        return self._replayed(graph, given)

    def _replayed(self, graph: _Graph, given: list[Any]) -> list[Any]:
        try:
            for place, copy in graph.copies.items():
                copy.copy_(given[place])
            graph.captured.replay()
        except BaseException:
            self._forget()
            raise
        graph.replays += 1
        self.told.replays += 1
        return [_fresh(each, graph.kept) for each in graph.captured.outputs]

    def _end(self, reason: str, program: Program, given: list[Any]) -> list[Any]:
        """No graphs from now on."""
        self._forget()
        self._ended = True
        self.told.ended = reason
        _warn(f"runs launch by launch from now on, without CUDA graphs, for {reason}")
        return self._plainly(program, given)


class _Step(NamedTuple):
    """What the host knows of a step that is about to run: its schedules, whether one is due, where the tensors are that
    were given."""

    schedules: list[Tensor]
    due: bool
    given: set[int]


class _Graph:
    """A captured program.

    Attributes:
        copies: places of inputs that are copied before a replay, and where to.
        kept: storages of the other inputs: an output that is one of them is handed out as it is.
        replays: so far.
    """

    def __init__(
        self, captured: Captured, pointers: tuple[int, ...], copies: dict[int, Tensor], kept: set[int]
    ) -> None:
        self.captured, self.pointers, self.copies, self.kept = captured, pointers, copies, kept
        self.replays = 0

    @classmethod
    def of(cls, captured: Captured, static: list[Any], moving: list[int]) -> _Graph:
        copies = {place: static[place] for place in moving}
        rest = [each for place, each in enumerate(static) if place not in copies]
        return cls(captured, _pointers(static, copies), copies, _storages(rest))

    def moved(self, given: list[Any]) -> bool:
        """Whether an input that is not copied is elsewhere than when the graph was captured."""
        return _pointers(given, self.copies) != self.pointers


class _InPlace:
    """Stands where Inductor's program stood."""

    _boxed_call = True  # one list instead of arguments

    def __init__(self, graphs: CudaGraphs, program: Callable[..., Any], written: frozenset[int]) -> None:
        self.graphs, self.program, self.written = graphs, program, written

    def __call__(self, inputs: list[Any]) -> Any:
        return self.graphs.run(self.program, self.written, inputs)


class _Policy(CUDAGraphPolicy):
    """Hands the whole program over, refresh ops and all, once it is compiled or has come from a cache."""

    def __init__(self, graphs: CudaGraphs) -> None:
        self.graphs = graphs

    def should_wrap(self, compiled_graph: Any) -> bool:
        """Nothing is left to Inductor's own CUDA graphs."""
        return False

    def wrap_output(self, output_code: Any) -> Any:
        """Put :class:`CudaGraphs` in front of it."""
        self.graphs.take(output_code)
        return output_code


def _pointer(tensor: Tensor) -> int:
    """Of a tensor that has elements at a place of its own; 0 of others."""
    return tensor.data_ptr() if has_storage(tensor) and not is_traceable_wrapper_subclass(tensor) else 0


def _pointers(inputs: list[Any], without: dict[int, Tensor]) -> tuple[int, ...]:
    return tuple([each.data_ptr() for place, each in enumerate(inputs)
                  if isinstance(each, Tensor) and place not in without])  # fmt: skip


def _storages(inputs: Sequence[Any]) -> set[int]:
    return {each.untyped_storage().data_ptr() for each in inputs if isinstance(each, Tensor)} - {0}


def _fresh(output: Any, kept: set[int]) -> Any:
    """An output that no replay writes over, with its strides, elements that share a place included."""
    if not isinstance(output, Tensor) or output.untyped_storage().data_ptr() in kept:
        return output
    return _beside(output)


def _beside(tensor: Tensor) -> Tensor:
    """A copy of a tensor with the same strides."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    with torch.no_grad():
        tensor = tensor.detach()
        span = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
        return span.clone().as_strided(tensor.shape, tensor.stride(), 0)


def _warn(what: str) -> None:
    warnings.warn(f"backend 'qgalore': the step {what}", CudaGraphsWarning, stacklevel=2)


def _described(tensor: Tensor) -> str:
    return f"an input of {tensor.dtype} {tuple(tensor.shape)}"
