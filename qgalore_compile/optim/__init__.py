"""The optimizer: the specification in plain PyTorch, its parameter groups, its state.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
adamw.py              ``QGaLoreAdamW``: the specification, to be read in one sitting
one_parameter.py      what a step does with one parameter: the specification's other half
operators.py          the same as an operator a phase, while our backend traces a step
settings.py           every group key in one table: default, bounds, choices, help
checks.py             what a group may hold
layout.py             how a state is laid out: formats, names, what is in it before the first step
groups.py             ``param_groups``, and what a checked group means
hyper_parameters.py   a group whose numbers are checked when they are set, and read by a step as tensors
placement.py          where state is and what it holds, asked before each step
hooks.py              hooks of optimizers, as PyTorch runs them
checkpoint.py         loading a state into the tensors that exist
saved_state.py        whether a saved group fits this one, and whether a state's values can be true
no_gradient.py        the error of a traced step without any gradient
====================  =================================================================================================
"""

from qgalore_compile.optim.adamw import QGaLoreAdamW
from qgalore_compile.optim.groups import param_groups

__all__ = ["QGaLoreAdamW", "param_groups"]
