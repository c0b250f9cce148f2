"""Tables and lines as plain text: what ``str()`` of a report is."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table


def plain_text(parts: Iterable[str | Table], width: int) -> str:
    """Lines and tables below each other, at most ``width`` columns, without colours; brackets in a line stay."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, legacy_windows=False)
    for part in parts:
        console.print(part, markup=False, highlight=False)
    return out.getvalue().rstrip()
