"""The subspace of a gradient: what it is, when it is computed anew, what that costs, and what becomes of the moments.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
projection.py         which side, project, project back, compare two subspaces
finder.py             a basis of a gradient's leading directions, by several methods
cost.py               multiplications of a refresh, for the op and for the report
scheduler.py          when a parameter's refresh is due
refresh.py            the refresh op: asks the schedule at run time, inside the graph
gather.py             the gradient of a due refresh, over micro-batches
moments.py            what is stored of Adam's moments, and what becomes of them when the projector changes
timing.py             seconds of each parameter's refreshes
====================  =================================================================================================
"""
