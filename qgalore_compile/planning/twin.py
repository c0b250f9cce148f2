"""A model's copy without memory: the same modules and shapes, and of a deep stack of equal layers a few.

Of equal layers each holds and computes what the others do, so a few tell of all.  On the meta device the copy is for
quantising and for an optimizer, whose bytes are exact; on fake tensors it is for tracing, where a kernel's choice
depends on the device, and a quantised weight is a float: a compiled step reads codes inside its products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qgalore_compile.weights import QuantizedWeight


@dataclass(frozen=True)
class Twin:
    """A model without memory.

    Attributes:
        model: the copy.
        layers: of its stack of equal layers; empty where there is none.
        depth: how many there are in the original.
        prefix: the stack's name in the model, with a dot; "" where there is none.
    """

    model: nn.Module
    layers: list[nn.Module]
    depth: int
    prefix: str

    @property
    def left_out(self) -> int:
        """Layers of the original that are not in the copy."""
        return self.depth - len(self.layers)

    def layer_of(self, name: str) -> int:
        """The number of the layer that a parameter is in; -1 outside of the stack."""
        if not self.prefix or not name.startswith(self.prefix):
            return -1
        return int(name[len(self.prefix) :].partition(".")[0])


def twin_of(model: nn.Module, make: Callable[[Tensor], Tensor], keep: Callable[[int], int]) -> Twin:
    """A copy of a model.

    Args:
        model: not changed.
        make: from a parameter or a buffer to what stands for it.
        keep: from the number of equal layers to how many the copy has.
    """
    prefix, stack = equal_layers(model)
    kept = stack[: keep(len(stack))]
    left_out = {id(tensor) for layer in stack[len(kept) :] for tensor in (*layer.parameters(), *layer.buffers())}
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in left_out and id(tensor) not in memo:
            made = make(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    if len(kept) < len(stack):
        layers = [copy.deepcopy(layer, memo) for layer in kept]
        memo[id(model.get_submodule(prefix[:-1]))] = nn.ModuleList(layers)
    other: nn.Module = copy.deepcopy(model, memo)
    return Twin(other, list(other.get_submodule(prefix[:-1]).children()) if prefix else [], len(stack), prefix)


def equal_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The longest list of layers that are alike, by its name with a dot, and its layers; "" and [] for none.

    Alike are layers of one class whose parameters have equal names, shapes and storage, none of them shared.
    """
    found: tuple[str, list[nn.Module]] = "", []
    for name, module in model.named_modules():
        if name and isinstance(module, nn.ModuleList) and len(module) > max(1, len(found[1])):
            parameters = [id(p) for layer in module for p in layer.parameters()]
            if len({_looks(layer) for layer in module}) == 1 and len(set(parameters)) == len(parameters) > 0:
                found = f"{name}.", list(module)
    return found


def _looks(layer: nn.Module) -> tuple[object, ...]:
    own = ((name, tuple(p.shape), p.dtype, _format(p), p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), *own


def _format(tensor: Tensor) -> str:
    return tensor.format.text if isinstance(tensor, QuantizedWeight) else ""


def meta(tensor: Tensor) -> Tensor:
    """A tensor on the meta device; a quantised one in its format."""
    if isinstance(tensor, QuantizedWeight):
        return tensor.detach().to("meta")
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


def fake(tensor: Tensor) -> Tensor:
    """A fake tensor on the CPU, where a FakeTensorMode is entered; the floats of a quantised one."""
    stride = tensor.contiguous().stride() if isinstance(tensor, QuantizedWeight) else tensor.stride()
    return torch.empty_strided(tuple(tensor.shape), stride, dtype=tensor.dtype, device="cpu")
