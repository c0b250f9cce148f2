"""Facts about single nodes that several passes ask for, and how a pass makes a new one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, fx

from qgalore_compile._torch import FakeTensor, tree_leaves, triton_kernel_wrapper_functional
from qgalore_compile.kernels import ops
from qgalore_compile.kernels.read.fx_values import arguments as arguments
from qgalore_compile.kernels.read.fx_values import aten as aten
from qgalore_compile.kernels.read.fx_values import dtype as dtype
from qgalore_compile.kernels.read.fx_values import is_tensor as is_tensor
from qgalore_compile.kernels.read.fx_values import prims as prims
from qgalore_compile.kernels.read.fx_values import shape as shape
from qgalore_compile.kernels.read.fx_values import value as value
from qgalore_compile.passes.mutation import FUNCTIONALIZED as FUNCTIONALIZED
from qgalore_compile.passes.mutation import Mutation as Mutation
from qgalore_compile.passes.mutation import arguments_changed as arguments_changed

GEMMS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
"""What a matrix product is after Inductor's own passes: ``add(mm, x)`` has become ``addmm`` by then."""

ANCHOR = aten.copy_.default
"""``copy_(placeholder, value)``: what a functional graph ends in for every tensor that the step changes."""

TRANSPOSES = frozenset({aten.t.default, aten.permute.default, aten.transpose.int})

REDUCTIONS = frozenset(
    {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.linalg_vector_norm.default}
)
"""Operators that reduce along dimensions."""

VIEWS = TRANSPOSES | {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.alias.default,
    aten.detach.default,
}
"""Operators whose result shares its input's memory; ``reshape`` may copy, where the input is not contiguous."""

PARTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default})
"""Operators whose results do, several."""

TRITON = triton_kernel_wrapper_functional
"""A call of a Triton kernel in the same form: a dictionary of new versions by the names of ``tensors_to_clone``."""

INVOKE = torch.ops.higher_order.invoke_subgraph
"""A call of a function of the graph's module: ``(body, name, *inputs)``."""


def same_sizes(node: fx.Node, sizes: Sequence[Any]) -> bool:
    """Whether a tensor has these dimensions, in whatever order; sizes may be symbolic."""
    return sorted(map(str, shape(node))) == sorted(map(str, sizes))


def is_scalar(node: fx.Node) -> bool:
    """Whether a node's tensor is 0-d: a setting or a statistic that layers share (lr, step, clip, ok)."""
    return is_tensor(node) and value(node).dim() == 0


def is_gemm(node: fx.Node) -> bool:
    """Whether a node is a matrix product of PyTorch's."""
    return node.op == "call_function" and node.target in GEMMS


def is_plain(gemm: fx.Node) -> bool:
    """Whether a product, and what is added to it, is not scaled."""
    return all(gemm.kwargs.get(key, 1) == 1 for key in ("alpha", "beta"))


def is_product(node: fx.Node) -> bool:
    """Whether a node is a matrix product, of PyTorch's or of a generated kernel."""
    return is_gemm(node) or node.target is ops.gemm


def operands(gemm: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two matrices of a product; of ``addmm`` and ``baddbmm`` without what is added."""
    first = 1 if gemm.target in (aten.addmm.default, aten.baddbmm.default) else 0
    left, right = arguments(gemm)[first : first + 2]
    return left, right


def behind(ends: Iterable[fx.Node], into: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nodes that `ends` follow from, themselves included, as far back as `into` says; in no particular order."""
    seen = dict.fromkeys(ends)
    pending = list(seen)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen and into(source):
                seen[source] = None
                pending.append(source)
    return list(seen)


def is_anchor(node: fx.Node) -> bool:
    """Whether a node writes a value into an input's storage."""
    return node.target is ANCHOR and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"


def written(anchor: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(the input that an anchor writes, the value that it writes there)."""
    target, stored = arguments(anchor)[:2]
    return target, stored


def anchors(graph: fx.Graph) -> list[fx.Node]:
    """Every anchor of the graph."""
    return [node for node in graph.find_nodes(op="call_function", target=ANCHOR) if is_anchor(node)]


def previous_version(node: fx.Node) -> fx.Node | None:
    """What a result of a mutating op was before it: the tensor whose storage the op changes; None for other nodes."""
    if node.target is not operator.getitem:
        return None
    call, index = arguments(node)
    if not isinstance(call, fx.Node) or call.target not in (FUNCTIONALIZED, TRITON):
        return None
    if call.target is TRITON:
        tensors: Any = call.kwargs["kwargs"]
        held: fx.Node = tensors[index]
        return held
    return Mutation(call).before(node)


def first_version(node: fx.Node) -> fx.Node:
    """The tensor whose storage a chain of mutating ops has changed; the node itself where none has."""
    while (base := previous_version(node)) is not None:
        node = base
    return node


def latest_version(node: fx.Node) -> fx.Node:
    """What a node's storage holds behind the last op that changes it in place; the node itself where none does."""
    for call in node.users:
        if call.target in (FUNCTIONALIZED, TRITON):
            for result in call.users:
                if previous_version(result) is node:
                    return latest_version(result)
    return node


def make(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A new call at the graph's insertion point, with its fake value, as tracing would have left it."""
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), value)
    # what takes no tensor, an allocation, is of the graph's mode
    for fake in islice(_fakes(chain([(fake_args, fake_kwargs)], map(value, graph.nodes))), 1):
        with fake.fake_mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def _fakes(trees: Iterable[Any]) -> Iterator[Any]:
    for tree in trees:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, FakeTensor):
                yield leaf


def permutation(node: fx.Node) -> list[int]:
    """The order of dimensions that ``permute``, ``t`` or ``transpose`` puts its input's dimensions in."""
    rank = len(shape(node))
    if node.target is aten.t.default:
        return list(reversed(range(rank)))
    if node.target is aten.transpose.int:
        order = list(range(rank))
        first, second = (int(dim) % rank for dim in arguments(node)[1:3])
        order[first], order[second] = order[second], order[first]
        return order
    return [int(dim) % rank for dim in arguments(node)[1]]


def looks(found: Any) -> str:
    """Type, shape, strides and device of a fake tensor, or of several."""
    if isinstance(found, (tuple, list)):
        return str([looks(each) for each in found])
    if isinstance(found, dict):
        return str([looks(each) for each in found.values()])
    if isinstance(found, Tensor):
        return f"{found.dtype} {tuple(found.shape)} {found.stride()} {found.device}"
    return type(found).__name__


def hint(size: Any) -> int:
    """A size; the one that tracing saw where it is symbolic, 1 where tracing saw none."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def transpose(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The transpose of a matrix, without a second permute where it is one already."""
    if node.target is aten.permute.default and permutation(node) == [1, 0]:
        source: fx.Node = arguments(node)[0]
        return source
    return make(graph, aten.permute.default, node, [1, 0])


def cast(graph: fx.Graph, node: fx.Node, to: torch.dtype) -> fx.Node:
    """A node's tensor in another dtype; the node itself where it has it."""
    return node if dtype(node) == to else make(graph, prims.convert_element_type.default, node, to)


def erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node without users, and what only it read, up to the graph's inputs."""
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead.users or dead.op not in ("call_function", "get_attr") or dead.is_impure() or dead._erased:
            continue
        inputs = list(dead.all_input_nodes)
        graph.erase_node(dead)
        pending.extend(inputs)
