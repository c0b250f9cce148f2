"""Turns of phrase that messages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


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


def unknown_key(key: object, known: Iterable[str]) -> str:
    """``unknown key 'ranck', closest to 'rank'; known keys: rank, …``: all of them, and the closest where one is."""
    known = list(known)
    closest = "".join(f", closest to {each!r}" for each in get_close_matches(str(key), known, 1))
    return f"unknown key {key!r}{closest}; known keys: {', '.join(known)}"
