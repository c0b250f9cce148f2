"""``torch.compile(step, backend="qgalore")``: options, the passes, and the hand-over to Inductor.

Loading this module, which ``torch.compile`` does when it looks the backend's name up, sets
``torch._dynamo.config.trace_autograd_ops = True`` for the process: without it Dynamo breaks the graph at
``loss.backward()``, and it must be set before Dynamo sees the step.  Nothing else global is changed: Inductor's
configuration is patched for one compilation at a time, and a pass of the user's own stays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._dynamo
from torch import fx
from torch._dynamo.exc import ShortenTraceback
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import get_custom_graph_passes

from qgalore_compile.passes import PASSES, PassManager

torch._dynamo.config.trace_autograd_ops = True


FUSION_SEARCH: dict[str, Any] = {"cpp.max_horizontal_fusion_size": 1, "max_fusion_buffer_group_pairwise_attempts": 8}
"""Inductor's settings for one compilation.  A step has thousands of small nodes with equal neighbours, and the search
for fusions grows faster than linearly.  `tiny` with two layers compiles in 75.5 s with these and in 78.5 s without, at
the same speed of the step; with four layers the search alone took 10 s, and 38 s without, though on a busier machine.
Horizontal fusion would also make updated weights of several layers live together."""


class OptionError(ShortenTraceback, ValueError):
    """An option of ``torch.compile(…, backend="qgalore", options=…)`` that does not exist or has no such value.

    A ``ValueError``; also a ``ShortenTraceback``, which Dynamo hands through as it is instead of wrapping it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


@dataclass(frozen=True)
class Options:
    """What ``options=`` may hold.

    Attributes:
        disable: names of passes to leave out.
        exact: run only the passes that keep every result bit for bit.
    """

    disable: tuple[str, ...] = ()
    exact: bool = False

    @classmethod
    def parse(cls, options: dict[str, Any] | None) -> Options:
        """Checked options; raises :class:`OptionError` with what is known."""
        options = dict(options or {})
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                raise OptionError(f"backend 'qgalore': unknown option {name!r}; known options: {', '.join(known)}")
        exact = options.get("exact", False)
        if not isinstance(exact, bool):
            raise OptionError(f"backend 'qgalore': option 'exact' must be True or False, got {exact!r}")
        disable = options.get("disable", ())
        disable = (disable,) if isinstance(disable, str) else tuple(disable)
        names = [each.name for each in PASSES]
        for name in disable:
            if name not in names:
                raise OptionError(f"backend 'qgalore': no pass is called {name!r}; passes: {', '.join(names)}")
        return cls(disable, exact)

    def passes(self) -> PassManager:
        """The manager of the passes that these options leave."""
        return PassManager(
            each for each in PASSES if each.name not in self.disable and (each.tier == "exact" or not self.exact)
        )


def qgalore(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    **compile_fx_arguments: Any,
) -> Callable[..., Any]:
    """The backend.  ``torch.compile`` finds it by name, through the entry point group ``torch_dynamo_backends``.

    Args:
        gm, example_inputs: from Dynamo.
        options: see :class:`Options`.
        mode: Inductor's modes ("reduce-overhead", "max-autotune", …), handed on to it.
        **compile_fx_arguments: for tests: ``inner_compile`` in place of Inductor's code generation.

    Raises:
        OptionError: an unknown option or value.
    """
    patches = {**FUSION_SEARCH, **(torch._inductor.list_mode_options(mode) if mode else {})}
    manager = Options.parse(options).passes()
    patches["post_grad_custom_post_pass"] = [
        *get_custom_graph_passes(inductor_config.post_grad_custom_post_pass),
        manager,
    ]
    compiled = compile_fx(gm, example_inputs, config_patches=patches, **compile_fx_arguments)
    return cast("Callable[..., Any]", compiled)
