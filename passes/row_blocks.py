"""Make the gradient of an embedding or a head row block by row block, where its update reads it.

    Before    %g = mm(dLogitsᵀ, X)                                     V × d, of a head
              %n = sum(pow(%g, 2))
              run_program("…", [%weight!, %codes!, …], [%g, …])        its update, at full rank
    After     %n = squares("term product …", [dLogits, X], V, d)
              run_rows("rows …", [%weight!, %codes!, …], [dLogits, X, …])

    Before    %g = _unsafe_masked_index_put_accumulate(full((V, d), 0), %mask, [%tokens], %dx)     of an embedding

Requires  an update at full rank that is one generated kernel (:mod:`qgalore_compile.passes.fuse`); a gradient that is a
          sum of products and of rows put in their places, which nobody reads but that kernel and its norm; operands no
          larger than the gradient; a lowering that runs such programs.
Tier      rounding: the norm of a product is summed in another order.

Of `7b` a gradient of either is 0.52 GB in float32, more than all activations of 256 tokens under checkpointing.  A
block of 2 MiB is made by the library's product, or from the rows that the batch names, and read while it is in cache.
"""

from __future__ import annotations

import torch
from torch import fx

from qgalore_compile.kernels import ops
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.ir.rows import RowsProgram, Term
from qgalore_compile.kernels.lowering import runs
from qgalore_compile.kernels.rows import squares, sum_rows
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.kernel_calls import KernelCall, kernel_calls
from qgalore_compile.passes.launch import contiguous, erase, functionalized, through_transposes
from qgalore_compile.passes.nodes import arguments, aten, dtype, erase_dead, hint, is_plain, make, prims, shape

Found = list[tuple[Term, list[fx.Node]]]
"""The terms of a gradient, each with its operands."""


def row_blocks(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace every such update."""
    for call in kernel_calls(graph):
        name = context.at_full_rank.get(call.node)
        if name is None or call.mutation is None or not runs("row_blocks", call.device):
            continue
        program = BlockProgram.parse(call.text)
        names = [buffer.name for buffer in program.buffers if buffer.access == "in"]
        for buffer, gradient in zip(names, call.reads, strict=True):
            if len(shape(gradient)) != 2 or gradient.op != "call_function":
                continue
            terms = _terms(gradient, dtype(gradient))
            if terms is None:
                continue
            norms = _norms(gradient, call.node)
            problem = _problem(program, gradient, terms, norms)
            if problem is not None:
                record.skip(gradient, f"{name}: {problem}")
                break
            record.match(gradient)
            _replace(graph, context, call, program, buffer, gradient, terms, norms or [])
            context.note(name).update_function = "generated, 1 kernel; its gradient made by blocks of rows"
            break


def _terms(node: fx.Node, kind: torch.dtype) -> Found | None:
    """What a gradient of a type is the sum of; None where that is something else."""
    if node.op != "call_function" or dtype(node) != kind:
        return None
    if node.target is aten.mm.default:
        return _product(kind, *arguments(node))
    if node.target is aten.addmm.default and is_plain(node):
        added, left, right = arguments(node)
        first, second = _terms(added, kind) if shape(added) == shape(node) else None, _product(kind, left, right)
        return None if first is None or second is None else first + second
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        sides = [_terms(each, kind) if isinstance(each, fx.Node) else None for each in arguments(node)]
        return None if sides[0] is None or sides[1] is None else sides[0] + sides[1]
    if node.target is aten._unsafe_masked_index_put_accumulate.default:
        start, mask, indices, values = arguments(node)
        zeros = start.target is aten.full.default and arguments(start)[1] == 0
        return _indexed(values, mask, indices) if zeros and dtype(values) == kind else None
    if node.target is sum_rows:
        values, mask, indices, *_ = arguments(node)
        return _indexed(values, mask, indices)
    return None


def _product(kind: torch.dtype, left: fx.Node, right: fx.Node) -> Found | None:
    if dtype(left) != kind or dtype(right) != kind:
        return None
    (first, flipped), (second, turned) = through_transposes(left), through_transposes(right)
    return [(Term("product", (flipped, turned)), [first, second])]


def _indexed(values: fx.Node, mask: fx.Node, indices: list[fx.Node | None]) -> Found | None:
    if len(indices) != 1 or indices[0] is None:
        return None
    return [(Term("indexed"), [values, mask, indices[0]])]


def _norms(gradient: fx.Node, call: fx.Node) -> list[fx.Node] | None:
    """What a gradient's readers, but the call, sum the squares of it to; None where one does something else."""
    found: list[fx.Node] = []
    for reader in gradient.users:
        if reader is call:
            continue
        squared = [reader]
        if reader.target is prims.convert_element_type.default and dtype(reader) == torch.float32:
            squared = list(reader.users)
        for each in squared:
            if each.target is not aten.pow.Tensor_Scalar or arguments(each)[1] != 2:
                return None
            sums = list(each.users)
            if any(
                total.target not in (aten.sum.dim_IntList, aten.sum.default)
                or shape(total) or dtype(total) != torch.float32
                for total in sums
            ):  # fmt: skip
                return None
            found += sums
    return found


def _problem(program: BlockProgram, gradient: fx.Node, terms: Found, norms: list[fx.Node] | None) -> str | None:
    """Why the gradient stays whole."""
    rows, columns = shape(gradient)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return "its gradient's size varies"
    if norms is None:
        readers = ", ".join(sorted(str(each) for each in gradient.users))
        return f"its gradient is read by more than its update and its norm: {readers}"
    if program.space[:2] not in ((rows, columns), (1, rows * columns)):
        return f"its update does not go by the gradient's rows, but over {program.space}"
    operands = {each: None for _, tensors in terms for each in tensors}
    size = sum(_bytes(each) for each in operands)
    if size > _bytes(gradient):
        return f"what its gradient is made of ({size:,} bytes) is larger than it ({_bytes(gradient):,})"
    return None


def _bytes(node: fx.Node) -> int:
    count = dtype(node).itemsize
    for size in shape(node):
        count *= hint(size)
    return count


def _replace(
    graph: fx.Graph, context: Context, call: KernelCall, program: BlockProgram, buffer: str, gradient: fx.Node,
    terms: Found, norms: list[fx.Node],
) -> None:  # fmt: skip
    """Call the program with the gradient's terms in its place."""
    assert call.mutation is not None
    rows, columns = shape(gradient)
    made = RowsProgram(program, buffer, rows, columns, tuple(term for term, _ in terms))
    for norm in norms:
        with graph.inserting_before(norm):
            lines, given = "\n".join(str(term) for term, _ in terms), [each for _, tensors in terms for each in tensors]
            total = make(graph, squares, lines, given, rows, columns, dtype(gradient))
        context.replace(graph, norm, total)
        erase_dead(graph, norm)
    with graph.inserting_before(call.node):
        operands = [contiguous(graph, each) for _, tensors in terms for each in tensors]
        reads = operands + [each for each in call.reads if each is not gradient]
        _, results = functionalized(
            graph, ops.run_rows, str(made), call.mutation.written, reads, call.mutation["numbers"]
        )
    for index, old in call.mutation.results():
        context.replace(graph, old, results[index])
    erase(graph, [call.node, *(old for _, old in call.mutation.results())])
    erase_dead(graph, gradient)
