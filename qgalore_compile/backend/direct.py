"""Generated code that calls the functions of this package's operators, not the operators.

Inductor's Python code calls an operator that it does not know through PyTorch's dispatcher.  Of one that is a Python
function behind it, with lists of tensors and a program's text of 4,000 characters, that takes 7 to 13 µs, and the
function 5: of `tiny`'s step there are 84 such calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from qgalore_compile._ops import DIRECT
from qgalore_compile._torch import V, inductor_ir

_IMPORT = "from qgalore_compile._ops import calls as qgalore_calls"


@contextmanager
def called() -> Iterator[None]:
    """Generate such code; what is called, and in which order, is as without."""
    original = inductor_ir.FallbackKernel.codegen

    def codegen(node: Any, wrapper: Any) -> None:
        name = DIRECT.get(node.op_overload)
        if name is not None and not V.graph.cpp_wrapper:  # C++ code calls through the dispatcher
            main = wrapper.get_root_graph() if hasattr(wrapper, "get_root_graph") else wrapper
            main.add_import_once(_IMPORT)
            node.python_kernel_name = f"qgalore_calls.{name}"
        original(node, wrapper)

    with mock.patch.object(inductor_ir.FallbackKernel, "codegen", codegen):
        yield
