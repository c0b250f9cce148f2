"""Compute a loss over a vocabulary where its logits lie, some rows at a time, down to their gradient.

    Before    %z = mm(X, Wᵀ)                                       T × V: logits
              %p = softmax(%z) … %loss = gather(log %p, labels)      in several tensors of that size
              %dz = (%p - onehot(labels)) * %scale
              %dX = mm(%dz, W);  %dW = mm(%dzᵀ, X)
    After     %loss, %dX, %dW = run_loss("loss …", [X, W, labels, …])        where T > d
              %z = mm(X, Wᵀ);  %loss, %dz = run_program("…", [%z!, …], …)      else

Requires  logits that a softmax over the vocabulary is taken of, and nobody else reads; operations of which no row
          depends on another; a gradient of the loss that is known before it; a lowering that runs such programs.
Tier      rounding: sums over the vocabulary, and over blocks of rows, in another order.

16 × 256 tokens and a vocabulary of 49,152 make logits of 0.81 GB, in float32, and the graph keeps two tensors of that
size.  Here a block of 64 MiB exists where the gradient of the head is smaller than its factors, and is made; else the
logits alone, which become their gradient in place (:mod:`qgalore_compile.passes.row_blocks` then makes the head's).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from qgalore_compile.kernels import ops
from qgalore_compile.kernels.ir.loss import GRADIENTS, LossProgram
from qgalore_compile.kernels.ir.program import Space
from qgalore_compile.kernels.loss import SMALL
from qgalore_compile.kernels.lowering import runs
from qgalore_compile.kernels.read.from_graph import from_graph
from qgalore_compile.kernels.read.region import Output, Refusal, RefusedError, Region
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.launch import (
    contiguous,
    empty_like,
    erase,
    functionalized,
    launch,
    refuse_without_kernel,
    through_transposes,
)
from qgalore_compile.passes.losses import Loss, Matrices, loss_of
from qgalore_compile.passes.nodes import (
    TRANSPOSES,
    arguments,
    aten,
    dtype,
    is_gemm,
    is_plain,
    make,
    operands,
    shape,
    value,
)
from qgalore_compile.passes.placement import move_behind


def chunked_loss(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace every such loss."""
    for node in list(graph.nodes):
        if not _may_be_logits(node):
            continue
        try:
            loss = loss_of(node)
            if loss is None:
                continue
            told = _replace(graph, context, loss)
        except RefusedError as refused:
            record.skip(node, f"a loss over {shape(node)[1]:,} columns stays as it is: {refused}")
            continue
        record.match(node)
        context.program.setdefault("losses", []).append(told)


def _may_be_logits(node: fx.Node) -> bool:
    if not is_gemm(node) or len(shape(node)) != 2 or node._erased or not runs("chunked_loss", value(node).device):
        return False
    return is_plain(node) and all(isinstance(size, int) for size in shape(node)) and math.prod(shape(node)) >= SMALL


# -- in its place -----------------------------------------------------------------------------------------------------


def _replace(graph: fx.Graph, context: Context, loss: Loss) -> dict[str, object]:
    """Put calls in a loss's place; what is told of it.  The graph is as it was where it raises."""
    rows, columns = shape(loss.logits)
    if dtype(loss.gradient) != dtype(loss.logits):
        raise RefusedError(Refusal.DTYPE, loss.gradient)
    matrices = Matrices(graph, loss)
    outputs = [Output(matrices.of[loss.gradient], loss.logits)]
    outputs += [Output(copy) for copy in dict.fromkeys(matrices.of[each] for each in loss.results)]
    try:
        region = from_graph(matrices.inside, outputs, [Space(rows, columns, columns)])
        refuse_without_kernel(region.program, [], loss.logits)
    except RefusedError:
        matrices.erase()
        raise
    products = _products(loss, context.facts(graph))
    if products is None:
        call, stored = launch(graph, context, region, matrices.inside)
        results = {loss.gradient: stored[outputs[0]]}
    else:
        call, results, stored = _call(graph, loss, region, products)
    left = {output.node: result for output, result in stored.items()}
    results |= {each: left[matrices.of[each]] for each in loss.results}
    _hand_over(graph, context, call, results)
    erase(graph, sorted({*results, *loss.inside}))
    matrices.erase()
    return {"rows": rows, "columns": columns, "dtype": str(dtype(loss.logits)).removeprefix("torch."),
            "how": "by rows" if products else "in place"}  # fmt: skip


def _hand_over(graph: fx.Graph, context: Context, call: fx.Node, results: dict[fx.Node, fx.Node]) -> None:
    """Give readers what a call left, in the shapes that they know, or added to what it was."""
    last = max(results.values())
    handed = []
    for old, new in results.items():
        if shape(old) != shape(new):
            with graph.inserting_before(last.next):
                last = new = make(graph, aten.reshape.default, new, list(shape(old)))
        handed.append(new)
        if old.target is aten.addmm.default:
            # where it was: what it is added to may follow from the call (a tied weight's other part does)
            with graph.inserting_before(old):
                new = make(graph, aten.add.Tensor, arguments(old)[0], new)
        context.replace(graph, old, new)
    move_behind(call, sorted(handed))


