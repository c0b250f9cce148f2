"""Turns of phrase that messages share."""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; of one that says nothing its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def listed(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """``a, b, c and 5 more``: the first names, and how many there are beside them; of clauses ``a; b; c; and 5 more``.

    Args:
        names: in the order in which they are told.
        most: so many are told at most.
        between: what stands between two.
    """
    more = len(names) - most
    told = between.join(names[:most])
    return told if more <= 0 else f"{told}{'' if between == ', ' else between.rstrip()} and {more} more"
