"""What lies in memory between steps: weights and optimizer state, by category, exactly.

Nothing is a formula here.  The model is copied onto the meta device, quantised by ``quantize_`` and handed to
``QGaLoreAdamW``, and what those make is added up: they make the same there as where there is memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.optim.groups import param_groups
from qgalore_compile.planning.twin import meta, twin_of
from qgalore_compile.weights import QuantizedWeight, quantize_

Bytes = Counter[str]
"""Bytes by category."""


@dataclass(frozen=True)
class Holding:
    """What one parameter, and the state of it, take.

    Attributes:
        name, parameter, group: on the meta device; ``group`` is the optimizer's.
        bytes: by category.
        times: how many such there are in the model: of a layer that stands for equal ones.
    """

    name: str
    parameter: Tensor
    group: Any
    bytes: Bytes
    times: int


@dataclass(frozen=True)
class Resident:
    """A model and its optimizer.

    Attributes:
        holdings: of each parameter that trains.
        others: bytes of parameters that do not, and of buffers.
        nonfinite, max_grad_norm: the optimizer's.
    """

    holdings: list[Holding]
    others: Bytes
    nonfinite: str
    max_grad_norm: float | None

    @property
    def bytes(self) -> Bytes:
        """Of all, by category."""
        total = Counter(self.others)
        for holding in self.holdings:
            total.update({name: size * holding.times for name, size in holding.bytes.items()})
        return total


def resident(
    model: nn.Module,
    *,
    weight_format: str | None,
    keys: Mapping[str, Any],
    moments: str,
    nonfinite: str = "skip_step",
    max_grad_norm: float | None = None,
) -> Resident:
    """What a model and QGaLoreAdamW over it hold between steps.

    Args:
        model: anywhere; not changed.
        weight_format: what ``quantize_`` makes of the blocks' weights; None leaves them as they are.
        keys: of ``param_groups``, ``rank`` among them.
        moments, nonfinite, max_grad_norm: the optimizer's.
    """
    by_name = keys.get("targets") is not None  # which may tell equal layers apart
    twin = twin_of(model, meta, lambda depth: depth if by_name else min(depth, 2))
    if weight_format is not None:
        quantize_(twin.model, format=weight_format)
    groups = param_groups(twin.model, **keys)
    optimizer = QGaLoreAdamW(groups, moments=moments, nonfinite=nonfinite, max_grad_norm=max_grad_norm)
    times = {1: 1 + twin.left_out}  # the second layer stands for what is left out
    holdings, trained = [], set()
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            size = weight_bytes(parameter) + state_bytes(optimizer.state[parameter])
            holdings.append(Holding(name, parameter, group, size, times.get(twin.layer_of(name), 1)))
            trained.add(id(parameter))
    others: Bytes = Counter()
    for name, parameter in twin.model.named_parameters():
        if id(parameter) not in trained:
            for category, count in weight_bytes(parameter).items():
                others[category] += count * times.get(twin.layer_of(name), 1)
    for name, buffer in twin.model.named_buffers():
        others["other states"] += buffer.nbytes * times.get(twin.layer_of(name), 1)
    return Resident(holdings, others, nonfinite, max_grad_norm)


def weight_bytes(parameter: Tensor) -> Bytes:
    """Of a parameter, and of the scales that a quantised one has."""
    if not isinstance(parameter, QuantizedWeight):
        return Counter({"weights": parameter.nbytes})
    found: Bytes = Counter()
    for part, tensor in zip(parameter.format.parts, parameter.parts, strict=True):
        found["weights" if part.extent == "element" else "scales"] += tensor.nbytes
    return found


def state_bytes(state: Mapping[str, Tensor]) -> Bytes:
    """Of the state of a parameter."""
    found: Bytes = Counter()
    for name, tensor in state.items():
        found[_category(name)] += tensor.nbytes
    return found


def _category(name: str) -> str:
    if name.startswith("projector"):
        return "projectors"
    return "moments" if name.startswith(("exp_avg", "momentum")) else "other states"
