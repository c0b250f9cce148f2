"""Turn each update into generated kernels.

    Before    %n = adam(decode(%codes, …), %r, …)                    on r × n
              %u = mm(decode(%projector), %n)                        m × n
              copy_(%weight, write_back(decode(%weight), %u, random_bits(…)))
    After     %n = empty(…);  run_program("…", [%codes!, …, %n!], [%r, …])
              run_gemm("…", [%weight!, …], [%projector, %n, …])

    Before    copy_(%embedding, %embedding - lr * adam(decode(%codes, …), %g))
    After     run_program("…", [%embedding!, %codes!, …], [%g, …])

Requires  updates found by :mod:`qgalore_compile.passes.update`, on a device that a lowering exists for; regions of
          operations that :mod:`qgalore_compile.kernels.read.from_graph` reads.  What is left is left as it was.
Tier      rounding: the same operations in float32, in another order within a group's sums; bf16 GEMMs in blocks.

Both programs of a layer change states and weight in their own storage.  The product and the decoded projector exist in
blocks that stay in cache.  Updates at full rank (embeddings, head) become one program each; small ones stay with
Inductor.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from qgalore_compile.kernels.ir.gemm import Factors, GemmProgram, Operand
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.read.coded import DECODE, ENCODE, encoded_again
from qgalore_compile.kernels.read.from_graph import from_graph
from qgalore_compile.kernels.read.region import Output, Refusal, RefusedError, Region, candidates
from qgalore_compile.kernels.read.spelling import POINTWISE, VIEWS
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.launch import (
    erase,
    launch,
    matrix_spaces,
    no_lowering,
    operand,
    refuse_own_results,
    refuse_without_kernel,
    through_transposes,
)
from qgalore_compile.passes.nodes import (
    TRANSPOSES,
    anchors,
    arguments,
    aten,
    behind,
    is_anchor,
    is_gemm,
    is_scalar,
    latest_version,
    operands,
    shape,
    written,
)
from qgalore_compile.passes.parting import kept_as_sums, left_between, may_stay, with_states
from qgalore_compile.passes.regions import LayerUpdate

SMALL = 1 << 16
"""Elements below which an update at full rank that draws no random bits stays with Inductor: a call costs about 30 µs,
its loop less."""

_RANDOM = torch.ops.qgalore.random_bits.default


def fuse(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Fuse every layer's update, and every large one at full rank."""
    for layer in context.layers:
        node = layer.up
        problem = no_lowering(layer.parameter[0])
        if problem is None:
            try:
                sandwich = _Sandwich(graph, context, layer)
                calls = sandwich.fuse()
            except RefusedError as refused:
                problem = str(refused)
        if problem is not None:
            record.skip(node, problem)
            context.note(layer).not_fused = problem
            continue
        record.match(node)
        context.note(layer).update_function = f"generated, {len(calls)} kernels{sandwich.left}"
        layer.region = []
    owned = {anchor for layer in context.layers for anchor in layer.anchors}
    done: set[fx.Node] = set()
    for parameter, name in _at_full_rank(graph, context, owned).items():
        if parameter in done:  # a part of what one before it is stored in
            continue
        problem = no_lowering(parameter)
        if problem is None:
            try:
                call, targets = _full_rank(graph, context, parameter, owned)
                context.at_full_rank[call] = name
                done |= targets
            except RefusedError as refused:
                problem = str(refused)
        if problem is not None:
            record.skip(parameter, f"{name}: {problem}")
            context.note(name).not_fused = problem
            continue
        record.match(parameter)
        context.note(name).update_function = "generated, 1 kernel"


