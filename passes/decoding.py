"""Which operands of a product are decoded from integers that the graph was given, and by which nodes."""

from __future__ import annotations

from torch import fx

from qgalore_compile._torch import OpOverload
from qgalore_compile.passes.facts import Facts
from qgalore_compile.passes.nodes import aten, behind, dtype, is_tensor, operands


def quantised_operands(facts: Facts, gemm: fx.Node) -> list[fx.Node]:
    """The operands of a product that are floating point, decoded from inputs of the graph that are not."""
    found = []
    for operand in operands(gemm):
        storage = facts.storage(operand)
        if not storage or not dtype(operand).is_floating_point or _looks_up(operand):
            continue
        if any(not dtype(node).is_floating_point for node in storage if is_tensor(node)):
            found.append(operand)
    return found


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
