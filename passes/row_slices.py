"""Multiply the rows of logits that a loss reads, and no others.

    Before    %z = reshape(mm(X, Wᵀ), [B, S, V]);  %read = slice(%z, 1, 0, -1)         all but the last of S
              %dz = reshape(slice_scatter(zeros(B, S, V), %dread, 1, 0, -1), [B S, V])
              %dX = mm(%dz, W);  %dW = mm(%dzᵀ, X)
    After     %x = slice(reshape(X, [B, S, d]), 1, 0, -1);  %read = mm(%x, Wᵀ)
              %dX = slice_scatter(zeros(B, S, d), mm(%dread, W), 1, 0, -1);  %dW = mm(%dreadᵀ, %x)

Requires  a product of many elements that is read through one slice of its rows; of a gradient that is zero elsewhere,
          no readers but products and its sum over the rows.
Tier      rounding: a library may multiply fewer rows in another order.  A NaN in a row that nobody reads stays there;
          its product with a gradient of zero was a NaN.

Logits and labels that are shifted by one within the model's loss are a copy of the logits, and of their gradient, that
this leaves out; :mod:`qgalore_compile.passes.chunked_loss` then finds a loss of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from qgalore_compile.kernels.loss import SMALL
from qgalore_compile.kernels.read.spelling import VIEWS
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.launch import contiguous
from qgalore_compile.passes.nodes import TRANSPOSES, arguments, aten, dtype, erase_dead, is_gemm, make, shape, value


class Rows(NamedTuple):
    """Rows of a matrix: of its reshaped form (\\*leading, columns) those of a slice."""

    leading: tuple[int, ...]
    dim: int
    start: int
    end: int

    def of(self, graph: fx.Graph, matrix: fx.Node, cut: Cut) -> fx.Node:
        """Those rows of a matrix, as a matrix; where they have been cut out before, those."""
        if (self, matrix) in cut:
            return cut[self, matrix]
        columns = shape(matrix)[1]
        whole = make(graph, aten.reshape.default, matrix, [*self.leading, columns])
        taken = make(graph, aten.slice.Tensor, whole, self.dim, self.start, self.end)
        cut[self, matrix] = make(graph, aten.reshape.default, contiguous(graph, taken), [-1, columns])
        return cut[self, matrix]

    def within(self, graph: fx.Graph, matrix: fx.Node) -> fx.Node:
        """A matrix in the place of those rows of one of zeros."""
        columns = shape(matrix)[1]
        sizes = list(self.leading)
        sizes[self.dim] = len(range(*slice(self.start, self.end).indices(sizes[self.dim])))
        zeros = make(graph, aten.full.default, [*self.leading, columns], 0, dtype=dtype(matrix),
                     device=value(matrix).device)  # fmt: skip
        put = make(graph, aten.reshape.default, matrix, [*sizes, columns])
        whole = make(graph, aten.slice_scatter.default, zeros, put, self.dim, self.start, self.end)
        return make(graph, aten.reshape.default, whole, [math.prod(self.leading), columns])


Cut = dict[tuple[Rows, fx.Node], fx.Node]
"""Rows of matrices that have been cut out."""


def row_slices(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Rewrite every such product, and every such gradient."""
    rewrites = {aten.slice.Tensor: _forward, aten.slice_scatter.default: _backward}
    cut: Cut = {}
    for node in list(graph.nodes):
        rewrite = None if node._erased else rewrites.get(node.target)
        if rewrite and all(isinstance(size, int) for size in shape(node)) and rewrite(graph, context, node, cut):
            record.match(node)


def _rows(node: fx.Node, sizes: tuple[int, ...]) -> Rows | None:
    """The rows that a slice, or what is put in its place, is of a tensor; None where it is not of rows."""
    given = arguments(node)[1 if node.target is aten.slice.Tensor else 2 :]
    dim, first, last, step = given + (0, None, None, 1)[len(given) :]
    dim %= len(sizes)
    if step != 1 or dim == len(sizes) - 1 or len(sizes) < 2:
        return None
    begin, end, _ = slice(first, last).indices(sizes[dim])
    return Rows(sizes[:-1], dim, begin, end) if begin < end else None


