"""Eager runs of a step on copies of all that it reaches, for comparing a compiled one with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore_compile.reports.copies import Copier
from qgalore_compile.reports.reach import Entry, entries
from qgalore_compile.subspace.finder import Gradient
from qgalore_compile.subspace.refresh import observed


class Renewed(NamedTuple):
    """A projector that a run computed anew: the tensors that it would be stored in, and the gradient in float32."""

    stored: Sequence[Tensor]
    gradient: Tensor


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        entries: every tensor that its copies reach, and its results, by name.
        renewed: projectors that it computed anew, by name: its own, though it may have gone on with other ones.
        again: names of those that it computed anew more than once.
    """

    entries: dict[str, Entry]
    renewed: dict[str, Renewed] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)


def eager(
    roots: dict[str, Any],
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
    mode: AbstractContextManager[Any],
    follow: Mapping[str, Sequence[Tensor]],
) -> Run:
    """Run ``call``, a step with its arguments, on copies of ``roots`` in eager, under ``mode``.

    Args:
        follow: what to store in the place of a projector that is computed anew, by the projector's name.

    Raises:
        CopyError: something that the step reaches has no copy.
    """
    renewed: dict[str, Renewed] = {}
    again: set[str] = set()
    with closing(Copier(roots)) as copier:
        step, args, kwargs = map(copier.copy, call)
        copies = {name: copier.copy(x) for name, x in roots.items()}
        names = {x.tensor.data_ptr(): name for name, x in entries(copies).items() if x.projector}

        def observe(projector: Tensor, encoded: Sequence[Tensor], gradient: Gradient) -> Sequence[Tensor]:
            name = names.get(projector.data_ptr())
            if name is None:  # a state that the step itself has made
                return encoded
            if name in renewed:
                again.add(name)
            renewed[name] = Renewed([x.clone() for x in encoded], gradient.formed().clone())
            return follow.get(name, encoded)

        with torch.compiler.set_stance("force_eager"), observed(observe), mode:
            result = step(*args, **kwargs)
        return Run(entries({**copies, "result": result}), renewed, again)


def generators(states: list[Tensor] | None = None) -> list[Tensor]:
    """The states of torch's generators, set to ``states`` where given."""
    cuda = torch.cuda.is_initialized()
    if states is not None:
        torch.set_rng_state(states[0])
        if cuda and states[1:]:
            torch.cuda.set_rng_state_all(states[1:])
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else ())]
