"""Composite operators: functions of plain tensor operations that are one node each while our backend traces a step.

Dynamo and AOTAutograd walk over every node several times, 5 to 10 ms a node in all, and a step updates every weight by
the same hundred operations.  So those of an update are a few operators while a step of ours is traced, and the pass
``decompose`` puts each operator's operations in its place, traced once for all calls that are alike.

Anywhere else, eagerly and in graphs of other backends, the function itself runs and is traced through.  The operator is
implemented by the same function, so a graph in which it stays means the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from qgalore_compile._ops import define
from qgalore_compile._torch import OpOverload, tree_map_only


class Composite(NamedTuple):
    """What an operator stands for.

    Attributes:
        function: of the same arguments, without a look at values, in place nowhere.
        applies: whether a call with these arguments stands for it; others stay operators.
    """

    function: Callable[..., Any]
    applies: Callable[..., bool] = lambda *args: True


COMPOSITES: dict[Any, Composite] = {}
"""By operator."""

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


def composite(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], OpOverload[..., Any]]:
    """Make a function an operator, for :func:`stay` to choose, and return that.

    Args:
        schema: of ``torch.ops.qgalore.<name>``, in PyTorch's notation; nothing is mutated.
        fake: returns empty tensors of the results' metadata, contiguous.
    """

    def register(function: Callable[..., Any]) -> OpOverload[..., Any]:
        def implementation(*args: Any) -> Any:
            return tree_map_only(Tensor, Tensor.contiguous, function(*args))

        operator = define(schema, implementation, fake)
        COMPOSITES[operator] = Composite(function)
        return operator

    return register


def empties(like: Sequence[Tensor]) -> list[Tensor]:
    """For ``fake``: new contiguous tensors of these shapes and dtypes."""
    return [each.new_empty(each.shape) for each in like]
