"""Decompose composite operators (:mod:`qgalore_compile.composites`): the operations of an update, or of decoding, stand
in the graph where one operator stood while the step was traced.

    qgalore.update_(W, [m, …], …)     becomes     what the phase traces to, down to ``where(ok, …)``, and behind all
                                                  else a ``copy_`` into W, m, … of what is to be stored

An operator is traced once for all calls of equal shapes, dtypes and constants, with Inductor's decompositions, and the
nodes are copied in; a parameter's number, of which random numbers depend alone, is put into the copies.

Preconditions: the graph is functional; what an operator writes unseen, other such operators read alone behind it.
Sound because the function that is traced is what the operator means, and each writer hands on what it has written.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qgalore_compile import composites
from qgalore_compile._ops import NUMBERED
from qgalore_compile._torch import (
    FakeTensorMode,
    FunctionalTensor,
    FunctionalTensorMode,
    V,
    constant_fold_uniform_value,
    inductor_config,
    inductor_post_grad,
    make_fx,
    remove_noop_ops,
    select_decomp_table,
    tree_map_only,
    view_to_reshape,
)
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.fresh import Fresh, empty_like
from qgalore_compile.passes.mutation import FUNCTIONALIZED
from qgalore_compile.passes.nodes import arguments, looks, value

aten = torch.ops.aten


def decompose(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace every composite operator of ``graph`` by its operations."""
    traced: dict[str, fx.GraphModule] = {}
    writes = _Writes()
    for node in _calls(graph):
        writes.read_by(node)
        key = _key(node)
        if key not in traced:
            traced[key] = _trace(node)
        for source, fresh in _put(graph, node, traced[key].graph).items():
            writes.write(source, fresh)
        record.match(node)
    writes.put(graph)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    """In the graph's order."""
    found = ((node, composites.COMPOSITES.get(node.target)) for node in graph.nodes)
    return [node for node, composite in found if composite is not None and composite.applies(*arguments(node))]


class _Writes:
    """What operators have written so far: of each input, what is in it now."""

    def __init__(self) -> None:
        self._now: dict[fx.Node, fx.Node] = {}
        self._of: dict[fx.Node, fx.Node] = {}

    def read_by(self, call: fx.Node) -> None:
        """Let a call find what earlier ones have written where it writes itself.  All else that it reads is a value,
        of before or after; nothing else may stand for what is written (``backend/unseen.py``)."""
        for place in composites.COMPOSITES[call.target].writes:
            now = fx.map_arg(call.args[place], lambda each: self._now.get(_stripped(each), each))
            call.update_arg(place, now)

    def write(self, source: fx.Node, fresh: fx.Node) -> None:
        """Over what ``source`` is, itself or as an earlier call has written it."""
        written = self._of.get(source, _stripped(source))
        assert written.op == "placeholder", f"{source} is written by an operator and is no input"
        assert self._now.get(written, written) in (source, written), f"two operators write {written} apart"
        self._now[written], self._of[fresh] = fresh, written

    def put(self, graph: fx.Graph) -> None:
        """A ``copy_`` for each input that is written, at the graph's end and in the inputs' order, as AOTAutograd has
        them."""
        copies = {node.args[0]: node for node in graph.find_nodes(op="call_function", target=aten.copy_.default)}
        output = graph.output_node()
        for written, now in self._now.items():
            assert written not in copies, f"{written} is written by an operator and by others"
            with graph.inserting_before(output):
                copies[written] = copy = graph.call_function(aten.copy_.default, (written, now))
            copy.meta["val"] = value(written)
        for node in graph.find_nodes(op="placeholder"):
            if node in copies:
                output.prepend(copies[node])


