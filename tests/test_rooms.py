"""Which room may import which: every arrow points down, so there is no circle; ``docs/architecture.md`` draws them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {ROOT / name: f"qgalore_compile.{name}" for name in ("passes", "kernels")}
PACKAGES[ROOT / "qgalore_compile"] = "qgalore_compile"

FLOORS = (
    ("cli", "pretrain", "train_config"),
    ("integrations",),
    ("checkpoints",),
    ("exports",),
    ("training",),
    ("reports", "planning"),
    ("backend",),
    ("passes",),
    ("kernels",),
    ("optim",),
    ("subspace", "weights"),
    ("formats",),
    ("rng", "composites"),
    ("_ops", "files", "progress", "words"),
    ("_torch", "_startup"),
)
"""From the top; a room uses those of floors below its own, and of its own none but itself."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module's name below ``qgalore_compile``, and its file."""
    for folder, package in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [*package.split("."), *file.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[1:-1] if parts[-1] == "__init__" else parts[1:]), file


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each import from the package, inside functions and for type checkers, too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("qgalore_compile."):
                yield node.lineno, name.removeprefix("qgalore_compile.")


def arrows() -> dict[tuple[str, str], list[str]]:
    """From room to room, with the places that draw them; the face of the package may show any room."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, file in modules():
        room = module.split(".")[0]
        for line, name in imported(file):
            other = name.split(".")[0]
            if module and other in FLOOR and other != room:
                found.setdefault((room, other), []).append(f"{file.relative_to(ROOT)}:{line}")
    return found


def test_every_module_is_in_a_room() -> None:
    assert {module.split(".")[0] for module, _ in modules()} - {""} == set(FLOOR)


def test_every_arrow_points_down() -> None:
    up = {arrow: places for arrow, places in arrows().items() if FLOOR[arrow[0]] >= FLOOR[arrow[1]]}
    assert not up


def test_formats_know_nothing_of_what_uses_them() -> None:
    assert {other for room, other in arrows() if room == "formats"} <= {"rng", "composites", "_ops", "_torch"}


def test_every_file_stands_in_the_map_of_its_folder() -> None:
    for folder in {file.parent for _, file in modules()} - {ROOT / "qgalore_compile"}:
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        missing = [file.name for file in folder.glob("*.py") if file.name != "__init__.py" and file.name not in text]
        assert not missing, folder


def test_the_architecture_draws_the_rooms() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^    (\w+(?:, \w+)*)  ", text, re.MULTILINE)
    assert [tuple(line.split(", ")) for line in drawn if line.split(", ")[0] in FLOOR] == list(FLOORS)
