"""What the optimizers in a step ask for, so that what the passes did can be held against it.

The passes find updates by dataflow, and an update that is not in the graph leaves no trace there: a parameter whose
gradient is None looks like no parameter at all.  So the parameters that a step's ``QGaLoreAdamW`` projects are read off
the optimizer itself, which Dynamo knows as the source of the state tensors that it hands over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qgalore_compile.backend.records import Record, layer_record
from qgalore_compile.optim import groups, layout
from qgalore_compile.optim.adamw import QGaLoreAdamW


@dataclass(frozen=True)
class Asked:
    """A parameter of a projected group of an optimizer whose state is in the graph.

    Attributes:
        name: in the group's ``param_names``, or its place.
        shape, rank: of the parameter, of its projector.
        group: the optimizer's number in the graph, and the group's in the optimizer.
        frozen: whether it takes no gradient.
        input: the program's input that it is: a number, or an attribute of the traced module; None where the graph does
            not read it.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    group: tuple[int, int]
    frozen: bool
    input: int | str | None


def asked(gm: fx.GraphModule, tracer: Any) -> list[Asked]:
    """The projected parameters of every optimizer that updates something in a graph.

    Args:
        gm: from Dynamo, whose placeholders carry their sources.
        tracer: Dynamo's translator of the frame that the graph is of.
    """
    # what is an input under its number may have a name as an attribute too: the number, which comes last, counts
    sources: dict[int | str, Any] = dict(getattr(gm, "_param_name_to_source", None) or {})
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        sources[index] = getattr(node, "_dynamo_source", None)
    values: dict[str, Any] = {}

    def value(source: Any) -> Any:
        if source.name not in values:
            try:
                values[source.name] = tracer.output.resolve_source_value(source)
            except Exception:  # what a source names may be gone, or be known while the step runs alone
                values[source.name] = None
        return values[source.name]

    optimizers: dict[int, QGaLoreAdamW] = {}
    for source in sources.values():
        if source is not None and ".state[" in source.name:
            found = next((each for each in map(value, _bases(source)) if isinstance(each, QGaLoreAdamW)), None)
            if found is not None:
                optimizers[id(found)] = found
    if not optimizers:
        return []
    inputs = {id(value(source)): index for index, source in sources.items() if source is not None}
    return [each for number, optimizer in enumerate(optimizers.values())
            for each in _projected(optimizer, number, inputs)]  # fmt: skip


def _bases(source: Any) -> Iterator[Any]:
    """What a source is an attribute or an item of, innermost first."""
    while (source := getattr(source, "base", None)) is not None:
        yield source


def _projected(optimizer: QGaLoreAdamW, number: int, inputs: dict[int, int | str]) -> Iterator[Asked]:
    for position, group in enumerate(optimizer.param_groups):
        if layout.projects(group):
            for name, parameter in zip(groups.names_of(group, position), group["params"], strict=True):
                assert isinstance(parameter, Tensor)
                rank, frozen = layout.rank_of(group, parameter), not parameter.requires_grad
                shape = tuple(parameter.shape)
                yield Asked(name, shape, rank, (number, position), frozen, inputs.get(id(parameter)))


FROZEN = "frozen (requires_grad is False), so the step leaves it as it is"
NO_GRADIENT = (
    "its gradient is None in this step, so the step leaves it as it is: the loss does not depend on it, or backward() "
    "does not come before opt.step(); let the loss depend on it, freeze it, or take it out of the projected group"
)


def hold_against(layers: list[Record], asked: Sequence[Asked]) -> None:
    """Tell of the parameters that were to be projected and are not, in ``layers``: those that stand there for another
    reason, and those that the graph does not update at all."""
    at = {layer.input: layer for layer in layers if layer.input is not None}
    matched = {each.group for each in asked if each.input in at and at[each.input].matched}
    for each in asked:
        layer = at.get(each.input) if each.input is not None else None
        if layer is not None and layer.matched:
            continue
        if layer is None:
            layer = layer_record(each.name, each.shape, reason=FROZEN if each.frozen else NO_GRADIENT)
            layers.append(layer)
        of_group = f"its group (number {each.group[1]}) asks for rank {each.rank}"
        if each.frozen and each.group in matched:  # a layer of several that the user has frozen
            continue
        if each.frozen:
            layer.update(reason=f"{FROZEN}, and so is all of its group: unfreeze something of it, or drop the group")
        layer.update(projected=True, reason=f"{layer.reason}; {of_group}")
