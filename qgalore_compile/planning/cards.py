"""GPUs by their memory, and budgets as people write them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Card(NamedTuple):
    """A size that cards are sold in.

    Attributes:
        gb: as sold, which makers count in GiB.
        names: of some.
        bytes: what a program can have of it: driver, display and ECC keep some 3 %.
    """

    gb: int
    names: str

    @property
    def bytes(self) -> int:
        """Bytes that a program can have."""
        return int(self.gb * 2**30 * 0.97)


CARDS = (
    Card(8, "RTX 4060"),
    Card(12, "RTX 3060, RTX 4070"),
    Card(16, "RTX 4080, T4, V100"),
    Card(24, "RTX 3090, RTX 4090, A10, L4"),
    Card(32, "RTX 5090"),
    Card(40, "A100 40GB"),
    Card(48, "A6000, L40S"),
    Card(80, "A100 80GB, H100"),
    Card(141, "H200"),
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)


def smallest_card(needed: int) -> Card | None:
    """The smallest card that holds so many bytes; None where none does."""
    return next((card for card in CARDS if card.bytes >= needed), None)


def amount(budget: int | str) -> int:
    """Bytes of a budget: a number of them, or a text such as "16GB", "15.5 GiB" or "900MB".

    Raises:
        ValueError: it is none.
    """
    if isinstance(budget, str) and (found := _AMOUNT.fullmatch(budget)) and found[2].upper() in _UNITS:
        bytes_ = int(float(found[1]) * _UNITS[found[2].upper()])
    elif isinstance(budget, int) and not isinstance(budget, bool):
        bytes_ = budget
    else:
        raise ValueError(f"a budget of {budget!r} is not understood; write it as 16GB, 15.5GiB or 900MB")
    if bytes_ <= 0:
        raise ValueError(f"a budget of {budget!r} is nothing; write it as 16GB, 15.5GiB or 900MB")
    return bytes_


def bad_amount(value: Any) -> str | None:
    """What is wrong with the text of a budget, for a table of settings; None for one that can be."""
    try:
        amount(value)
    except ValueError as error:
        return str(error)
    return None


def written(count: float) -> str:
    """Bytes as people read them, in GB, or MB below one."""
    return f"{count / 1e9:,.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:,.1f} MB"
