"""Find every layer's update (analysis; nothing changes).

    Matched   R = G Pᵀ  →  region  →  U = N P  →  region  →  copy_(weight, …)        and the mirror image on the left
    Left      the parameter, with a typed reason and the node that is in the way

Requires  post-grad graph: functional ATen that ends in ``copy_`` nodes, the anchors.
Tier      exact: nothing changes.

What is looked for is a *sandwich*: two matrix products that share a projector, with any arithmetic between and behind
them.  The write-back may read further products of the same projector, and the gradient itself, element by element.
Roles follow from dataflow alone: not from names, from the order of inputs, from how Adam is spelled or whose
optimizer it is.  From an anchor's value a walk back that stops at matrix products reaches the up-projection; from its
other operand such a walk reaches the down-projection.  0-d tensors are not walked through: lr, step, a clip factor and
the norm that it comes from are shared by layers.

The projector is known by what it is stored in (inputs of the graph, through an op that changes them in place) and by
how it is decoded, its transposition included: the two products must take P and Pᵀ of the same decoding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import permutations
from typing import Any

from torch import fx

from qgalore_compile.kernels.read.coded import floats_of
from qgalore_compile.passes import products
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.facts import Facts, states_among
from qgalore_compile.passes.nodes import (
    FUNCTIONALIZED,
    TRANSPOSES,
    anchors,
    arguments,
    aten,
    hint,
    operands,
    previous_version,
    prims,
    same_sizes,
    shape,
    written,
)
from qgalore_compile.passes.regions import LayerUpdate, assign_anchors, colour_regions, needs_all_of_it, shared_states


class Reason(Enum):
    """Why a parameter has no :class:`LayerUpdate`; the text is for the user."""

    NOT_PROJECTED = "updated at full rank: nothing between its gradient and the weight passes through a projector"
    NOT_A_MATRIX = (
        "updated at full rank: it has more than two dimensions, and only matrices are projected; keep each of its "
        "matrices in a parameter of its own (an nn.Linear for each expert, say) to have them projected"
    )
    NEEDS_GRADIENT = (
        "the update needs the full-rank gradient, or what follows from all of it, before the weight is written, so the "
        "gradient must exist"
    )
    OTHER_PROJECTOR = "projected down with one projector and up with another"
    SAME_ORIENTATION = "the projector stands the same way in both products; one of them must take its transpose"
    COMPUTED_PROJECTOR = (
        "the projector is computed in the step itself; keep it in a tensor of the optimizer's state and compute it "
        "anew in an op of its own"
    )
    PRODUCT_INSIDE = "another matrix product stands between the projections or behind them"
    SHARED_STATE = "a tensor of its state is written or read by the update of another parameter too"
    WRITTEN_TWICE = "its storage is written more than once in the step"


@dataclass(frozen=True)
class Unmatched:
    """A parameter without a :class:`LayerUpdate`."""

    name: str
    shape: tuple[int, ...]
    reason: Reason
    node: str
    input: str = ""

    @property
    def projected(self) -> bool:
        """Whether it looks like a projected layer that could not be matched, rather than one updated at full rank."""
        return self.reason not in (Reason.NOT_PROJECTED, Reason.NOT_A_MATRIX)

    def __str__(self) -> str:
        return f"{self.reason.value} (at {self.node})"


@dataclass
class Updates:
    """What the analysis found: matched layers in the order of the graph's inputs, and the other parameters."""

    layers: list[LayerUpdate]
    unmatched: list[Unmatched]


