"""The compiler as a list: every pass, in order.

====================  ========  =====================================================================================
file                  tier      what it does
====================  ========  =====================================================================================
decompose.py          exact     puts the operations of an update in the place of the operators it was traced as
unpad.py              rounding  takes Inductor's padding off products that other passes look for
update.py             exact     analysis: finds every layer's update, or says why there is none
late_gradient.py      rounding  gives a write-back that reads the gradient its factors, to be multiplied tile by tile
refresh.py            rounding  moves what only a refresh needs into the refresh op
reassociate.py        rounding  contracts the gradient's factors with the projector: no full-rank gradient
gemm_dtype.py         rounding  takes products of a float32 model in bfloat16, where the option asks for it
embedding_gradient.py rounding  sums an embedding's gradient over the batch's tokens, not over the vocabulary
dead_allocations.py   exact     erases allocations that nobody reads
fuse.py               rounding  turns updates into generated kernels that work in place
row_slices.py         rounding  multiplies the rows of logits that a loss reads, and no others
chunked_loss.py       rounding  computes a loss over a vocabulary by rows of logits, down to their gradient
row_blocks.py         rounding  makes the gradient of an embedding or a head as its update reads it, block by block
fuse_products.py      rounding  decodes a quantised operand of a product where the product loads it
opaque.py             exact     makes updates and products with a quantised matrix one op each, shared by equal layers
unroll.py             exact     puts back the equal layers that tracing and the passes before were not shown
order.py              exact     places updates as early as they can run, so that factors die early
decode_first.py       rounding  on a GPU, decodes a quantised operand before its product where that is faster
triton_calls.py       exact     a GPU's generated kernels become Triton kernels that Inductor knows
outline.py            exact     makes equal layers calls of one function, which Inductor compiles once
--------------------  --------  -------------------------------------------------------------------------------------
manager.py                      runs the list, keeps a record of each pass, names the graph for Inductor's cache
context.py                      what passes share and tell, and how one node takes the place of another
nodes.py                        facts about single nodes; how a pass makes a new one
mutation.py                     one view of a call that changes tensors
kernel_calls.py                 one view of a call of a generated kernel
losses.py                       losses over a vocabulary: what is part of one, as matrices
launch.py                       puts a call of a generated kernel in the place of nodes
decoding.py                     which operands are decoded from integers, and by which nodes
sections.py                     sections of a graph that do the same
functions.py                    functions of a graph, and how Inductor lowers calls of them
repeats.py                      equal sections of a list
columns.py                      what stands at the same place of equal layers
fresh.py                        fake tensors of copied nodes
crossing.py                     what of a section others must be handed
placement.py                    where a node that replaces several may stand
regions.py                      one layer's part of the graph
until_update.py                 what of a gradient lives until an update that reads it: its factors, or itself
parting.py                      which part of an update a program computes, where it is not all of it
facts.py                        what is known of nodes beyond each by itself, found once for all passes
products.py                     a gradient read as a sum of products
printing.py                     one layer's part of a graph as text
liveness.py                     a model of what is live, in bytes
====================  ========  =====================================================================================

A pass is a function ``run(graph, record, context)`` on the post-grad graph: functional ATen, ending in one ``copy_``
for each tensor that the step changes.  Tier "exact" keeps every result bit for bit; "rounding" keeps the contract of
``docs/architecture.md``.

A pass stands behind every other one that leaves what it needs; the manager refuses a list that does not hold to it.

=================  ==================================================================================================
word               what it says of the graph
=================  ==================================================================================================
operations         operators that stand for several operations are these
plain products     the products that passes look for have no padding
updates            the context has the layers
late gradients     a write-back that will take its gradient from the factors reads a product of its own
refresh operands   what a refresh op takes of a gradient will stay
projections        R is computed as it will be, from the factors or from the gradient
product types      products have the types that they will be computed in
whole gradients    gradients of what is not projected are computed as they will be
live allocations   every allocation has a reader
update calls       updates that a generated kernel takes are calls of it
rows read          a product of many elements has the rows that are read
losses             a loss that a generated kernel takes is a call of it
gradients read     gradients at full rank exist where they are read, or as a whole
product calls      so are products with a quantised operand
functions          what is left of both is a call of a function each
layers             all layers are in the graph
order              nodes stand in the order in which they run
decodings          an operand is decoded where it will be, in its product or before
calls              kernels are called as their device calls them
=================  ==================================================================================================
"""

