"""No file and no function grows beyond what one reads at a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE, FUNCTION = 450, 60
"""Lines, from a function's ``def`` to its end; docstrings count."""


NOT_OURS = {"build", "dist", "runs"}
"""Folders that git ignores, beside those whose name begins with a dot."""


def sources() -> Iterator[Path]:
    """The repository's Python files."""
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in NOT_OURS:
            yield from folder.rglob("*.py")


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and lines of every function in a file, methods and functions within functions included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{node.name}, line {node.lineno}", node.end_lineno - node.lineno + 1


def too_long(files: dict[str, str]) -> dict[str, int]:
    """Lines of what exceeds its limit, by name."""
    found = {name: len(text.splitlines()) for name, text in files.items()}
    found = {name: lines for name, lines in found.items() if lines > FILE}
    for name, text in files.items():
        found |= {f"{name}: {which}": lines for which, lines in functions(text) if lines > FUNCTION}
    return found


def test_no_file_and_no_function_is_too_long() -> None:
    files = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources()}
    assert {"tests/test_sizes.py", "qgalore_compile/__init__.py", "kernels/ops.py"} <= files.keys()
    assert not too_long(files)


def test_what_is_too_long_is_named_with_its_lines() -> None:
    body = "    pass\n" * FUNCTION
    within, beyond = f"def f():\n{body[9:]}", f"class C:\n    def g(self):\n{body.replace('    ', ' ' * 8)}"
    assert not too_long({"a.py": within + "#\n" * (FILE - FUNCTION)})
    assert too_long({"a.py": beyond + "#\n" * FILE}) == {"a.py": FILE + FUNCTION + 2, "a.py: g, line 2": FUNCTION + 1}
