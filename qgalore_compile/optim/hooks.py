"""Hooks around ``step`` as ``torch.optim.Optimizer`` runs them, in a form that Dynamo can trace.

PyTorch wraps the ``step`` of every subclass: hooks of all optimizers, then the optimizer's own, the step, the
optimizer's own, those of all.  A pre-hook may return ``(args, kwargs)`` to take the place of the step's, ``self`` among
them.  That wrapper opens a profiler range and cannot be traced, so this one stands in its place.

Where a subclass overrides ``step`` and calls ``super().step()``, the outermost call alone runs them, and so each runs
once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from torch.optim import Optimizer

from qgalore_compile._torch import global_step_post_hooks, global_step_pre_hooks

P = ParamSpec("P")
R = TypeVar("R")


def hooked(step: Callable[P, R], depth: int) -> Callable[P, R]:
    """``step`` with hooks around it.

    Args:
        step: a class' own.
        depth: of the class below :class:`QGaLoreAdamW` among those that define ``step``; the class attribute
            ``_step_depth`` is that of the outermost one, which alone runs hooks.

    Raises:
        RuntimeError: when called, and a pre-hook returns something else than None or (args, kwargs).
    """

    @functools.wraps(step)
    def call(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[0]
        if optimizer._step_depth != depth:
            return step(*args, **kwargs)
        for hook in (*global_step_pre_hooks.values(), *optimizer._optimizer_step_pre_hooks.values()):
            replaced = hook(optimizer, args, kwargs)
            if replaced is not None:
                if not isinstance(replaced, tuple) or len(replaced) != 2:
                    raise RuntimeError(
                        f"a hook before {type(optimizer).__name__}.step must return None or a tuple of "
                        f"(new_args, new_kwargs), but got {replaced}"
                    )
                args, kwargs = replaced
        result = step(*args, **kwargs)
        for hook in (*optimizer._optimizer_step_post_hooks.values(), *global_step_post_hooks.values()):
            hook(optimizer, args, kwargs)
        return result

    # ``hooked``: Optimizer would wrap it once more.  ``_wrapped_by_lr_sched``: LRScheduler would replace ``opt.step``
    # by a wrapper that cannot be traced.
    call.hooked = True  # type: ignore[attr-defined]
    call._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return call


@contextmanager
def around_loading(optimizer: Optimizer, state_dict: Any) -> Iterator[Any]:
    """Run the hooks of ``load_state_dict`` around what loads; gives what the hooks before it made of ``state_dict``.

    Hooks get a shallow copy, and one that returns something replaces it.  Those after run only where loading did not
    raise.
    """
    if isinstance(state_dict, dict):
        state_dict = state_dict.copy()
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = before(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    yield state_dict
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)