from __future__ import annotations

from qgalore_compile.passes.chunked_loss import chunked_loss
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.dead_allocations import dead_allocations
from qgalore_compile.passes.decode_first import decode_first
from qgalore_compile.passes.decompose import decompose
from qgalore_compile.passes.embedding_gradient import embedding_gradient
from qgalore_compile.passes.fuse import fuse
from qgalore_compile.passes.fuse_products import fuse_products
from qgalore_compile.passes.gemm_dtype import gemm_dtype
from qgalore_compile.passes.late_gradient import late_gradient
from qgalore_compile.passes.manager import Pass, PassManager
from qgalore_compile.passes.opaque import opaque
from qgalore_compile.passes.order import order
from qgalore_compile.passes.outline import outline
from qgalore_compile.passes.reassociate import reassociate
from qgalore_compile.passes.refresh import refresh
from qgalore_compile.passes.row_blocks import row_blocks
from qgalore_compile.passes.row_slices import row_slices
from qgalore_compile.passes.triton_calls import triton_calls
from qgalore_compile.passes.unpad import unpad
from qgalore_compile.passes.unroll import unroll
from qgalore_compile.passes.update import update

__all__ = ["PASSES", "Context", "Pass", "PassManager", "PassRecord"]

PASSES: tuple[Pass, ...] = (
    #    name                  tier        run                 needs → leaves
    Pass("decompose", "exact", decompose, (), ("operations",)),
    Pass("unpad", "rounding", unpad, (), ("plain products",)),
    Pass("update", "exact", update, ("operations", "plain products"), ("updates",)),
    Pass("late_gradient", "rounding", late_gradient, ("updates",), ("late gradients",)),
    Pass("refresh", "rounding", refresh, ("updates", "late gradients"), ("refresh operands",)),
    Pass("reassociate", "rounding", reassociate, ("updates", "refresh operands"), ("projections",)),
    Pass("gemm_dtype", "rounding", gemm_dtype, ("updates", "projections"), ("product types",)),
    Pass("embedding_gradient", "rounding", embedding_gradient, (), ("whole gradients",)),
    Pass("dead_allocations", "exact", dead_allocations, (), ("live allocations",)),
    Pass("fuse", "rounding", fuse, ("updates", "product types", "whole gradients"), ("update calls",)),
    Pass("row_slices", "rounding", row_slices, ("projections", "product types"), ("rows read",)),
    Pass(
        "chunked_loss",
        "rounding",
        chunked_loss,
        ("projections", "product types", "update calls", "rows read"),
        ("losses",),
    ),
    Pass("row_blocks", "rounding", row_blocks, ("update calls", "losses"), ("gradients read",)),
    Pass("fuse_products", "rounding", fuse_products, ("product types", "update calls"), ("product calls",)),
    Pass("opaque", "exact", opaque, ("update calls", "product calls"), ("functions",)),
    Pass("unroll", "exact", unroll, ("updates", "update calls", "product calls", "functions"), ("layers",)),
    Pass(
        "order",
        "exact",
        order,
        ("live allocations", "gradients read", "product calls", "functions", "layers"),
        ("order",),
    ),
    Pass("decode_first", "rounding", decode_first, ("product calls", "order"), ("decodings",)),
    Pass("triton_calls", "exact", triton_calls, ("update calls", "product calls", "decodings"), ("calls",)),
    Pass("outline", "exact", outline, ("order", "calls", "live allocations"), ()),
)
