"""Programs and products on CPUs.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
printer.py            program → C++; ``philox.inc`` holds the random bits, ``dynamic8.inc`` the dynamic 8-bit map
spelling.py           how types and operations are spelled
launch.py             compiles, caches and launches what was printed
units.py              Inductor's own kernels, several to one run of the compiler
gemm.py               runs a product in blocks around the library's GEMM
rows.py               runs a program whose gradient is made by blocks of rows
====================  =================================================================================================
"""
