"""The pass manager: runs the list in ``passes/__init__.py`` in order and keeps a record of each pass.

It is what Inductor is given as its custom pass after its own post-grad passes, on the functional ATen graph.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._logging._internal import trace_structured
from torch.fx._utils import lazy_format_graph_code

log = logging.getLogger(__name__)

Tier = Literal["exact", "rounding"]


@dataclass
class PassRecord:
    """What one pass did to one graph.

    Attributes:
        name, tier: of the pass; "exact" leaves every result bit for bit, "rounding" within the contract.
        matches: places rewritten, by the name of the node that was there.
        skipped: (node name, reason) of each place that was looked at and left.
        nodes_before, nodes_after: nodes in the graph.
        ops: how the number of calls of each operator changed, only those that did.
        milliseconds: time in the pass.
    """

    name: str
    tier: Tier
    matches: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    ops: dict[str, int] = field(default_factory=dict)
    milliseconds: float = 0.0

    def match(self, node: fx.Node) -> None:
        """Count a rewritten place."""
        self.matches.append(node.name)

    def skip(self, node: fx.Node, reason: str) -> None:
        """Count a place that stays as it is, and why."""
        self.skipped.append((node.name, reason))

    def __str__(self) -> str:
        ops = ", ".join(f"{op} {change:+d}" for op, change in sorted(self.ops.items())) or "no operator changed"
        return (
            f"{self.name} ({self.tier}): {len(self.matches)} matched, {len(self.skipped)} skipped, "
            f"{self.nodes_before} -> {self.nodes_after} nodes, {ops}, {self.milliseconds:.1f} ms"
        )


@dataclass(frozen=True)
class Pass:
    """One analysis or rewrite: ``run(graph, record)`` changes the graph in place and tells the record."""

    name: str
    tier: Tier
    run: Callable[[fx.Graph, PassRecord], None]


class PassManager(CustomGraphPass):
    """Runs passes over a graph.

    Args:
        passes: in order.
        lint: check the graph after every pass (``graph.lint()``); for tests and debugging.

    Attributes:
        records: one a pass, of the graph seen last; empty where the graph came from Inductor's cache, which does not
            run passes.
    """

    def __init__(self, passes: Iterable[Pass], *, lint: bool = False) -> None:
        self.passes = tuple(passes)
        self.lint = lint
        self.records: list[PassRecord] = []

    def __call__(self, graph: fx.Graph) -> None:
        """Run every pass on ``graph``, in place."""
        self.records = [self._run(each, graph) for each in self.passes]

    def _run(self, each: Pass, graph: fx.Graph) -> PassRecord:
        record = PassRecord(each.name, each.tier)
        before = _operators(graph)
        start = time.perf_counter()
        each.run(graph, record)
        record.milliseconds = (time.perf_counter() - start) * 1e3
        after = _operators(graph)
        record.nodes_before, record.nodes_after = before.total(), after.total()
        record.ops = {op: after[op] - before[op] for op in before | after if after[op] != before[op]}
        if self.lint:
            graph.lint()
        log.debug("%s", record)
        if graph.owning_module is not None:
            log.debug("%s", lazy_format_graph_code(f"after {each.name}", graph.owning_module))
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"qgalore_after_{each.name}", "encoding": "string"},
            payload_fn=lambda: f"# {record}\n{graph.python_code('self').src}",
        )
        return record

    def uuid(self) -> str:
        """What Inductor may reuse a cached graph for: the sources, the passes chosen, torch's and Triton's versions."""
        names = ",".join(each.name for each in self.passes)
        return f"{_source_hash()}/{names}/{torch.__version__}/{_triton_version()}"


def _operators(graph: fx.Graph) -> Counter[str]:
    """Nodes by operator; placeholders and the output by their kind."""
    return Counter(str(node.target) if node.op == "call_function" else node.op for node in graph.nodes)


@lru_cache(maxsize=1)
def _source_hash() -> str:
    """Of every source file that shapes a rewrite or what an op in the rewritten graph means."""
    import qgalore_compile
    import qgalore_compile.kernels
    import qgalore_compile.passes

    folders = [folder for package in (qgalore_compile, qgalore_compile.passes, qgalore_compile.kernels)
               for folder in package.__path__]  # fmt: skip
    files = sorted({str(path) for folder in folders for path in Path(folder).glob("*.py")})
    return get_hash_for_files(tuple(files)).hex()


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
