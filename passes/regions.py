"""One layer's part of a graph: which nodes are its update's and nobody else's, and what of them stands where.

A node belongs to a layer if all its readers do, from the anchors that write the layer's weight and states up to the
products that take the gradient.  What is between the projections works on r × n; the write-back, on m × n.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from qgalore_compile._torch import OpOverload
from qgalore_compile.kernels.read.spelling import POINTWISE
from qgalore_compile.passes import products
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.nodes import (
    REDUCTIONS,
    VIEWS,
    arguments,
    aten,
    first_version,
    is_anchor,
    is_gemm,
    is_scalar,
    operands,
    previous_version,
    shape,
    written,
)


@dataclass(eq=False)
class LayerUpdate:
    """One matched parameter.  Shapes: weight (m, n), R and N (m, r) on the right or (r, n) on the left.

    Attributes:
        name: the parameter's, where the caller knows names; else the input's.
        shape, side, rank: of the weight, of the projection.
        parameter: the inputs that the weight is stored in; several for INT8.
        down, up: the two products, either of which may add something (``addmm``); passes that replace ``down`` keep it
            true.
        across: of an update that sketches both sides, the gradient's product with what is drawn for the other one.
        further: products that the write-back reads beside ``up``: others of the projector's with what follows from R,
            and the gradient's own, made for it alone (:mod:`qgalore_compile.passes.late_gradient`).
        inside: products between the projections of what follows from R: Newton and Schulz's, say.
        gradient: the operand of ``down`` that is not the projector: G, possibly transposed.
        factors: G as a sum of products, as far as it is one.
        refresh: the op between ``down`` and the region that may overwrite R, projector and states; None without one.
        low: R as the region reads it: the refresh op's version of ``down``.
        projector: the inputs that the projector is stored in.
        anchors: the ``copy_`` nodes that write this layer's weight and states.
        region: nodes of the update that nobody else reads, in the order of the graph: between R and the anchors,
            decoding of states and of the projector for ``up`` included.
        states: inputs that the region reads, behind a refresh op that changes them or not, and an anchor of the layer
            writes, beside the weight.
    """

    name: str
    shape: tuple[int, int]
    side: str
    rank: int
    parameter: tuple[fx.Node, ...]
    down: fx.Node
    up: fx.Node
    gradient: fx.Node
    factors: products.Sum
    refresh: fx.Node | None
    low: fx.Node
    projector: tuple[fx.Node, ...]
    anchors: list[fx.Node] = field(default_factory=list)
    region: list[fx.Node] = field(default_factory=list)
    states: tuple[fx.Node, ...] = ()
    further: tuple[fx.Node, ...] = ()
    inside: tuple[fx.Node, ...] = ()
    across: tuple[fx.Node, ...] = ()

    @property
    def downs(self) -> tuple[fx.Node, ...]:
        """The gradient's products with projectors."""
        return (self.down, *self.across)

    @property
    def between(self) -> list[fx.Node]:
        """The part of the region that works on r × n: what ``up`` or a new state follows from without ``up``."""
        behind, after = {self.up, *self.further, *self.gradient_nodes}, {*self.downs, self.low}
        for node in self.region:
            if any(source in behind for source in node.all_input_nodes):
                behind.add(node)
            if any(source in after for source in node.all_input_nodes):
                after.add(node)
        # one number of a weight's format, the mean of its scales, is written like a state, and follows from U
        states = {stored for target, stored in map(written, self.anchors) if target not in self.parameter}
        before = {self.up, *self.further, *(states - behind)}
        for node in reversed(self.region):
            if node in before:
                before.update(node.all_input_nodes)
        return [node for node in self.region if (node in before or node in after) and node not in behind]

    @property
    def gradient_nodes(self) -> set[fx.Node]:
        """G and what it is parsed from, down to its products; of a gradient that is taken apart already, nothing."""
        return {self.gradient, *self.factors.nodes, *filter(None, [self.factors.obstacle])} - {*self.downs, self.low}

    @property
    def write_back(self) -> list[fx.Node]:
        """The part of the region that ends in the weight alone, its decoding included."""
        left = {*self.between, self.up, *self.further}
        return [node for node in self.region if node not in left]


