"""Programs and products on GPUs.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
printer.py            program → Triton, on one tile at a time
spelling.py           how types and operations are spelled
gemm.py               a product as one Triton kernel
kernels.py            what a GPU runs for a program's text: prints, loads and launches it
tiling.py             which tiles, by a model of the chip; bytes by a model of its cache
decode_first.py       whether an operand is decoded in a product's tiles, or once beforehand
targets.py            GPUs by name, with what bounds a kernel on each; occupancy
ahead.py              compiles a kernel for a GPU that need not be there; what its machine code contains
looked_at.py          of several tiles the first whose machine code spills no register
====================  =================================================================================================
"""