def _forward(graph: fx.Graph, context: Context, taken: fx.Node, cut: Cut) -> bool:
    """Multiply the rows that are read alone."""
    source = arguments(taken)[0]
    rows = _rows(taken, shape(source))
    product = source
    while product.target in VIEWS and len(product.users) == 1:
        product = product.all_input_nodes[0]
    if rows is None or not _is_large(product) or not is_gemm(product) or len(product.users) != 1:
        return False
    if shape(product) != (math.prod(rows.leading), shape(source)[-1]):
        return False
    *bias, left, right = arguments(product)
    if bias and shape(bias[0]) != shape(product)[1:]:
        return False
    with graph.inserting_before(taken):
        gemm = aten.addmm.default if bias else aten.mm.default
        fewer = make(graph, gemm, *bias, rows.of(graph, left, cut), right, **product.kwargs)
        shaped = make(graph, aten.reshape.default, fewer, list(shape(taken)))
    context.replace(graph, taken, shaped)
    erase_dead(graph, taken)
    return True


def _backward(graph: fx.Graph, context: Context, put: fx.Node, cut: Cut) -> bool:
    """Multiply with the rows alone that are not zero."""
    zeros, given = arguments(put)[:2]
    rows = _rows(put, shape(put))
    if rows is None or zeros.target is not aten.full.default or arguments(zeros)[1] != 0 or not _is_large(put):
        return False
    columns = shape(put)[-1]
    readers = sorted(_readers(put, (math.prod(rows.leading), columns)), key=lambda each: each[0])
    if not readers or not all(_may_read(*reader) for reader in readers):
        return False
    with graph.inserting_before(put):
        fewer = make(graph, aten.reshape.default, given, [-1, columns])
    for user, _, flipped in readers:
        with graph.inserting_before(user):
            if user.target is aten.sum.dim_IntList:
                new = make(graph, aten.sum.dim_IntList, fewer, *arguments(user)[1:], **user.kwargs)
            elif flipped:
                *added, _, right = arguments(user)
                turned = make(graph, aten.permute.default, fewer, [1, 0])
                gemm = aten.addmm.default if added else aten.mm.default
                new = make(graph, gemm, *added, turned, rows.of(graph, right, cut), **user.kwargs)
            else:
                new = rows.within(graph, make(graph, aten.mm.default, fewer, arguments(user)[1]))
        context.replace(graph, user, new)
        erase_dead(graph, user)
    return True


def _is_large(node: fx.Node) -> bool:
    count: int = math.prod(shape(node))
    return count >= SMALL


def _readers(
    node: fx.Node, matrix: tuple[int, int], flipped: bool = False
) -> Iterator[tuple[fx.Node, fx.Node, bool | None]]:
    """What reads a tensor as a matrix: each node, what it reads, and whether that is the transpose; None where it is
    something else."""
    for user in node.users:
        if user.target in VIEWS and not flipped:
            yield from _readers(user, matrix)
        elif user.target in TRANSPOSES and not flipped and shape(node) == matrix:
            yield from _readers(user, matrix, True)
        else:
            yield user, node, flipped if shape(node) == (matrix[::-1] if flipped else matrix) else None


def _may_read(user: fx.Node, source: fx.Node, flipped: bool | None) -> bool:
    """Whether a reader is a product whose left operand that is, or the sum over the rows."""
    if user.target is aten.sum.dim_IntList:
        return flipped is False and list(arguments(user)[1] or []) == [0]
    if flipped is None or not is_gemm(user) or len(shape(user)) != 2:
        return False
    *added, left, right = arguments(user)
    return left is source and right is not source and (flipped or not added)