def assign_anchors(facts: Facts, layers: list[LayerUpdate], writing: list[fx.Node]) -> set[LayerUpdate]:
    """Give each layer the anchors that follow from its products alone; the layers that share one."""
    owner = {
        gemm: layer for layer in layers
        for gemm in (*layer.downs, *layer.inside, *((layer.up, *layer.further) if layer.projector else ()))
    }  # fmt: skip
    direct = {gemm: layer for layer in layers for gemm in layer.factors.gemms}
    new = dict(map(written, writing))
    downs = Counter(layer.down for layer in layers)
    sharing = {layer for layer in layers if downs[layer.down] > 1}
    for anchor in writing:
        target, stored = written(anchor)
        reached = facts.gemms(stored)
        reading = dict.fromkeys(direct[gemm] for gemm in reached if gemm in direct)
        keeping = {layer for layer in reading if _keeps(facts, layer, target, new)}
        owners = {owner[gemm]: None for gemm in reached if gemm in owner}
        owners |= {layer: None for layer in reading if layer in keeping or _writes(facts, layer, stored)}
        # a write-back's own gradient, which a state may follow from too
        writing_back = {layer for layer in owners if layer.up in reached or _writes(facts, layer, stored)}
        mine = {gemm for layer in writing_back | keeping for gemm in layer.factors.gemms}
        if is_scalar(target) or previous_version(stored) is not None:
            continue
        if len(owners) > 1:
            sharing.update(owners)
        elif owners and all(gemm in owner or gemm in mine for gemm in reached):
            (layer,) = owners
            layer.anchors.append(anchor)
            if layer in writing_back - keeping and target not in layer.parameter:
                layer.parameter = (*layer.parameter, target)
    return sharing


def _writes(facts: Facts, layer: LayerUpdate, stored: fx.Node) -> bool:
    """Whether a value is the weight's, of a layer without a projector: it follows from the weight and from G itself."""
    if layer.projector or layer.parameter[0] not in facts.inputs(stored):
        return False
    return _follows_from_gradient(facts, layer, stored)


def _keeps(facts: Facts, layer: LayerUpdate, target: fx.Node, new: dict[fx.Node, fx.Node]) -> bool:
    """Whether an input is a state that follows from G itself, as a momentum of all of it does: the weight's new value
    reads it, and it does not read the weight."""
    weight = layer.parameter[0]
    if target not in facts.inputs(new[weight]) or weight in facts.inputs(new[target]):
        return False
    return _follows_from_gradient(facts, layer, new[target])


def _follows_from_gradient(facts: Facts, layer: LayerUpdate, stored: fx.Node) -> bool:
    terms = layer.factors.gemms
    return not terms.isdisjoint(facts.gemms(stored)) if terms else layer.gradient in facts.inputs(stored)


_MANY, _ANY = object(), object()  # colours beside a layer's: read by others too; read by 0-d anchors alone


def colour_regions(graph: fx.Graph, layers: list[LayerUpdate]) -> None:
    """Fill ``region`` and ``states``: a node belongs to a layer if all its readers do.  One walk for all layers."""
    colour: dict[fx.Node, object] = {anchor: layer for layer in layers for anchor in layer.anchors}
    colour.update((down, _MANY) for layer in layers for down in layer.downs)
    ups = {gemm for layer in layers for gemm in (layer.up, *layer.further, *layer.inside)}
    for layer in layers:
        layer.region = []
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for node in reversed(nodes):
        if node in colour:
            continue
        if is_anchor(node):
            colour[node] = _ANY if is_scalar(node.args[0]) else _MANY
            continue
        readers = {colour.get(user, _MANY) for user in node.users} - {_ANY}
        mine = readers.pop() if len(readers) == 1 else _MANY if readers or not node.users else _ANY
        stays = not _is_plain_call(node) or node.is_impure() or (is_gemm(node) and node not in ups)
        colour[node] = _MANY if stays else mine
    for node in nodes:
        if colour[node] is _ANY and not is_anchor(node):  # a 0-d state: with the layer whose nodes it follows from
            sources = {colour.get(source, _MANY) for source in node.all_input_nodes} - {_MANY, _ANY}
            if len(sources) == 1:
                colour[node] = sources.pop()
        mine = colour[node]
        if isinstance(mine, LayerUpdate) and not is_anchor(node):
            mine.region.append(node)
    for node in nodes:
        mine = colour.get(node.args[1]) if is_anchor(node) and is_scalar(node.args[0]) else None
        if isinstance(mine, LayerUpdate) and node not in mine.anchors:
            mine.anchors.append(node)
    for layer in layers:
        own = {target for target, _ in map(written, layer.anchors)} - set(layer.parameter)
        inputs = (first_version(source) for node in layer.region for source in node.all_input_nodes)
        read = {source: None for source in inputs if source in own}
        layer.states = tuple(read)


