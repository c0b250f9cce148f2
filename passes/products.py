"""A gradient as a sum of products: G = Σ cᵢ · Aᵢ Bᵢ, read off the graph.

What stands between the matrix products and G is linear: transposes, views that move no element, casts, factors that are
numbers or 0-d tensors, ``add``, ``sub`` and Inductor's ``addmm``.  It is looked through, so that a pass can contract
each product with the projector instead.  Three-dimensional activations arrive as a batched product, summed over the
batch or with a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qgalore_compile.passes.nodes import (
    arguments,
    aten,
    dtype,
    is_gemm,
    is_scalar,
    is_tensor,
    make,
    operands,
    permutation,
    prims,
    shape,
    transpose,
)


@dataclass(frozen=True)
class Inverse:
    """One over a 0-d tensor."""

    node: fx.Node


Scales = tuple[float | fx.Node | Inverse, ...]
"""Factors of a term: numbers, nodes of 0-d tensors, and one over such."""


@dataclass(frozen=True)
class Term:
    """One product cᵢ · A B, or its transpose.

    Attributes:
        left, right: A (m, k) and B (k, n) of the matrix product as it stands in the graph; both with a leading batch
            dimension, over which the product is summed, where ``batched``.
        transposed: G holds (A B)ᵀ.
        scales: factors cᵢ.
        gemm: the node of the product.
    """

    left: fx.Node
    right: fx.Node
    transposed: bool
    batched: bool
    scales: Scales
    gemm: fx.Node

    def matrices(self, graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
        """Nodes of L (m, k) and R (k, n) with L R = the term without its factors, made where they do not exist."""
        left, right = self.left, self.right
        if self.batched:
            m, n = shape(left)[1], shape(right)[2]
            left = make(graph, aten.permute.default, left, [1, 0, 2])
            left = make(graph, aten.reshape.default, left, [m, -1])  # -1: the token count may be symbolic
            right = make(graph, aten.reshape.default, right, [-1, n])
        if self.transposed:
            left, right = transpose(graph, right), transpose(graph, left)
        return left, right

    @property
    def contracted(self) -> object:
        """The length that the product sums over: an int, or a SymInt for a symbolic token count."""
        size = shape(self.left)
        return size[0] * size[2] if self.batched else size[1]


@dataclass
class Sum:
    """A parsed gradient.

    Attributes:
        terms: the products, in the order of the graph where they are added.
        nodes: every node from G down to the products, which exist for nothing else if nobody else reads them.
        obstacle: the node that is no product and no linear operation on one; None where the whole of G is parsed.
    """

    terms: list[Term] = field(default_factory=list)
    nodes: dict[fx.Node, None] = field(default_factory=dict)
    obstacle: fx.Node | None = None

    @property
    def gemms(self) -> set[fx.Node]:
        """The nodes of the products."""
        return {term.gemm for term in self.terms}


def parse(gradient: fx.Node) -> Sum:
    """Read a gradient (m, n) as a sum of products; ``obstacle`` says what is none."""
    result = Sum()
    if len(shape(gradient)) != 2 or not _is_matrix(gradient):
        result.obstacle = gradient
    else:
        _parse(gradient, False, (), result)
    return result


def _parse(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    if into.obstacle is not None:
        return
    if not is_tensor(node) or node.op != "call_function" or not dtype(node).is_floating_point:
        into.obstacle = node
        return
    if node in into.nodes:
        into.obstacle = node  # a node met twice: G = A + A, which is no sum of different products
        return
    into.nodes[node] = None
    if is_gemm(node):
        _parse_gemm(node, transposed, scales, into)
        return
    handler = _LINEAR.get(node.target)
    if handler is None:
        into.obstacle = node
    else:
        handler(node, transposed, scales, into)


def _parse_gemm(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    added = node.target in (aten.addmm.default, aten.baddbmm.default)
    batched = node.target in (aten.bmm.default, aten.baddbmm.default)
    if batched and (added or shape(node)[0] != 1):
        into.obstacle = node  # a batch is summed by the node above it, or is one
        return
    if added:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        base = arguments(node)[0]
        if shape(base) != shape(node):  # a bias, broadcast
            into.obstacle = base
            return
        _parse(base, transposed, times(scales, beta), into)
        scales = times(scales, alpha)
    into.terms.append(Term(*operands(node), transposed, batched, scales, node))


def _parse_sum_over_batch(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    product, dims = arguments(node)[:2]
    keepdim = len(node.args) > 2 and node.args[2]
    if (
        not isinstance(product, fx.Node)
        or product.target is not aten.bmm.default
        or list(dims) not in ([0], [-3])
        or keepdim
        or node.kwargs
    ):
        into.obstacle = node
        return
    into.nodes[product] = None
    into.terms.append(Term(*operands(product), transposed, True, scales, product))


def times(scales: Scales, factor: Any) -> Scales:
    """Factors with one more, unless that is 1."""
    return scales if factor == 1 else (*scales, factor)


def _same_elements(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    source = node.args[0]
    if not is_tensor(source) or not _is_matrix(source) or _sizes(source) != _sizes(node):
        into.obstacle = node
    else:
        _parse(source, transposed, scales, into)


def _permuted(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    source = node.args[0]
    if not is_tensor(source) or not _is_matrix(source):
        into.obstacle = node
        return
    order = permutation(node)
    kept = [dim for dim in order if shape(source)[dim] != 1]
    _parse(source, transposed != (kept != sorted(kept)), scales, into)


def _cast(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    _parse(arguments(node)[0], transposed, scales, into)


def _copied(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    """``copy(destination, source)``: the source in the destination's dtype; the destination's values are gone."""
    source = node.args[1]
    if not is_tensor(source) or shape(source) != shape(node):
        into.obstacle = node
    else:
        _parse(source, transposed, scales, into)


def _scaled(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    first, second = arguments(node)[:2]
    divides = node.target is aten.div.Tensor
    if divides and (node.kwargs or second == 0):
        into.obstacle = node
    elif _is_factor(second):
        factor = _inverse(second) if divides else second
        _parse(first, transposed, times(scales, factor), into)
    elif _is_factor(first) and not divides:
        _parse(second, transposed, times(scales, first), into)
    else:
        into.obstacle = node


def _is_factor(argument: object) -> bool:
    return isinstance(argument, (int, float)) or (isinstance(argument, fx.Node) and is_scalar(argument))


def _inverse(divisor: float | fx.Node) -> float | Inverse:
    return Inverse(divisor) if isinstance(divisor, fx.Node) else 1.0 / divisor


def _negated(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    _parse(arguments(node)[0], transposed, times(scales, -1.0), into)


def _added(node: fx.Node, transposed: bool, scales: Scales, into: Sum) -> None:
    first, second = arguments(node)[:2]
    alpha: Any = node.kwargs.get("alpha", 1)
    if node.target is aten.sub.Tensor:
        alpha = -alpha
    for operand in (first, second):
        if not is_tensor(operand) or shape(operand) != shape(node):
            into.obstacle = node
            return
    _parse(first, transposed, scales, into)
    _parse(second, transposed, times(scales, alpha), into)


def _sizes(node: fx.Node) -> list[object]:
    """A shape without its ones: what a view that moves no element keeps."""
    return [size for size in shape(node) if size != 1]


def _is_matrix(node: fx.Node) -> bool:
    """Whether a tensor has two dimensions beside ones."""
    return len(_sizes(node)) == 2


_Handler = Callable[[fx.Node, bool, Scales, Sum], None]

_LINEAR: dict[object, _Handler] = {
    aten.permute.default: _permuted,
    aten.t.default: _permuted,
    aten.transpose.int: _permuted,
    aten.view.default: _same_elements,
    aten.reshape.default: _same_elements,
    aten._unsafe_view.default: _same_elements,
    aten.squeeze.default: _same_elements,
    aten.squeeze.dim: _same_elements,
    aten.squeeze.dims: _same_elements,
    aten.unsqueeze.default: _same_elements,
    aten.clone.default: _same_elements,
    aten.alias.default: _same_elements,
    aten.detach.default: _same_elements,
    prims.convert_element_type.default: _cast,
    aten._to_copy.default: _cast,
    aten.copy.default: _copied,
    aten.mul.Tensor: _scaled,
    aten.mul.Scalar: _scaled,
    aten.div.Tensor: _scaled,
    aten.neg.default: _negated,
    aten.add.Tensor: _added,
    aten.sub.Tensor: _added,
    aten.sum.dim_IntList: _parse_sum_over_batch,
}

LINEAR = frozenset(_LINEAR)
"""The operators that :func:`parse` looks through."""


def scaled(graph: fx.Graph, node: fx.Node, scales: Scales) -> fx.Node:
    """A node times a term's factors."""
    for factor in scales:
        if isinstance(factor, Inverse):
            node = make(graph, aten.div.Tensor, node, factor.node)
        else:
            node = make(graph, aten.mul.Tensor, node, factor)
    return node


def scale_of(graph: fx.Graph, scales: Scales, device: torch.device) -> fx.Node | None:
    """A term's factors as one 0-d float32 tensor; None where there is none."""
    if not scales:
        return None
    one = make(graph, aten.full.default, [], 1.0, dtype=torch.float32, device=device)
    return scaled(graph, one, scales)
