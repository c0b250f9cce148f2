"""What a step's graph reads on the host: a CUDA graph repeats what the GPU was told, and asks the host nothing.

Of the tensors that stand on the CPU three kinds may be in a step that is captured:

=========  ==========================================================================================================
schedules  refresh ops read and count them.  Before a step the host asks the same, so that a captured step has none due
rules      and betas in float64, which a refresh op reads in its turn alone, and so never in a captured step
numbers    0-d, read and not written: lr, betas, the norm's limit.  Kernels would take them as arguments, which a
           captured launch keeps for ever; in place of each the graph is given a tensor of the device
=========  ==========================================================================================================

Everything else that decides on the host is refused in words, before the first update.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from qgalore_compile._torch import (
    GradSource,
    OpOverload,
    is_from_optimizer_source,
    is_from_unspecialized_nn_module_source,
    tree_leaves,
)
from qgalore_compile.backend.unseen import returns_gradients
from qgalore_compile.optim.hyper_parameters import Numbers
from qgalore_compile.optim.operators import PROJECT, UPDATE
from qgalore_compile.subspace.refresh import REFRESHES


class HostReadError(ValueError):
    """A graph decides on the host what a CUDA graph would keep as it was in one step; the message says what."""


class Plan(NamedTuple):
    """Places among the inputs of a graph of Dynamo's.

    Attributes:
        schedules: of the float64 schedules that the graph counts, each once.
        numbers: of 0-d tensors on the host that kernels read.
        given: of tensors that belong neither to a module nor to an optimizer, and gradients: they may be others in
            the next call.
    """

    schedules: tuple[int, ...]
    numbers: tuple[int, ...]
    given: tuple[int, ...]


def planned(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    names: Mapping[int | str, str],
    on_host: Callable[[Tensor], bool],
) -> Plan:
    """What a graph reads on the host.

    Args:
        gm: from Dynamo.
        example_inputs: its inputs.
        names: readable ones of those, by number.
        on_host: whether a tensor is where the host reads it.

    Raises:
        HostReadError: something that a captured step could not follow.
    """
    if returns_gradients(gm.graph):
        raise HostReadError("it returns something that can be differentiated, so its backward would be another graph; "
                            "call backward() in the compiled function, or detach what it returns")  # fmt: skip
    if parameters := [name for name, _ in gm.named_parameters()]:
        raise HostReadError(f"{parameters[0]} hangs on the graph and is none of its inputs, so nobody sees it move")
    for graph in (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)):
        _refuse_decisions(graph)
    nodes = gm.graph.find_nodes(op="placeholder")
    place = {node: index for index, node in enumerate(nodes)}
    counted = Counter(node for call in gm.graph.nodes for node in _counts(call))
    schedules, numbers = [], []
    for node, given in zip(nodes, example_inputs, strict=True):
        name = names.get(place[node], node.name)
        if counted[node] > 1:
            raise HostReadError(f"{name} is counted {counted[node]} times: the step updates a parameter more than once")
        if counted[node]:
            schedules.append(place[node])
        elif isinstance(given, Tensor) and on_host(given) and any(node not in _asked(user) for user in node.users):
            _check_number(node, given, name)
            numbers.append(place[node])
    _refuse_arithmetic(gm.graph, {nodes[index] for index in numbers}, on_host)
    moves = [place[node] for node, given in zip(nodes, example_inputs, strict=True) if _is_given(node, given)]
    return Plan(tuple(schedules), tuple(numbers), tuple(moves))


def _is_given(node: fx.Node, given: Any) -> bool:
    """Whether another tensor may stand there in the next call."""
    source = getattr(node, "_dynamo_source", None)
    if not isinstance(given, Tensor) or isinstance(given, torch.nn.Parameter):
        return False
    if source is None or isinstance(source, GradSource):
        return True
    return not (is_from_optimizer_source(source) or is_from_unspecialized_nn_module_source(source))


# -- what our own operators read there --------------------------------------------------------------------------------


def _arguments(call: fx.Node) -> dict[str, Any]:
    """Of a call of an operator, by name."""
    names = [each.name for each in call.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def _counts(call: fx.Node) -> Iterator[fx.Node]:
    """Schedules that a call counts itself in."""
    if call.target in REFRESHES:
        yield _arguments(call)["schedule"]
    elif call.target in PROJECT:
        yield from _schedule_in(call)


def _schedule_in(call: fx.Node) -> Iterator[fx.Node]:
    given = _arguments(call)
    yield from (node for name, node in zip(given["names"].split(","), given["state"], strict=True)
                if name == "schedule")  # fmt: skip


def _asked(call: fx.Node) -> set[fx.Node]:
    """What a call reads on the host, and only when it is a parameter's turn, or to see whether it is."""
    if call.target in REFRESHES:
        given = _arguments(call)
        return {given[name] for name in ("schedule", "rule", "betas") if name in given}
    if call.target in (*PROJECT, *UPDATE):
        numbers = Numbers._make(_arguments(call)["numbers"][: len(Numbers._fields)])
        return {numbers.rule, numbers.betas, *_schedule_in(call)}  # type: ignore[arg-type]
    return set()


