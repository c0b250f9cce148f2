"""Take the padding off products that other passes look for.

    Before    %s = slice(mm(pad(%a, (k + 3)), pad(%b, (k + 3, n + 5))), 1, 0, n)
    After     %s = mm(%a, %b)

    Before    %s = slice(addmm(cat(%bias, zeros), pad(%a), pad(%b)), 1, 0, n)
    After     %s = addmm(%bias, %a, %b)

Which     the products with a matrix that is decoded from integers or that a refresh op writes, and those that a
          gradient handed to a refresh op is made of.
Requires  operands with zeros behind their rows and columns, and that nobody reads the result's part that they give.
Tier      rounding: a library may add up a product of another size in another order.

On a GPU Inductor pads the products of odd sizes where timing them says so, before any pass of ours: bfloat16 with a
side that 8 does not divide, such as the MLP of `1b`, 5,461 wide.  A padded gradient is no sum of products to read, and
a decoded weight would be stored to be padded.  Generated kernels mask their edges instead.  All other products stay as
Inductor made them.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qgalore_compile.passes import products
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.decoding import quantised_operands
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.nodes import (
    FUNCTIONALIZED,
    Mutation,
    arguments,
    aten,
    behind,
    erase_dead,
    is_gemm,
    make,
    operands,
    shape,
)
from qgalore_compile.subspace.refresh import REFRESHES

_PAD, _SLICE = aten.constant_pad_nd.default, aten.slice.Tensor


def unpad(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace every padded product that is looked for by the product of what was padded."""
    if not graph.find_nodes(op="call_function", target=_PAD):
        return
    facts = context.facts(graph)
    refreshed = _of_refreshes(graph, facts)
    padded = [node for node in graph.nodes if is_gemm(node) and any(map(_is_padded, operands(node)))]
    for gemm in [node for node in padded if node in refreshed or quantised_operands(facts, node)]:
        problem = _replace(graph, context, gemm)
        if problem is None:
            record.match(gemm)
        else:
            record.skip(gemm, problem)


def _of_refreshes(graph: fx.Graph, facts: Facts) -> set[fx.Node]:
    """Products with a projector that a refresh op writes, and products that its gradient is made of."""
    gradients: list[fx.Node] = []
    projectors: set[frozenset[fx.Node] | None] = set()
    for call in graph.find_nodes(op="call_function", target=FUNCTIONALIZED):
        refresh = Mutation.of(call, *REFRESHES)
        if refresh is not None:
            gradients += refresh["factors"]
            projectors.add(frozenset().union(*(facts.storage(each) or () for each in refresh["projector"])))
    ends = [node for gradient in gradients for node in behind([gradient], _is_linear)]
    found = {source for node in ends for source in (node, *node.all_input_nodes) if is_gemm(source)}
    found.update(node for node in graph.nodes
                 if is_gemm(node) and any(facts.storage(each) in projectors for each in operands(node)))  # fmt: skip
    return found


def _is_linear(node: fx.Node) -> bool:
    return node.target in products.LINEAR or node.target in (_PAD, _SLICE)


def _is_padded(node: fx.Node) -> bool:
    """Whether zeros stand behind the rows and columns of a matrix, and nowhere else."""
    if node.target is not _PAD:
        return False
    _, widths, *fill = arguments(node)
    return not any(fill) and all(width == 0 for width in widths[::2]) and all(width >= 0 for width in widths[1::2])


def _replace(graph: fx.Graph, context: Context, gemm: fx.Node) -> str | None:
    """Why not; None where it is done."""
    if gemm.target not in (aten.mm.default, aten.addmm.default):
        return "a batch of products"
    left, right = (arguments(each)[0] if _is_padded(each) else each for each in operands(gemm))
    size = (shape(left)[0], shape(right)[1])
    if shape(left)[1] != shape(right)[0]:
        return "its operands are padded to one length from two"
    cuts = _cuts(gemm, size)
    if cuts is None:
        return "its padding is read"
    with graph.inserting_before(gemm):
        if gemm.target is aten.mm.default:
            product = make(graph, aten.mm.default, left, right)
        else:
            added = _without_zeros(arguments(gemm)[0], size)
            if added is None:
                return "what it adds is longer than its result"
            product = make(graph, aten.addmm.default, added, left, right, **gemm.kwargs)
    if "stack_trace" in gemm.meta:
        product.meta["stack_trace"] = gemm.meta["stack_trace"]
    for cut in cuts:
        context.replace(graph, cut, product)
        erase_dead(graph, cut)
    return None


def _cuts(product: fx.Node, size: tuple[Any, ...]) -> list[fx.Node] | None:
    """The nodes that hold the leading ``size`` of a padded product and nothing else; None where more of it is read."""
    if shape(product) == size:
        return [product]
    found = []
    for user in product.users:
        if user.target is not _SLICE or len(user.args) > 4 or (len(user.args) > 2 and user.args[2] != 0):
            return None
        cuts = _cuts(user, size) if all(a >= b for a, b in zip(shape(user), size, strict=True)) else None
        if cuts is None:
            return None
        found += cuts
    return found


def _without_zeros(added: fx.Node, size: tuple[Any, ...]) -> fx.Node | None:
    """What a padded ``addmm`` adds, before zeros were joined to it; None where that does not fit ``size``."""
    while added.target is aten.cat.default and len(arguments(added)[0]) == 2:
        added = arguments(added)[0][0]
    sizes = shape(added)
    fits = all(own in (1, of) for own, of in zip(reversed(sizes), reversed(size), strict=False))
    return added if fits else None
