"""Inductor's real graph passes without its code generation: what ``explain`` and most tests need, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx

from qgalore_compile._torch import (
    V,
    detect_fake_mode,
    functorch_config,
    recursive_post_grad_passes,
    view_to_reshape,
)


def final_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], *, is_inference: bool) -> fx.GraphModule:
    """Run on ``gm``, in place, what Inductor runs before it lowers a graph, custom passes included."""
    with V.set_fake_mode(detect_fake_mode(example_inputs)):
        view_to_reshape(gm)
        recursive_post_grad_passes(gm, is_inference=is_inference)
    gm.graph.lint()
    gm.recompile()
    return gm


def dry(finish: Callable[[fx.GraphModule], Callable[..., Any]]) -> Callable[..., Any]:
    """An ``inner_compile`` for ``compile_fx``: the final graph goes to ``finish``, whose result is what runs."""

    def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **context: Any) -> Callable[..., Any]:
        run = finish(final_graph(gm, example_inputs, is_inference=bool(context.get("is_inference"))))

        def boxed(inputs: list[Any]) -> Any:
            return run(*inputs)

        boxed._boxed_call = True  # type: ignore[attr-defined]  # one list instead of arguments, as Inductor's own code
        return boxed

    return inner_compile


@contextmanager
def without_cache() -> Iterator[None]:
    """No cache of AOTAutograd's: it does not know which ``inner_compile`` filled it, and would skip the passes."""
    with functorch_config.patch(enable_autograd_cache=False):
        yield
