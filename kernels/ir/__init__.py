"""The form of what is generated: block programs and products, in text and in PyTorch.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
memory.py             what memory may hold, a line each, for every language
program.py            ``BlockProgram``: what a region does to the groups of a matrix's rows; text in and out
gemm.py               ``GemmProgram``: a product with prologues and an epilogue
loss.py               ``LossProgram``: a program over the rows of logits, and the products around it
rows.py               ``RowsProgram``: a program and the terms that its gradient is made of by blocks of rows
evaluate.py           runs a program with PyTorch operations: the oracle of every printer
arithmetic.py         what formats are written in, as instructions of a program
dynamic8.py           the dynamic 8-bit map as two operations, and as what they mean in other ones
float_rounding.py     stochastic rounding to bfloat16 and float16, likewise
====================  =================================================================================================
"""
