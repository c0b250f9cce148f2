"""Kernels: region → program → source.  Knows FX graphs, Triton and C++, and nothing of optimizers or models.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
ir/                   the form of what is generated: block programs and products, in text and in PyTorch
read/                 a region of an FX graph becomes a program, or there is a typed reason
cpp/                  programs and products on CPUs: C++, printed, compiled, launched
triton/               programs and products on GPUs: Triton, tiles by a model of the chip, compiled and looked into
lowering.py           which of those runs on which device, or why none does; a row for each
ops.py                the operators that a fused graph calls, with a program's text as an argument
loss.py               a loss over a vocabulary by blocks of rows, and what its labels may be
rows.py               gradients of an embedding and a head: as a whole, by blocks of rows, and their norm
====================  =================================================================================================
"""