class _Sandwich:
    """One layer's update, about to be fused."""

    def __init__(self, graph: fx.Graph, context: Context, layer: LayerUpdate) -> None:
        self.graph, self.context, self.layer = graph, context, layer
        self.gemms = [gemm for gemm in (layer.up, *layer.further) if gemm in layer.region]
        if any(gemm.target is not aten.mm.default for gemm in self.gemms):
            raise _refused(layer.up)
        # a state that the refresh op changes too is read behind it, and taken over from there
        self.targets = [
            (stored, latest_version(target)) for target, stored in map(written, layer.anchors) if shape(target)
        ]
        self.region = _without_statistics(layer.region)
        self.scales = encoded_again(self.region)
        left = {node for nodes in self.scales.values() for node in nodes}
        self.region = [node for node in self.region if node not in left]
        sums = kept_as_sums([stored for stored, _ in self.targets], layer.between, layer.shape)
        self.targets = [(stored, target) for stored, target in self.targets if stored not in left | sums]
        self.inner: fx.Node | None = None
        if layer.projector:
            first, second = operands(layer.up)
            self.inner, _ = through_transposes(second if context.facts(graph).storage(first) is not None else first)

    def fuse(self) -> list[fx.Node]:
        """Replace the update by calls; nothing has changed where it raises."""
        layer = self.layer
        before = set(layer.between)
        bits = [node for node in self.region if node.target is _RANDOM]
        before.update(node for node in bits if before.issuperset(node.users))  # those of moments
        between = [node for node in self.region if node in before]
        behind = [node for node in self.region if node not in before and node not in self.gemms]
        outputs = [Output(node, target) for node, target in self.targets]
        self.between = between
        between, low = self._low(between, [output for output in outputs if output.node in before])
        left = dict.fromkeys(str(node.target).removeprefix("aten.").partition(".")[0] for node in self._stays(between))
        where = "between them" if low else "before it"
        self.left = f", and {where} Inductor's {', '.join(left)}" if left else ""
        written = [output for output in outputs if output.node not in before] + [Output(scale) for scale in self.scales]
        epilogue = from_graph(behind, written, matrix_spaces(behind, layer.up))
        refuse_own_results(epilogue)
        products, tensors = [], list[fx.Node]()
        for gemm in self.gemms:
            name = next((name for name, node in epilogue.buffers.items() if node is gemm), None)
            if name is None:
                raise _refused(gemm)
            parts = [self._operand(each) for each in operands(gemm)]
            products.append(Factors(parts[0][0], parts[1][0], name))
            tensors += [*parts[0][1], *parts[1][1]]
        program: BlockProgram | GemmProgram = epilogue.program
        if products:
            first, *further = products
            program = GemmProgram(first.left, first.right, epilogue.program, first.product, tuple(further))
        if low is not None:
            refuse_without_kernel(low.program, [], layer.up)
        refuse_without_kernel(program, tensors, layer.up)
        calls = []
        if low is not None:
            call, results = launch(self.graph, self.context, low, between)
            written_by = {output.node: result for output, result in results.items()}
            tensors = [written_by.get(node, node) for node in tensors]
            calls.append(call)
        names = [each.product for each in products]
        call, _ = launch(
            self.graph,
            self.context,
            epilogue,
            self.region,
            gemm=str(program) if names else "",
            operands=tensors,
            products=names,
        )
        layer.up = call
        erase(self.graph, self.region)
        return [*calls, call]

    def _stays(self, part: list[fx.Node]) -> list[fx.Node]:
        """What stays with Inductor between the two programs."""
        return left_between(self.between, set(part), (self.layer.low, *self.layer.downs))

    def _operand(self, matrix: fx.Node) -> tuple[Operand, list[fx.Node]]:
        """An operand of a product of the write-back: a projector, decoded as it is loaded, or a tensor as it is."""
        if self.context.facts(self.graph).storage(matrix) == frozenset(self.layer.projector):
            return operand(self.between, matrix)
        source, transposed = through_transposes(matrix)
        return Operand(None, transposed), [source]

    def _low(self, between: list[fx.Node], states: list[Output]) -> tuple[list[fx.Node], Region | None]:
        """What works on r × n: the nodes that a program computes, all or those that states follow from, and it."""
        problem: RefusedError | None = None
        parts = (between, with_states(between, [output.node for output in states], self.layer.low) if states else [])
        for part in parts:
            outputs = self._read_outside(part, states) if part else []
            if not outputs and all(map(may_stay, self._stays(part))):
                return part, None
            try:
                region = from_graph(part, outputs, candidates(part, shape(outputs[0].node)))
                refuse_own_results(region)
            except RefusedError as refused:
                problem = problem or refused
                continue
            if all(map(may_stay, self._stays(part))):
                return part, region
        assert problem is not None
        raise problem

    def _read_outside(self, part: list[fx.Node], states: list[Output]) -> list[Output]:
        """States, and before them what the rest of the region reads of the part; numbers are computed where they are
        needed, and a projector is decoded where a product loads it."""
        rest = set(self.region).difference(part, self.gemms)
        stored = {output.node for output in states}
        read = [node for node in part if node is self.inner or (shape(node) and not rest.isdisjoint(node.users))]
        return [*(Output(node) for node in read if node not in stored), *states]


def _without_statistics(region: list[fx.Node]) -> list[fx.Node]:
    """A region without 0-d tensors that follow from larger ones: a norm, whether all is finite.  They are inputs then;
    scalars that follow from scalars are computed again where they are needed."""
    inside, left = set(region), set[fx.Node]()
    for node in region:
        if is_scalar(node) and any(
            source in left or (source in inside and not is_scalar(source)) for source in node.all_input_nodes
        ):
            left.add(node)
    return [node for node in region if node not in left]


def _refused(node: fx.Node) -> RefusedError:
    return RefusedError(Refusal.OPERATION, node)


# -- updates at full rank ---------------------------------------------------------------------------------------------


def _at_full_rank(graph: fx.Graph, context: Context, owned: set[fx.Node]) -> dict[fx.Node, str]:
    """Parameters that are not projected and worth a kernel, with their names: large ones, and those of any size and
    shape that draw random bits.  Outside of a kernel those are a hundred calls of an operator, and a tensor twice as
    large as the weight."""
    by_name = {node.name: node for node in graph.find_nodes(op="placeholder")}
    unmatched = {by_name[other.input]: other.name for other in (context.updates.unmatched if context.updates else ())
                 if other.input in by_name}  # fmt: skip
    large = {parameter: name for parameter, name in unmatched.items() if math.prod(shape(parameter)) >= SMALL}
    others = [written(anchor) for anchor in anchors(graph) if anchor not in owned]
    drawing = {target: unmatched.get(target, target.name) for target, stored in others
               if shape(target) and any(node.target is _RANDOM for node in behind([stored], _is_local))}  # fmt: skip
    return large | drawing


