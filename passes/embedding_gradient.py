"""Sum an embedding's gradient in float32 for the tokens of the batch alone, not for the whole vocabulary.

    Before    %z = full((V, d), 0, float32)
              %s = _unsafe_masked_index_put_accumulate(%z, %mask, [%tokens], cast(%dy, float32))     float32
              %g = cast(%s, bfloat16)
    After     %g = sum_rows(%dy, %mask, [%tokens], V, bfloat16)

Requires  a sum that starts from zeros and whose only reader rounds it to a shorter float; a CPU, since the op waits to
          know how many tokens differ.
Tier      rounding: float32 sums in the order of the tokens, where Inductor adds in any order; rounded once in both.

Inductor decomposes an embedding's backward so, and 4 V d bytes then exist beside the 2 V d of the gradient.  PyTorch's
own CPU kernel sums in bfloat16, and rounds after each token.
"""

from __future__ import annotations

import torch
from torch import fx

from qgalore_compile.kernels.lowering import runs
from qgalore_compile.kernels.rows import sum_rows
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.nodes import arguments, aten, dtype, erase_dead, make, prims, shape, value


def embedding_gradient(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace every such sum."""
    put = aten._unsafe_masked_index_put_accumulate.default
    for node in graph.find_nodes(op="call_function", target=put):
        start, mask, indices, values = arguments(node)
        readers = list(node.users)
        if not runs("embedding_gradient", value(node).device) or not _is_zeros(start) or len(indices) != 1:
            continue
        if len(readers) != 1 or readers[0].target is not prims.convert_element_type.default:
            continue  # of a float32 model it is the gradient itself
        (rounded,) = readers
        if dtype(rounded) not in (torch.bfloat16, torch.float16):
            continue
        if values.target is prims.convert_element_type.default and dtype(arguments(values)[0]) == dtype(rounded):
            values = arguments(values)[0]
        record.match(node)
        with graph.inserting_before(rounded):
            result = make(graph, sum_rows, values, mask, indices, shape(node)[0], dtype(rounded))
        if "stack_trace" in node.meta:
            result.meta["stack_trace"] = node.meta["stack_trace"]
        context.replace(graph, rounded, result)
        erase_dead(graph, rounded)


def _is_zeros(node: fx.Node) -> bool:
    """Whether a node is a float32 tensor of zeros, of known size."""
    if node.target is not aten.full.default or dtype(node) != torch.float32:
        return False
    return arguments(node)[1] == 0 and all(isinstance(size, int) for size in shape(node))
