"""Libraries that an integration is for, and that this package does not require."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def need(what: str, packages: str) -> Iterator[None]:
    """Say what to install where an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"this integration needs {what} ({error}): pip install {packages}") from error
