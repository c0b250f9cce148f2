"""Dependencies of Inductor's scheduler, added one by one without copying all that a node has.

A call of an outlined function changes some forty tensors, each of them read by calls before it that have some fifty
results: more than a thousand dependencies a layer.  Inductor (2.13, 2.14) copies a node's dependencies and goes over
them for each that it adds; at 28 layers that takes 12 of the 74 seconds that Inductor does, and grows with the square
of what a layer changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from qgalore_compile._torch import BaseSchedulerNode

_OWN = "_qgalore_own_dependencies"


@contextmanager
def in_place() -> Iterator[None]:
    """Add them so.  What a node ends with is what it would end with otherwise, in the same order."""
    with mock.patch.object(BaseSchedulerNode, "add_fake_dep", _add):
        yield


def _add(node: Any, dependency: Any) -> None:
    """``BaseSchedulerNode.add_fake_dep``.

    The first copies, since Inductor's IR may hold the same sets.  ``unmet_dependencies`` is a copy already: whoever
    sets it leaves out what is available.
    """
    own: Any = getattr(node, _OWN, None)
    if own is None or own is not node.read_writes:
        node.set_read_writes(node.read_writes.with_read(dependency))
        setattr(node, _OWN, node.read_writes)
        return
    own.reads.add(dependency)
    if dependency.name not in node.scheduler.available_buffer_names:
        node.unmet_dependencies.add(dependency)
    node.clear_read_writes_dependent_caches()
