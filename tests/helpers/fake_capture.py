"""A device that is not there, for steps that are replayed: what a GPU forgets, keeps and overwrites, on the CPU.

While a program is captured the host does its part and the device nothing; a replay does the device's part alone, with
every tensor where it was and every value of the host as it was when the program was captured.  Outputs lie in a pool:
the next replay, or call in the pool, writes over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from support import Interpreted
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor

import qgalore_compile as qg
from qgalore_compile.backend.capturing import Program

JUNK = 77


def of_the_host(opt: qg.QGaLoreAdamW) -> Iterator[Tensor]:
    """What stands on the CPU wherever parameters are."""
    for group in opt.param_groups:
        yield from group.numbers
        yield group["lr"]
    yield from (state["schedule"] for state in opt.state.values() if "schedule" in state)
    if opt._limit is not None:
        yield opt._limit


class FakeCapturer:
    """Stands for a GPU of which ``host()`` are the tensors that it does not reach."""

    def __init__(self, host: Callable[[], Iterator[Tensor]]) -> None:
        self.host = host
        self.pool: list[Tensor] = []
        self.calls: list[str] = []
        self.fails: Callable[[], None] | None = None
        """Called at the end of a capture."""
        self.left: str | None = None

    def on_host(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor) or type(tensor) not in (Tensor, torch.nn.Parameter):
            return False
        return tensor.data_ptr() in {each.data_ptr() for each in self.host()}

    def place_for(self, number: Tensor) -> Tensor:
        return torch.zeros_like(number)

    def beside(self, program: Program, inputs: list[Any]) -> list[Any]:
        self.calls.append("beside")
        self.overwrite()
        outputs = program(list(inputs))
        self.pool = _without(outputs, inputs)
        return outputs

    def left_alive(self, outputs: list[Any]) -> str | None:
        return self.left

    def overwrite(self) -> None:
        """What was in the pool is something else's now."""
        for each in self.pool:
            each.fill_(JUNK)

    def capture(self, program: Program, inputs: list[Any]) -> FakeGraph:
        self.calls.append("capture")
        self.overwrite()
        # the places, whatever the objects come to point to
        places = [each.detach() if isinstance(each, Tensor) else each for each in inputs]
        on_host = [self.on_host(each) for each in inputs if isinstance(each, Tensor)]
        tensors = [each for each in places if isinstance(each, Tensor)]
        before = [each.clone() for each in tensors]
        try:
            outputs = program(list(places))
            if self.fails is not None:
                self.fails()
        finally:
            for place, was, is_host in zip(tensors, before, on_host, strict=True):
                if not is_host:
                    place.copy_(was)
        baked = [(place, was) for place, was, host in zip(tensors, before, on_host, strict=True) if host]
        return FakeGraph(self, program, places, baked, outputs)


class FakeGraph:
    def __init__(
        self, owner: FakeCapturer, program: Program, places: list[Any], baked: list[tuple[Tensor, Tensor]],
        outputs: list[Any],
    ) -> None:  # fmt: skip
        self.owner, self.program, self.places, self.baked, self.outputs = owner, program, places, baked, outputs
        self.in_pool = _without(outputs, places)
        for each in self.in_pool:
            each.fill_(JUNK)

    def replay(self) -> None:
        self.owner.calls.append("replay")
        self.owner.overwrite()
        now = [place.clone() for place, _ in self.baked]
        for place, was in self.baked:
            place.copy_(was)
        outputs = self.program(list(self.places))
        for (place, _), value in zip(self.baked, now, strict=True):
            place.copy_(value)
        for place, value in zip(self.in_pool, _without(outputs, self.places), strict=True):
            place.copy_(value)
        self.owner.pool = self.in_pool


def _without(outputs: list[Any], inputs: list[Any]) -> list[Tensor]:
    known = {each.untyped_storage().data_ptr() for each in inputs if isinstance(each, Tensor)}
    return [each for each in outputs if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known]


class Handed(Interpreted):
    """As :class:`Interpreted`, whose program is handed to ``cudagraph_policy`` as Inductor hands its own over."""

    def _interpret(self, gm: fx.GraphModule) -> Callable[..., Any]:
        self.graphs.append(gm)

        def boxed(inputs: list[Any]) -> list[Any]:
            given = list(inputs)
            inputs.clear()
            return list(gm.forward(*given))

        code: Any = SimpleNamespace(current_callable=boxed, source_code="", mutated_input_idxs=_written(gm))
        if (policy := inductor_config.cudagraph_policy) is not None:
            assert not policy.should_wrap(code)
            code = policy.wrap_output(code)
        return lambda *inputs: code.current_callable(list(inputs))


def _written(gm: fx.GraphModule) -> list[int]:
    copies = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    written = {node.args[0] for node in copies}
    return [place for place, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in written]