def _full_rank(
    graph: fx.Graph, context: Context, parameter: fx.Node, owned: set[fx.Node]
) -> tuple[fx.Node, set[fx.Node]]:
    """Fuse the update of a parameter that is not projected, with its states: the kernel's call, and what it writes."""
    mine: dict[fx.Node, fx.Node] = {}
    pending = [parameter]
    while pending:
        state = pending.pop()
        anchor = _writer(state, owned) if state not in mine and shape(state) else None
        if anchor is not None:
            mine[state] = anchor
            pending += _states(written(anchor)[1])
    region, read = _exclusive(set(mine.values())), list[fx.Node]()
    if any(node.target is ENCODE for node in region) and not any(node.target is DECODE for node in region):
        region, read = _with_decoding(graph, mine, region)
    refused: RefusedError | None = None
    while True:
        inside = set(region)
        outputs = [Output(stored, target) for target, stored in map(written, mine.values()) if stored in inside]
        if not any(output.target is parameter for output in outputs):
            raise refused or _refused(mine[parameter])
        outputs += [Output(node) for node in read]
        floats = next((shape(arguments(node)[0]) for node in region if node.target is ENCODE), shape(parameter))
        try:
            found = from_graph(region, outputs, candidates(region, floats))
        except RefusedError as error:
            # what the network computes, down to the gradient, is no part of the update: cut there and read on
            refused = refused or error
            smaller = _without(region, outputs, _where_to_cut(region, error.node))
            if len(smaller) == len(region):
                raise refused from error
            region = smaller
            continue
        refuse_own_results(found)
        refuse_without_kernel(found.program, [], parameter)
        call, _ = launch(graph, context, found, region)
        erase(graph, region)
        return call, {output.target for output in outputs if output.target is not None}


_LOCAL = {
    operator.getitem,
    _RANDOM,
    ENCODE,
    DECODE,
    torch.ops.qgalore.stochastic_round.default,
    torch.ops.qgalore.quantize_dynamic8.default,
    torch.ops.qgalore.dequantize_dynamic8.default,
    torch.ops.qgalore.drop_tail.default,
    aten.cat.default,
    aten.slice.Tensor,
    aten.expand.default,
    aten.amin.default,
    aten.amax.default,
}


def _writer(state: fx.Node, owned: set[fx.Node]) -> fx.Node | None:
    """The anchor that writes an input, where no layer's update has it."""
    writing = [user for user in state.users if is_anchor(user) and written(user)[0] is state and user not in owned]
    return max(writing, default=None)


def _states(stored: fx.Node) -> list[fx.Node]:
    """Inputs that a new value follows from through pointwise operations, formats and views alone."""
    return [node for node in behind([stored], _is_local) if node.op == "placeholder"]


def _is_local(node: fx.Node) -> bool:
    if node.target in _LOCAL:
        return True
    return bool(shape(node)) and (node.op == "placeholder" or node.target in POINTWISE or node.target in VIEWS)


def _exclusive(ends: set[fx.Node]) -> list[fx.Node]:
    """Nodes that nobody reads but `ends` and such nodes, in the order of the graph."""
    found: set[fx.Node] = set()
    pending = list(ends)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node.op != "call_function" or node in found or node in ends or is_gemm(node) or node.is_impure():
                continue
            if all(user in found or user in ends for user in node.users):
                found.add(node)
                pending.append(node)
    return sorted(found)


def _with_decoding(
    graph: fx.Graph, mine: dict[fx.Node, fx.Node], region: list[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The region of a coded state whose new value others read too, a momentum that is made orthogonal, say: with what
    decodes the old one, and the nodes that others read."""
    stored = [written(anchor)[1] for anchor in mine.values()]
    core, after = set(region), set(mine)
    for node in sorted(behind(stored, _is_local)):
        if node.op == "call_function" and not after.isdisjoint(node.all_input_nodes):
            after.add(node)
            core.add(node)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and _is_local(node) and node.users and core.issuperset(node.users):
            core.add(node)
    found = [node for node in graph.nodes if node in core]
    ends = set(mine.values())
    return found, [node for node in found if not all(user in core or user in ends for user in node.users)]


def _where_to_cut(region: list[fx.Node], refused: fx.Node) -> fx.Node:
    """The node that is refused; where the region reads that one transposed, what transposes it."""
    inside = set(region)
    transposing = (node for node in region if node.target in TRANSPOSES)
    into = inside | {refused}
    return next((node for node in transposing if refused in behind([node], into.__contains__)), refused)


def _without(region: list[fx.Node], outputs: list[Output], cut: fx.Node) -> list[fx.Node]:
    """A region without a node and what is needed for that alone."""
    left = set(region) - {cut}
    needed = set(behind([output.node for output in outputs if output.node in left], left.__contains__))
    return [node for node in region if node in needed]