def update(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Find the updates, tell the record, and leave them in the context for the passes that follow."""
    context.updates = find_updates(graph, context.name_of, context.parameters, context.facts(graph))
    for layer in context.updates.layers:
        record.match(layer.up)
        context.note(layer).ops = len(layer.region)
    for other in context.updates.unmatched:
        record.skipped.append((other.name, str(other)))


def find_updates(
    graph: fx.Graph, name_of: dict[str, str] | None = None, parameters: Container[str] | None = None,
    facts: Facts | None = None,
) -> Updates:  # fmt: skip
    """Every parameter's update, or why it has none.

    Args:
        graph: functional, ending in anchors.
        name_of: readable names by the name of an input; the inputs of one tensor subclass share one.
        parameters: names of the inputs that are parameters rather than states, which are not worth a reason; None to
            tell by who reads whom.
        facts: of the graph, where some are known already.
    """
    name_of = name_of or {}
    facts = facts or Facts(graph)
    writing = anchors(graph)
    new = dict(map(written, writing))
    times = Counter(target for target, _ in map(written, writing))
    matched: dict[fx.Node, LayerUpdate] = {}
    refused: dict[fx.Node, Unmatched] = {}
    for anchor in writing:
        target, stored = written(anchor)
        if len(shape(target)) < 2 or previous_version(stored) is not None:
            continue
        name = name_of.get(target.name, target.name)
        outcome = _match(facts, target, stored, name)
        if isinstance(outcome, LayerUpdate) and times[target] > 1:
            outcome = Unmatched(name, outcome.shape, Reason.WRITTEN_TWICE, anchor.name)
        if isinstance(outcome, Unmatched):
            refused.setdefault(target, outcome)
        elif outcome.up not in matched or _is_state_of(facts, matched[outcome.up].parameter[0], target, new):
            matched[outcome.up] = outcome
    layers = list(matched.values())
    sharing = assign_anchors(facts, layers, writing)
    colour_regions(graph, layers)
    shared = shared_states(layers, sharing)
    kept = []
    for layer in layers:
        reader = needs_all_of_it(layer)
        if layer in shared:
            refused[layer.parameter[0]] = Unmatched(layer.name, layer.shape, Reason.SHARED_STATE, shared[layer])
        elif reader is not None:
            refused[layer.parameter[0]] = Unmatched(layer.name, layer.shape, Reason.NEEDS_GRADIENT, reader.name)
        else:
            kept.append(layer)
    owned = {anchor.args[0] for layer in kept for anchor in layer.anchors}
    names = {layer.name for layer in kept}
    left = {target: other for target, other in refused.items() if target not in owned and other.name not in names}
    if parameters is None:
        states = states_among([anchor for anchor in writing if anchor.args[0] in left])
        left = {target: other for target, other in left.items() if target not in states}
    else:
        left = {target: other for target, other in left.items() if target.name in parameters}
    others = {other.name: replace(other, input=target.name) for target, other in reversed(left.items())}
    return Updates(kept, list(reversed(others.values())))


def _is_state_of(facts: Facts, state: fx.Node, parameter: fx.Node, new: dict[fx.Node, fx.Node]) -> bool:
    """Whether one target is another's state, as a whole momentum is: what is written to the other reads it, and not the
    other way round."""
    return state in facts.inputs(new[parameter]) and parameter not in facts.inputs(new[state])


# -- one parameter ----------------------------------------------------------------------------------------------------


def _match(facts: Facts, target: fx.Node, stored: fx.Node, name: str) -> LayerUpdate | Unmatched:
    """The sandwich that ends in ``copy_(target, stored)``, or why there is none."""
    reached = _products(facts, stored)
    sizes = floats_of(target)
    plain = Reason.NOT_PROJECTED if len(sizes) == 2 else Reason.NOT_A_MATRIX
    refused = Unmatched(name, sizes, plain, (reached[0] if reached else stored).name)
    for up in reached:
        outcome = _sandwich(facts, target, up, name)
        if isinstance(outcome, LayerUpdate):
            return _with_further_products(facts, target, outcome, [gemm for gemm in reached if gemm is not up])
        refused = outcome or refused
    return _scaled(facts, target, stored, reached, name) or refused


def _scaled(
    facts: Facts, target: fx.Node, stored: fx.Node, reached: Sequence[fx.Node], name: str
) -> LayerUpdate | None:
    """A layer that writes its gradient, scaled by what follows from a projection of it; None for another update."""
    m, n = floats_of(target) if len(floats_of(target)) == 2 else (0, 0)
    projections: dict[fx.Node, list[fx.Node]] = {}  # by what may be the gradient
    # what follows from R may be one number a matrix, which is not walked through
    for down in dict.fromkeys([*reached, *_projecting(reached)]):
        for gradient, other in permutations(operands(down)) if down.target is aten.mm.default else ():
            rank = shape(down)[operands(down)[0] is gradient]
            if not same_sizes(gradient, (m, n)) or same_sizes(other, (m, n)) or hint(rank) > min(hint(m), hint(n)):
                continue
            # a projector is drawn or kept: it follows from no product, as the factor of an iteration on G does
            if facts.storage(other) is not None:
                projections.setdefault(gradient, []).append(down)
    for gradient, downs in projections.items():
        factors = products.parse(gradient)
        terms = factors.gemms
        if terms:  # all of it: what else is in a sum is no gradient, but Muon's iterate, say
            read = factors.obstacle is None and terms <= set(reached)
        else:  # an input, and not one that the step writes
            read = gradient in facts.inputs(stored) - facts.written
        # a second one, of the other side, where sketches tell of rows and of columns
        sides = {_on_right(down, gradient, (m, n)): down for down in downs}
        if not read or not terms.isdisjoint(downs) or len(sides) < len(downs) or not terms | {*downs} >= set(reached):
            continue
        own = hint(m) >= hint(n)
        down, *across = (sides[side] for side in (own, not own) if side in sides)
        low, refresh = _refreshed(down)
        on_right = _on_right(down, gradient, (m, n))
        rank = shape(down)[operands(down)[0] is gradient]
        return LayerUpdate(
            name, (m, n), "right" if on_right else "left", rank, (target,), down, gradient, gradient, factors, refresh,
            low, (), across=tuple(across),
        )  # fmt: skip
    return None


def _on_right(down: fx.Node, gradient: fx.Node, sizes: tuple[Any, Any]) -> bool:
    """Whether a product projects a gradient, which may stand transposed, on the right side."""
    m, n = sizes
    return bool((operands(down)[0] is gradient) == (m == n or shape(gradient) == (m, n)))


def _projecting(reached: Sequence[fx.Node]) -> list[fx.Node]:
    """Products that take what others come to, through the operations that a gradient is parsed through."""
    found, pending, seen = list[fx.Node](), list(reached), set(reached)
    for node in pending:
        for user in node.users:
            if user.target is aten.mm.default:
                found.append(user)
            elif user.target in products.LINEAR and len(shape(user)) == 2 and user not in seen:
                seen.add(user)
                pending.append(user)
    return found


def _with_further_products(
    facts: Facts, target: fx.Node, layer: LayerUpdate, others: list[fx.Node]
) -> LayerUpdate | Unmatched:
    """The layer with those other products that its write-back may read; why not, where one is neither the gradient's
    nor of its projector."""
    further = []
    for gemm in others:
        if gemm in layer.factors.gemms or gemm is layer.down:
            continue
        another = _sandwich(facts, target, gemm, layer.name)
        same = isinstance(another, LayerUpdate) and another.down is layer.down and another.projector == layer.projector
        if not same or gemm.target is not aten.mm.default:
            return Unmatched(layer.name, layer.shape, Reason.PRODUCT_INSIDE, gemm.name)
        further.append(gemm)
    return replace(layer, further=tuple(further))


def _with_a_product_inside(layer: LayerUpdate, others: list[fx.Node]) -> Unmatched:
    """Why a layer is refused whose N follows from other products than R."""
    guilty = next((gemm for gemm in others if gemm in layer.factors.gemms), None)
    if guilty is not None:
        return Unmatched(layer.name, layer.shape, Reason.NEEDS_GRADIENT, guilty.name)
    return Unmatched(layer.name, layer.shape, Reason.PRODUCT_INSIDE, others[0].name)


def _sandwich(facts: Facts, target: fx.Node, up: fx.Node, name: str) -> LayerUpdate | Unmatched | None:
    """The sandwich whose upper product is ``up``; the reason, if it nearly is one; None if it is nothing like it."""
    weight = floats_of(target)
    if up.target not in _PLAIN or not same_sizes(up, weight):
        return None
    refused: Unmatched | None = None
    left, right = operands(up)
    for projector, inner in ((right, left), (left, right)):
        for down, gradient, other in _downs(facts, inner, target):
            reason = _mismatch(facts, up, projector, down, other)
            if reason is None:
                return _layer(facts, target, up, projector, inner, down, gradient, name)
            if reason is not Reason.NOT_PROJECTED and target not in (facts.storage(projector) or ()):
                refused = Unmatched(name, weight, reason, down.name)
    return refused


def _downs(facts: Facts, inner: fx.Node, target: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Products that ``inner`` follows from and that contract something shaped like the weight: (product, it, other)."""
    for down in _through_inside(facts, inner, floats_of(target)):
        if down.target in _PLAIN:
            first, second = operands(down)
            for gradient, other in ((first, second), (second, first)):
                # an input may be a gradient where the optimizer's step is compiled alone, but not one that the step
                # writes: a weight times its input is shaped like this too
                if same_sizes(gradient, floats_of(target)) and not facts.written & (
                    facts.storage(gradient) or frozenset()
                ):
                    yield down, gradient, other


MOST_INSIDE = 64
"""Products between the projections at most: ten steps of Newton and Schulz have thirty."""


def _through_inside(facts: Facts, inner: fx.Node, weight: tuple[Any, ...]) -> list[fx.Node]:
    """The products that a node follows from, through those of what follows from R as well: no larger than it, and with
    no operand that is shaped like the weight."""
    sizes, found = set(map(str, shape(inner))), dict.fromkeys(facts.gemms(inner))
    pending = list(found)
    while pending and len(found) <= MOST_INSIDE:
        gemm = pending.pop()
        if sizes.issuperset(map(str, shape(gemm))) and not any(same_sizes(each, weight) for each in operands(gemm)):
            new = [other for source in gemm.all_input_nodes for other in facts.gemms(source) if other not in found]
            found.update(dict.fromkeys(new))
            pending.extend(new)
    return list(found)


def _products(facts: Facts, node: fx.Node) -> list[fx.Node]:
    """The products that a node follows from, those in what an ``addmm`` among them adds included."""
    found = dict.fromkeys(facts.gemms(node))
    pending = list(found)
    while pending:
        gemm = pending.pop()
        if gemm.target in (aten.addmm.default, aten.baddbmm.default):
            new = [other for other in facts.gemms(arguments(gemm)[0]) if other not in found]
            found.update(dict.fromkeys(new))
            pending.extend(new)
    return list(found)


def _mismatch(facts: Facts, up: fx.Node, projector: fx.Node, down: fx.Node, other: fx.Node) -> Reason | None:
    """Why two operands are not one projector; None if they are.  NOT_PROJECTED where they have nothing in common."""
    storage = facts.storage(projector)
    if storage is None:  # what is as large as the weight is no projector, but an iterate of Newton and Schulz, say
        same = _source(projector) is _source(other) and not same_sizes(projector, shape(up))
        return Reason.COMPUTED_PROJECTOR if same else Reason.NOT_PROJECTED
    if not storage or facts.storage(other) is None or not same_sizes(other, shape(projector)):
        return Reason.NOT_PROJECTED
    if facts.storage(other) != storage or not facts.same_decoding(other, projector):
        return Reason.OTHER_PROJECTOR
    # U = N P needs R = G Pᵀ, or Rᵀ = P Gᵀ; U = P N needs R = Pᵀ G, or Rᵀ = Gᵀ P
    same_place = (operands(up)[1] is projector) == (operands(down)[1] is other)
    if (facts.transposed(other) != facts.transposed(projector)) != same_place:
        return Reason.SAME_ORIENTATION
    return None


def _source(node: fx.Node) -> fx.Node:
    """The node behind transposes and casts."""
    while node.op == "call_function" and node.target in _SEEN_THROUGH:
        node = arguments(node)[0]
    return node


def _layer(
    facts: Facts, target: fx.Node, up: fx.Node, projector: fx.Node, inner: fx.Node,
    down: fx.Node, gradient: fx.Node, name: str,
) -> LayerUpdate | Unmatched:  # fmt: skip
    """The record of a sandwich, unless another product stands inside it."""
    m, n = floats_of(target)
    on_right = (operands(up)[1] is projector) == (m == n or shape(up) == (m, n))
    low, refresh = _refreshed(down)
    layer = LayerUpdate(
        name, (m, n), "right" if on_right else "left", shape(projector)[0 if operands(up)[1] is projector else 1],
        (target,), down, up, gradient, products.parse(gradient), refresh, low,
        tuple(sorted(facts.storage(projector) or (), key=lambda node: node.name)),
    )  # fmt: skip
    inside = [gemm for gemm in _through_inside(facts, inner, (m, n)) if gemm is not down]
    allowed = {down, *inside}
    for gemm in inside:
        follows = {other for source in gemm.all_input_nodes for other in facts.gemms(source)}
        if not follows or not follows <= allowed or gemm in layer.factors.gemms:
            return _with_a_product_inside(layer, [gemm])
    return replace(layer, inside=tuple(inside))


def _refreshed(down: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(R as the region reads it, the op that may overwrite it), through casts and transposes of the product."""
    pending = [down]
    for node in pending:
        for user in node.users:
            if user.target is FUNCTIONALIZED:
                low = next((result for result in user.users if previous_version(result) is node), node)
                return low, user
            if user.target in _SEEN_THROUGH:
                pending.append(user)
    return down, None


_PLAIN = frozenset({aten.mm.default, aten.addmm.default})
_SEEN_THROUGH = TRANSPOSES | {prims.convert_element_type.default, aten._to_copy.default, aten.clone.default}
