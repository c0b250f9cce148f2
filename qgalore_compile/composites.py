"""Composite operators: functions of plain tensor operations that are one node each while our backend traces a step.

Dynamo and AOTAutograd walk over every node several times, 3 to 10 ms a node in all, and a step updates every weight by
the same hundred operations.  So what is decoded is one operator while a step of ours is traced, and so is each phase of
a parameter's update (``optim/operators.py``).  The pass ``decompose`` puts the operations in their place, traced once
for all calls that are alike.  Anywhere else, eagerly and in graphs of other backends, the function itself runs and is
traced through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import fx


class Composite(NamedTuple):
    """What an operator stands for.

    Attributes:
        function: of the same arguments, without a look at values.
        applies: whether a call with these arguments stands for it; others stay operators.
        writes: arguments, by place, whose tensors the function changes, of which the operator's schema says nothing.
        number: the argument that is a parameter's number, on which nothing of the function depends but random
            numbers; None where there is none.
    """

    function: Callable[..., Any]
    applies: Callable[..., bool] = lambda *args: True
    writes: tuple[int, ...] = ()
    number: int | None = None


COMPOSITES: dict[Any, Composite] = {}
"""By operator."""


def without_number(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments, a parameter's number as 0."""
    composite = COMPOSITES.get(node.target)
    if composite is None or composite.number is None:
        return node.args
    return (*node.args[: composite.number], 0, *node.args[composite.number + 1 :])


_now = threading.local()


@contextmanager
def kept(how: bool) -> Iterator[None]:
    """Whether composite operators stay operators where this thread traces."""
    before, _now.kept = stay(), how
    try:
        yield
    finally:
        _now.kept = before


def stay() -> bool:
    """Whether they do; no, but in :func:`kept`."""
    return getattr(_now, "kept", False)


# Called while Dynamo traces, not put into the graph: see optim/adamw.py's _refuse_to_trace_nothing
stay._dynamo_marked_constant = True  # type: ignore[attr-defined]
