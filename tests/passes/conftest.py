"""A GPU that is not there, for the passes that make calls for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from interpreted import Calls


@pytest.fixture
def calls() -> Iterator[Calls]:
    """Graphs are compiled for a GPU, and their Triton kernels interpreted on the CPU."""
    from interpreted import triton_on_cpus  # which needs Triton

    with triton_on_cpus() as found:
        yield found