def _is_plain_call(node: fx.Node) -> bool:
    """Whether a node calls an operator, or takes one of several results of one."""
    if node.target is operator.getitem:
        return isinstance(arguments(node)[0].target, OpOverload)
    return isinstance(node.target, OpOverload)


def shared_states(layers: list[LayerUpdate], sharing: set[LayerUpdate]) -> dict[LayerUpdate, str]:
    """Layers whose states are not theirs alone, with the node that shows it."""
    owner = {anchor.args[0]: layer for layer in layers for anchor in layer.anchors}
    found = {layer: layer.up.name for layer in sharing}
    for layer in layers:
        for node in layer.region:
            for source in map(first_version, node.all_input_nodes):
                if owner.get(source, layer) is not layer:
                    found.setdefault(layer, node.name)
                    found.setdefault(owner[source], node.name)
    return found


def readers_of_gradient(layer: LayerUpdate) -> list[tuple[fx.Node, fx.Node]]:
    """(a node of the region, what it reads of G or of what G is parsed from), in the order of the region."""
    parts = layer.gradient_nodes
    return [(node, source) for node in layer.region for source in node.all_input_nodes if source in parts]


def needs_all_of_it(layer: LayerUpdate) -> fx.Node | None:
    """A node of the region that asks for more of G than an element in its place: for a number of it, for N, or for
    elements in another order."""
    behind = {node for node, _ in readers_of_gradient(layer)}
    foreign = next((node for node in layer.region if node in behind and node.target not in _IN_PLACE), None)
    if foreign is not None:
        return foreign
    after = set(behind)
    for node in layer.region:
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    states = [(target, stored) for target, stored in map(written, layer.anchors) if target not in layer.parameter]
    # what follows from R alone must; what follows from G, a weight or a momentum of all of it, may element by element.
    # Of a weight's scales a number may be made, their mean, and its codes do not follow from that
    inner = set(operands(layer.up)) if layer.projector else set()
    inner |= {stored for target, stored in states if not is_scalar(target) and stored not in after}
    outer = {stored for target, stored in states if not is_scalar(target) and stored in after}
    outer |= {written(anchor)[1] for anchor in layer.anchors if anchor.args[0] is layer.parameter[0]}
    for node in reversed(layer.region):
        if node in inner and node is not layer.up:
            inner.update(node.all_input_nodes)
        if node in outer:
            outer.update(node.all_input_nodes)
    inside = set(layer.region)
    for node in layer.region:
        if node in after:
            number = is_scalar(node) and any(user in inside and not is_scalar(user) for user in node.users)
            whole = number or (node.target in REDUCTIONS and not _last(node))
            if node in inner or (whole and node in outer):
                return node
    return None


_IN_PLACE = frozenset(POINTWISE) | VIEWS


def _last(node: fx.Node) -> bool:
    """Whether a reduction is along the last dimension alone, as within a row."""
    dims = arguments(node)[2 if node.target is aten.linalg_vector_norm.default else 1]
    return list(dims or ()) in ([-1], [len(shape(arguments(node)[0])) - 1])