# -- what is refused --------------------------------------------------------------------------------------------------


def _check_number(node: fx.Node, given: Tensor, name: str) -> None:
    what = f"{name} is a tensor on the CPU, {given.dtype} {tuple(given.shape)}, that the step"
    written = isinstance(seen := node.meta.get("example_value"), Tensor) and seen._version > 0
    if written:
        raise HostReadError(f"{what} writes there, where a replayed step writes nothing; keep it on the GPU")
    if given.dim():
        raise HostReadError(f"{what} reads there; move it to the GPU: scalars alone are taken there with every step")


def _refuse_decisions(graph: fx.Graph) -> None:
    """Values that the host waits for, and operators that say they are no part of a CUDA graph."""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if any(free_unbacked_symbols(each) for each in tree_leaves(value) if isinstance(each, (Tensor, *_SYMBOLS))):
            raise HostReadError(f"{_shown(node)} has a value or a size that only the data tell, which the host reads")
        if node.op == "call_method" and node.target in ("item", "tolist", "cpu", "numpy"):
            raise HostReadError(f"{_shown(node)} brings data of the GPU to the host")
        op = node.target
        if isinstance(op, OpOverload) and torch.Tag.cudagraph_unsafe in op.tags and op not in REFRESHES:
            raise HostReadError(f"{_shown(node)} is marked as no part of a CUDA graph")


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


CONSTANTS = frozenset(
    {"arange", "as_tensor", "empty", "eye", "full", "full_like", "linspace", "ones", "scalar_tensor", "tensor",
     "zeros"}
)  # fmt: skip
"""What makes the same tensor in every step."""


def _refuse_arithmetic(graph: fx.Graph, numbers: set[fx.Node], on_host: Callable[[Tensor], bool]) -> None:
    """Tensors that are computed on the host from other things than constants and numbers, which are on the device."""
    follows = set(numbers)
    for node in graph.nodes:
        found = [each for each in tree_leaves(node.meta.get("example_value")) if isinstance(each, Tensor)]
        if node.op in ("placeholder", "get_attr", "output") or not any(map(on_host, found)):
            continue
        reads = [each for each in node.all_input_nodes if isinstance(each.meta.get("example_value"), Tensor)]
        constant = not reads and getattr(node.target, "__name__", str(node.target)) in CONSTANTS
        if constant or (reads and follows.issuperset(reads)):
            follows.add(node)
            continue
        raise HostReadError(f"{_shown(node)} is computed on the CPU, where a replayed step computes nothing")


def _shown(node: fx.Node) -> str:
    line = (node.stack_trace or "").strip().splitlines()
    return f"{node.name}" + (f", `{line[-1].strip()}`," if line else "")


# -- what Inductor made of it -----------------------------------------------------------------------------------------

_IN_PROGRAM = (
    (re.compile(r"(\w+)\.item\(\)"), "a kernel takes {0} from the host as an argument"),
    (re.compile(r"^\s*(\w+) = empty_strided_cpu\(", re.MULTILINE), "it computes {0} on the CPU"),
    (re.compile(r"^\s*(cpp_fused\w*)\(", re.MULTILINE), "it runs {0} on the CPU"),
)


def in_program(text: str) -> str | None:
    """What the program that Inductor emitted for a GPU reads or computes on the host beside refresh ops; None for
    nothing.  It tells of compiled code from a cache, too, where no pass has run."""
    for pattern, sentence in _IN_PROGRAM:
        if found := pattern.search(text):
            return sentence.format(found[1])
    return None
