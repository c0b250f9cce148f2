"""What tracing and compiling leave behind, let go once a step is compiled.

AOTAutograd hangs three methods of Dynamo's graph on what it returns, "for convenience": by them the graph would live as
long as the step does, with a fake tensor a node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_METHODS = ("zero_grad", "named_parameters", "named_buffers")


def without_graph(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What ``compile_fx`` returned, without the methods of the graph module that it was compiled from: its own, and
    those of what it wraps."""
    layer: Any = compiled
    while layer is not None:
        held = getattr(layer, "__dict__", {})
        for name in _METHODS:
            held.pop(name, None)
        layer = held.get("__wrapped__")
    return compiled
