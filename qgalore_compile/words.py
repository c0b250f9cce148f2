"""Turns of phrase that messages share."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; of one that says nothing its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
