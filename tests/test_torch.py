"""Private names of torch stand in ``qgalore_compile/_torch.py`` alone, and cost ``import qgalore_compile`` nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from qgalore_compile import _torch

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "qgalore_compile" / "_torch.py"
SOURCES = sorted(path for folder in ("qgalore_compile", "passes", "kernels") for path in (ROOT / folder).rglob("*.py"))


def private(dotted: str) -> bool:
    first, *rest = dotted.split(".")
    return first == "torch" and any(part.startswith("_") and not part.endswith("__") for part in rest)


def imported(node: ast.AST) -> list[str]:
    """What an import statement names, modules in full."""
    if isinstance(node, ast.Import):
        return [each.name for each in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        return [f"{node.module}.{each.name}" for each in node.names]
    return []


def private_names(source: str) -> list[str]:
    """Private names of torch that a file imports, or reaches through ``torch``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        found += [name for name in imported(node) if private(name)]
        if isinstance(node, ast.Attribute) and private(name := ast.unparse(node)):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_private_name_of_torch_is_imported_in_one_file(path: Path) -> None:
    assert path == PLACE or private_names(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch import _dynamo",
        "def f():\n    from torch._inductor import config",
        "from torch.utils._pytree import tree_map",
        "import torch\nx = torch._guards.detect_fake_mode()",
        "def f(op: torch._ops.OpOverload) -> None: ...",
    ],
)
def test_every_way_to_a_private_name_is_seen(source: str) -> None:
    assert private_names(source)


@pytest.mark.parametrize("source", ["torch.__version__", "import torch\ntorch.nn.Linear", "mine._torch.x"])
def test_what_is_public_or_not_of_torch_is_left_alone(source: str) -> None:
    assert private_names(source) == []


def test_every_late_name_exists_and_the_type_checker_reads_the_same_place() -> None:
    tree = ast.parse(PLACE.read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {}
    for node in typed.body:
        for each in getattr(node, "names", ()):
            place = each.name if isinstance(node, ast.Import) else f"{node.module}:{each.name}"  # type: ignore[attr-defined]
            told[each.asname or each.name] = place
    assert told == _torch.LATE
    for name in _torch.LATE:
        assert getattr(_torch, name) is not None


def test_an_unknown_name_is_an_attribute_error_as_from_any_module() -> None:
    with pytest.raises(AttributeError, match=r"module 'qgalore_compile\._torch' has no attribute 'compile_gx'"):
        _ = _torch.compile_gx


def test_the_package_is_imported_without_dynamo_and_inductor() -> None:
    script = (
        "import sys, qgalore_compile\n"
        "print([name for name in sys.modules if name.startswith(('torch._dynamo', 'torch._inductor'))])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
