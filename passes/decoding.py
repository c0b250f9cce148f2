"""Which operands of a product are decoded from integers that the graph was given, and by which nodes."""

from __future__ import annotations

import torch
from torch import fx

from qgalore_compile._torch import OpOverload
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.nodes import aten, behind, dtype, hint, is_tensor, operands, value


def quantised_operands(facts: Facts, gemm: fx.Node) -> list[fx.Node]:
    """The operands of a product that are floating point, decoded from inputs of the graph that are not.

    Codes are the largest of what an operand is decoded from.  Of a loss's gradient by the logits, which follows from
    inputs alone where the backward is a graph of its own, the largest are the logits, and the integers are targets.
    """
    found = []
    for operand in operands(gemm):
        storage = facts.storage(operand)
        if not storage or not dtype(operand).is_floating_point or _looks_up(operand):
            continue
        if _is_codes(max(filter(is_tensor, storage), key=_elements, default=None)):
            found.append(operand)
    return found


def _elements(node: fx.Node) -> tuple[int, bool]:
    return hint(value(node).numel()), dtype(node).is_floating_point  # which wins where they are as many


def _is_codes(node: fx.Node | None) -> bool:
    return node is not None and dtype(node) != torch.bool and not dtype(node).is_floating_point


def decoding_of(node: fx.Node) -> list[fx.Node]:
    """What stands between inputs of the graph and a node that follows from nothing else, itself included, in order."""
    return sorted(behind(filter(_is_call, [node]), _is_call))


def _looks_up(operand: fx.Node) -> bool:
    """Whether the integers are indices (an embedding's tokens) rather than codes."""
    lookups = (aten.embedding.default, aten.index.Tensor)
    return any(node.target in lookups for node in decoding_of(operand))


def _is_call(node: fx.Node) -> bool:
    """Whether a tensor is computed, rather than an input or what an op left in one."""
    return node.op == "call_function" and is_tensor(node) and isinstance(node.target, OpOverload)
