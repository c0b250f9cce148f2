"""Texts that are kept beside the tests and compared as a whole."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

ACCEPT = "QGALORE_ACCEPT"
"""The environment variable under which a text takes the place of the one that is kept."""


def assert_golden(path: Path, text: str) -> None:
    """The text is what the file holds, else the difference is told; with ``QGALORE_ACCEPT=1`` it is written instead."""
    if os.environ.get(ACCEPT) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = (each.splitlines(keepends=True) for each in (kept, text))
    difference = "".join(difflib.unified_diff(*lines, f"kept in {path.name}", "now"))
    assert not difference, f"if this is meant, run the test again with {ACCEPT}=1\n{difference}"