class _Products(NamedTuple):
    """The products around a loss.

    Attributes:
        operands: hidden (T, d), weight (d, V) and perhaps a bias; tensors, and
        transposed: whether the first two are their transposes.
        gradients: by whose, the node.
    """

    operands: list[fx.Node]
    transposed: tuple[bool, bool]
    gradients: dict[str, fx.Node]


def _products(loss: Loss, facts: Facts) -> _Products | None:
    """The products that read a loss's gradient; None where something else does, or what they make takes no less memory
    than the logits."""
    *bias, left, right = arguments(loss.logits)
    (hidden, first), (weight, second) = through_transposes(left), through_transposes(right)
    if bias and shape(bias[0]) != shape(loss.logits)[1:]:
        return None
    gradients = dict[str, fx.Node]()
    for user, flipped in _readers(loss.gradient):
        whose = _whose(user, flipped, loss.gradient, (hidden, first), (weight, second), facts)
        if whose is None or whose in gradients or dtype(user) != dtype(loss.logits):
            return None
        gradients[whose] = user
    size, made = dtype(loss.logits).itemsize, 0
    for whose, each in gradients.items():
        # what is summed over blocks is summed in float32, and exists beside what it is added to
        made += math.prod(shape(each)) * (size if whose == "hidden" else 4)
        made += math.prod(shape(each)) * size * (each.target is aten.addmm.default)
    if weight.op != "placeholder":  # a decoded one is there as a whole
        made += math.prod(shape(weight)) * size
    if made >= size * math.prod(shape(loss.logits)):
        return None
    ordered = {whose: gradients[whose] for whose in GRADIENTS if whose in gradients}
    return _Products([hidden, weight, *bias], (first, second), ordered)


def _readers(node: fx.Node, flipped: bool = False) -> Iterator[tuple[fx.Node, bool]]:
    """Readers of a matrix, through transposes: each, and whether it reads the transpose."""
    for user in node.users:
        if user.target in TRANSPOSES:
            yield from _readers(user, not flipped)
        else:
            yield user, flipped


def _whose(
    user: fx.Node, flipped: bool, gradient: fx.Node, hidden: tuple[fx.Node, bool], weight: tuple[fx.Node, bool],
    facts: Facts,
) -> str | None:  # fmt: skip
    """Whose gradient a reader of the logits' gradient is; None where it is something else."""
    if user.target is aten.sum.dim_IntList:
        axes = list(arguments(user)[1] or [])
        return "bias" if axes == ([1] if flipped else [0]) and math.prod(shape(user)) == shape(gradient)[1] else None
    if not is_gemm(user) or not is_plain(user) or len(shape(user)) != 2:
        return None
    (left, turned), (right, other) = map(through_transposes, operands(user))
    if left is not gradient or (len(user.args) == 3 and shape(arguments(user)[0]) != shape(user)):
        return None
    if not turned and other != weight[1] and _is_same(right, weight[0], facts):
        return "hidden"
    return "weight" if turned and (right, other) == hidden else None


def _is_same(one: fx.Node, other: fx.Node, facts: Facts) -> bool:
    """Whether two weights are one, or decoded from the same."""
    if one is other:
        return True
    return (
        shape(one) == shape(other)
        and facts.same_decoding(one, other)
        and facts.transposed(one) == facts.transposed(other)
    )


def _call(
    graph: fx.Graph, loss: Loss, region: Region, products: _Products
) -> tuple[fx.Node, dict[fx.Node, fx.Node], dict[Output, fx.Node]]:
    """Call the loss and its products by rows: the call, and what now stands for each product and for each output."""
    name_of = {node: name for name, node in region.buffers.items()}
    output_of = {name: output for output, name in region.outputs.items()}
    made = LossProgram(
        region.program, name_of[loss.logits], products.transposed, len(products.operands) > 2, tuple(products.gradients)
    )
    gradients = list(products.gradients.values())
    outputs = [output_of[buffer.name] for buffer in region.program.buffers if buffer.access == "out"]
    read = [region.buffers[buffer.name] for buffer in region.program.buffers if buffer.access == "in"]
    with graph.inserting_before(max([*loss.inside, *read, *products.operands]).next):
        bases = [empty_like(graph, each) for each in (*gradients, *(output.node for output in outputs))]
        reads = [contiguous(graph, each) for each in [*products.operands, *read]]
        call, stored = functionalized(graph, ops.run_loss, str(made), bases, reads, list(region.numbers.values()))
    count = len(gradients)
    return call, dict(zip(gradients, stored, strict=False)), dict(zip(outputs, stored[count:], strict=True))
