"""What tracing and compiling leave behind is let go once a step is compiled."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from support import Interpreted, data, small, step_of
from torch import fx

from qgalore_compile.backend.tracing import step_backend


class Watching(Interpreted):
    """:class:`Interpreted`, which remembers Dynamo's graphs without keeping them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.dynamos: list[weakref.ref[fx.GraphModule]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.dynamos.append(weakref.ref(gm))
        return super().__call__(gm, example_inputs)


def test_the_graph_that_dynamo_handed_over_is_gone_once_the_step_has_run() -> None:
    watching = step_backend(Watching())
    step = torch.compile(step_of(*small()), backend=watching, fullgraph=True)
    step(data())
    gc.collect()
    (graph,) = watching.dynamos
    assert graph() is None
    step(data())  # and the step does without it
    assert watching.count == 1
