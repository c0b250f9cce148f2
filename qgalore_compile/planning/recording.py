"""What a forward and a backward compute, operation by operation, recorded on fake tensors.

Operations are those that Inductor is given: composite ones are taken apart by its own table.  A value is a storage at a
time: a view is what it is a view of, and an operation in place makes the next value of its storage.  Each operation
belongs to a *segment*: what comes before the stack of layers, a layer's forward, what comes behind it (the head and the
loss, forward and backward), a layer's backward, and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qgalore_compile._torch import OpOverload, TorchDispatchMode, tree_leaves

_POINTWISE = frozenset(
    {"prims.convert_element_type", "aten.expand", "aten.cat", "prims.iota", "aten.copy", "aten.clone"}
)
_POINTWISE |= {"aten.embedding", "aten.gather", "aten.index", "aten.full", "aten.scalar_tensor", "aten.constant_pad_nd"}
_POINTWISE |= {
    "aten.slice_scatter",
    "aten.select_scatter",
    "aten.full_like",
    "aten.copy_",
    "aten.empty",
    "aten.scatter",
}
_REDUCTIONS = frozenset({"aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.var_mean", "aten.var", "aten.prod"})
_HEAVY = frozenset({"exp", "log", "log10", "log1p", "log2", "sigmoid", "tanh"})
"""Operations for whose sake Inductor stores a result on a CPU rather than compute it in each reader."""


@dataclass(frozen=True)
class Segment:
    """Where in a step an operation is.

    Attributes:
        part: "before", "forward", "head", "backward" or "after".
        layer: number of the layer; -1 where it is in none.
    """

    part: str
    layer: int = -1


@dataclass
class Value:
    """A storage between two operations that write it.

    Attributes:
        bytes: of the storage.
        shape: of the tensor that was made.
        resident: whether it exists before the step: a parameter, a buffer, the tokens.
    """

    bytes: int
    shape: tuple[int, ...]
    resident: bool = False


@dataclass
class Op:
    """An operation: what it reads and writes, as places in ``Recording.values``."""

    name: str
    kind: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    segment: Segment
    heavy: bool


@dataclass
class Recording:
    """A forward and a backward.

    Attributes:
        ops: in order.
        values: what they read and write.
        gradients: of each parameter by name, the value that is its gradient.
        loss: the value of the loss.
        elements: bytes of an element of each parameter's gradient.
        handed: values that are stored, since one function hands them to another.
    """

    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    gradients: dict[str, int] = field(default_factory=dict)
    loss: int = -1
    elements: dict[str, int] = field(default_factory=dict)
    handed: frozenset[int] = frozenset()


class Recorder(TorchDispatchMode):
    """Records all that runs while it is entered; ``segment`` is where that is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from qgalore_compile._torch import select_decomp_table  # loads Inductor

        self.recording, self.segment = Recording(), Segment("before")
        self._table = select_decomp_table()
        self._values: dict[int, int] = {}
        self._kept: list[Any] = []  # an address stays that of one tensor

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for apart in (self._table.get(func), func.decompose if func.namespace == "aten" else None):
            if apart is not None:
                with self:
                    result = apart(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        self._kept.append((args, kwargs, result))
        self._note(func, _tensors((args, kwargs)), _tensors(result))
        return result

    def value_of(self, tensor: Tensor) -> int:
        """The value that a tensor's storage has now; one that nothing here made was there before."""
        key = tensor.untyped_storage()._cdata
        if key not in self._values:
            self._kept.append(tensor)
            self._add(tensor, resident=True)
        return self._values[key]

    def _add(self, tensor: Tensor, *, resident: bool = False) -> int:
        storage = tensor.untyped_storage()
        self._values[storage._cdata] = len(self.recording.values)
        self.recording.values.append(Value(storage.nbytes(), tuple(tensor.shape), resident))
        return self._values[storage._cdata]

    def _note(self, func: OpOverload, given: list[Tensor], made: list[Tensor]) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        written = made if func._schema.is_mutable else new
        if not written:
            return  # a view, or a question
        reads = tuple(dict.fromkeys(map(self.value_of, given)))
        writes = tuple(map(self._add, written))
        name = f"{func.namespace}.{func._schema.name.partition('::')[2]}"
        self.recording.ops.append(Op(name, _kind(func, name), reads, writes, self.segment, _is_heavy(name)))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _kind(func: OpOverload, name: str) -> str:
    if torch.Tag.pointwise in func.tags or name in _POINTWISE:
        return "pointwise"
    return "reduction" if name in _REDUCTIONS else "extern"


def _is_heavy(name: str) -> bool:
    return name.partition(".")[2].strip("_") in _HEAVY


def record(
    model: nn.Module, layers: Sequence[nn.Module], inputs: Sequence[Tensor], loss_of: Callable[..., Tensor]
) -> Recording:
    """A forward and a backward of a model made of fake tensors, under its mode.

    Args:
        model: of fake tensors.
        layers: of its stack, in order.
        inputs: tokens and targets.
        loss_of: from the model and the inputs to the loss.
    """
    recorder = Recorder()
    handles = [handle for index, layer in enumerate(layers) for handle in _told(recorder, layer, index, len(layers))]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with recorder:
            loss = loss_of(model, *inputs)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    recording = recorder.recording
    recording.loss = recorder.value_of(loss)
    found: Mapping[str, Tensor] = {
        name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None
    }
    recording.gradients = {name: recorder.value_of(gradient) for name, gradient in found.items()}
    recording.elements = {name: gradient.dtype.itemsize for name, gradient in found.items()}
    return recording


def _told(recorder: Recorder, layer: nn.Module, index: int, count: int) -> list[Any]:
    """Hooks that tell the recorder which layer runs, and which one's backward."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and recorder.segment.part in ("before", "forward"):
            recorder.segment = Segment("forward", index)
            for tensor in _tensors(args)[:1]:
                if tensor.requires_grad:
                    tensor.register_hook(lambda _: leave())

    def leave() -> None:
        recorder.segment = Segment("backward", index - 1) if index else Segment("after")

    def behind(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if index == count - 1 and recorder.segment.part == "forward":
            recorder.segment = Segment("head")
            for tensor in _tensors(result)[:1]:
                tensor.register_hook(lambda _: enter())

    def enter() -> None:
        recorder.segment = Segment("backward", index)

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(behind)]
