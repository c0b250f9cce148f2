"""Programs and products on CPUs.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
printer.py            program → C++; ``philox.inc`` holds the random bits, ``dynamic8.inc`` the dynamic 8-bit map,
                      ``rotate.inc`` rotations, ``exp.inc`` e to a power
spelling.py           how types and operations are spelled
launch.py             compiles, caches and launches what was printed
units.py              Inductor's own kernels, several to one run of the compiler
gemm.py               runs a product in blocks around the library's GEMM
loss.py               runs a loss with some rows of its logits at a time
rows.py               runs a program whose gradient is made by blocks of rows
====================  =================================================================================================
"""
