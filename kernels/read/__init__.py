"""A region of an FX graph becomes a program, or there is a typed reason.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
from_graph.py         the reader: node by node, until a program or a reason stands
atoms.py              tensors as functions of a space's rows, groups and lanes
region.py             what it becomes: the program and its arguments; spaces to try; the reasons
spelling.py           how PyTorch's operators are spelled in a program
coded.py              ``encode`` and ``decode`` nodes, and which tensors hold packed codes
patterns.py           formats that take several nodes: nibbles, rows filled up to whole groups
fx_values.py          what tracing left at a node
====================  =================================================================================================
"""