def _stripped(node: fx.Node) -> fx.Node:
    while node.target in (aten.alias.default, aten.detach.default):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _sources(call: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The tensors that a call writes, and those that it reads; one that is both is in both."""
    written: dict[fx.Node, None] = {}
    read: dict[fx.Node, None] = {}
    writes = composites.COMPOSITES[call.target].writes
    for place, given in enumerate(arguments(call)):
        fx.map_arg(given, (written if place in writes else read).setdefault)
    return list(written), list(read)


def _filled(call: fx.Node, written: dict[fx.Node, Any], read: dict[fx.Node, Any]) -> list[Any]:
    """A call's arguments, of a parameter's number 0, with these in the place of its tensors."""
    composite = composites.COMPOSITES[call.target]
    filled = [fx.map_arg(given, (written if place in composite.writes else read).__getitem__)
              for place, given in enumerate(arguments(call))]  # fmt: skip
    if composite.number is not None:
        filled[composite.number] = 0
    return filled


def _key(call: fx.Node) -> str:
    """What a trace depends on, and which of its arguments are one."""
    described = [{node: f"{kind}{place}: {looks(value(node))}" for place, node in enumerate(nodes)}
                 for kind, nodes in zip("wr", _sources(call), strict=True)]  # fmt: skip
    return f"{call.target}{_filled(call, *described)}"


def _trace(node: fx.Node) -> fx.GraphModule:
    """The operations of a call, its tensors as placeholders in the order of :func:`_sources`; returns what the call
    returns and, of each tensor that it writes, what it holds behind it."""
    composite = composites.COMPOSITES[node.target]
    written, read = _sources(node)
    sources = [*written, *read]
    mode: FakeTensorMode = value(sources[0]).fake_mode

    def call(tensors: Sequence[Tensor]) -> Any:
        count = len(written)
        found = [dict(zip(nodes, given, strict=True))
                 for nodes, given in ((written, tensors[:count]), (read, tensors[count:]))]  # fmt: skip
        return composite.function(*_filled(node, *found))

    def run(*tensors: Tensor) -> Any:
        if not composite.writes:
            return tree_map_only(Tensor, Tensor.contiguous, call(tensors)), ()
        with FunctionalTensorMode():
            given = [FunctionalTensor.to_functional(each) for each in tensors]
            result = tree_map_only(Tensor, Tensor.contiguous, call(given)), given[: len(written)]
            return tree_map_only(FunctionalTensor, FunctionalTensor.from_functional, result)

    with mode, composites.kept(False), torch.no_grad():
        fakes = [empty_like(value(each)) for each in sources]
        gm: fx.GraphModule = make_fx(run, decomposition_table=select_decomp_table())(*fakes)
    _as_inductor(gm, mode)
    return gm


def _as_inductor(gm: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Do to a trace what Inductor has done to the rest of the graph by then: its patterns make ``addmm`` of a product
    and a sum, for one."""
    view_to_reshape(gm)
    constant_fold_uniform_value(gm)
    remove_noop_ops(gm.graph)
    gm.graph.eliminate_dead_code()
    if inductor_config.pattern_matcher:
        inductor_post_grad.lazy_init()
        with V.set_fake_mode(mode):
            for patterns in inductor_post_grad.pass_patterns:
                patterns.apply(gm.graph)


def _put(graph: fx.Graph, call: fx.Node, body: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Copy a body's nodes in front of a call, and let its readers read them; returns what is written, by what it is
    written into."""
    composite = composites.COMPOSITES[call.target]
    number = None if composite.number is None else arguments(call)[composite.number]
    written, read = _sources(call)
    sources = iter([*written, *read])
    held: dict[fx.Node, fx.Node] = {}
    fresh = Fresh()
    result: Any = None
    behind: Sequence[fx.Node] = ()
    with graph.inserting_before(call):
        for node in body.nodes:
            if node.op == "placeholder":
                held[node] = next(sources)
                fresh.know(node.meta["val"], value(held[node]))
            elif node.op == "output":
                result, behind = fx.map_arg(node.args[0], held.__getitem__)
            else:
                held[node] = copied = graph.node_copy(node, held.__getitem__)
                if number is not None:
                    _renumber(copied, number)
                copied.meta = {**node.meta, "val": fresh.of(node.meta["val"])}
                if "stack_trace" in call.meta:
                    copied.meta["stack_trace"] = call.meta["stack_trace"]
    fresh_of = {source: now for source, now in zip(written, behind, strict=True) if now is not source}
    if isinstance(result, fx.Node):
        call.replace_all_uses_with(result)
    else:
        for reader in list(call.users):
            assert reader.target is operator.getitem
            reader.replace_all_uses_with(result[reader.args[1]])
            graph.erase_node(reader)
    graph.erase_node(call)
    return fresh_of


def _renumber(node: fx.Node, number: int) -> None:
    """Give a copy of an operator that was traced for parameter 0 the number of the parameter, below a stream's bits."""
    if (numbered := NUMBERED.get(node.target)) is not None:
        node.update_arg(numbered.index, node.args[numbered.index] | number)  # type: ignore[operator]
    elif node.target is FUNCTIONALIZED and (numbered := NUMBERED.get(node.args[0])) is not None:
        node.update_kwarg(numbered.argument, node.kwargs[numbered.argument] | number)  # type: ignore[operator]
