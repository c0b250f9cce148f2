"""Kernels: region → program → source.  Knows FX graphs, Triton and C++, and nothing of optimizers or models.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
program.py            ``BlockProgram``: what a region does to the groups of a matrix's rows; text in and out
evaluate.py           runs a program with PyTorch operations: the oracle of every printer
from_graph.py         a region of an FX graph becomes a program, or there is a typed reason
region.py             what it becomes: the program and its arguments; spaces to try; the reasons
spelling.py           how PyTorch's operators are spelled in a program
patterns.py           formats that take several nodes: nibbles, rows filled up to whole groups
dynamic8.py           the dynamic 8-bit map as two operations, and as what they mean in other ones
cpp_printer.py        program → C++; ``philox.inc`` holds the random bits, ``dynamic8.inc`` the dynamic 8-bit map
cpu.py                compiles, caches and launches what was printed
gemm.py               ``GemmProgram``: a product with prologues and an epilogue
gemm_cpu.py           runs one in blocks around the library's GEMM
triton_printer.py     program → Triton, on one tile at a time
gemm_triton.py        a product as one Triton kernel
tiling.py             which tiles, by a model of the chip; bytes by a model of its cache
triton_kernels.py     what a GPU runs for a program's text: prints, loads and launches it
ops.py                the operators that a fused graph calls, with a program's text as an argument
targets.py            GPUs by name, with what bounds a kernel on each; occupancy
ahead.py              compiles a Triton kernel for a GPU that need not be there; what its machine code contains
rows.py               the operator that sums an embedding's gradient
fx_values.py          what tracing left at a node
====================  =================================================================================================
"""
