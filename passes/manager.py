"""The pass manager: runs the list in ``passes/__init__.py`` in order and keeps a record of each pass.

It is what Inductor is given as its custom pass after its own post-grad passes, on the functional ATen graph.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, fx

from qgalore_compile._torch import (
    BufferAOTInput,
    CustomGraphPass,
    ParamAOTInput,
    PlainAOTInput,
    SubclassGetAttrAOTInput,
    get_hash_for_files,
    lazy_format_graph_code,
    trace_structured,
    tree_leaves,
)
from qgalore_compile.kernels import ops
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.passes.context import Context, PassRecord, Tier
from qgalore_compile.passes.nodes import value
from qgalore_compile.passes.printing import layer_text, program_text
from qgalore_compile.passes.update import LayerUpdate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One analysis or rewrite: ``run(graph, record, context)`` changes the graph in place and tells the record."""

    name: str
    tier: Tier
    run: Callable[[fx.Graph, PassRecord, Context], None]


class PassManager(CustomGraphPass):
    """Runs passes over a graph.

    Args:
        passes: in order.
        lint: check the graph after every pass (``graph.lint()``); for tests and debugging.
        reassociate: "memory", "cost" or "never".
        gemm: "same" or "bf16".
        input_names: readable names of the inputs of the program that was traced: by their number or, for what hangs on
            the traced module, by attribute.
        parameters: which of those are parameters; None if that is not known.
        compiles: begin to compile the kernels that a graph calls, while Inductor goes on with the rest.

    Attributes:
        records: one a pass, of the graph seen last; empty where the graph came from Inductor's cache, which does not
            run passes.
        context: of that graph.
        kernels: those that were begun.
        salt: made part of ``uuid``, it keeps Inductor from finding what other managers compiled; empty for no salt.
    """

    def __init__(
        self,
        passes: Iterable[Pass],
        *,
        lint: bool = False,
        reassociate: str = "memory",
        gemm: str = "same",
        input_names: Mapping[int | str, str] | None = None,
        parameters: Collection[int | str] | None = None,
        compiles: bool = False,
    ) -> None:
        self.passes = tuple(passes)
        self.lint = lint
        self.reassociate = reassociate
        self.gemm = gemm
        self.input_names = dict(input_names or {})
        self.parameters = parameters
        self.records: list[PassRecord] = []
        self.context = Context()
        self.compiles = compiles
        self.kernels: list[cpu.Kernel] = []
        self.salt = ""

    def __call__(self, graph: fx.Graph) -> None:
        """Run every pass on ``graph``, in place."""
        origin_of = _origins(graph)
        names = self.input_names
        name_of = {name: names[origin] for name, origin in origin_of.items() if origin in names}
        parameters = self.parameters
        known = None if parameters is None else frozenset(name for name, at in origin_of.items() if at in parameters)
        self.context = Context(self.reassociate, name_of, known, origin_of, gemm=self.gemm)
        self.records = []
        shown: LayerUpdate | None = None
        for each in self.passes:
            self.records.append(self._run(each, graph))
            if shown is None and self.context.layers:
                shown = max(self.context.layers, key=lambda layer: layer.shape[0] * layer.shape[1])
                self.context.layer_text = {"layer": shown.name, "before": layer_text(graph, shown)}
        if shown is not None:
            self.context.layer_text["after"] = layer_text(graph, shown)
        if self.compiles:
            self.kernels += _kernels(graph)

    def _run(self, each: Pass, graph: fx.Graph) -> PassRecord:
        record = PassRecord(each.name, each.tier)
        before = _operators(graph)
        start = time.perf_counter()
        each.run(graph, record, self.context)
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
        """What Inductor may reuse a cached graph for: the sources, the passes chosen, the precision that kernels were
        made for, torch's and Triton's versions."""
        names = ",".join(each.name for each in self.passes)
        options = f"{self.reassociate}/{self.gemm}/{torch.get_float32_matmul_precision()}"
        return f"{_source_hash()}/{names}/{options}/{torch.__version__}/{_triton_version()}{self.salt}"


def _kernels(graph: fx.Graph) -> list[cpu.Kernel]:
    """The kernels that a graph launches on a CPU."""
    texts: dict[str, None] = {}
    for node in graph.nodes:
        text = program_text(node)
        if text is not None and any(
            isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves(value(node))
        ):
            texts[text] = None
    return [kernel for text in texts for kernel in ops.kernels(text)]


def _origins(graph: fx.Graph) -> dict[str, int | str]:
    """By placeholder, the program's input that it comes from, as AOTAutograd tells: a number, or the attribute of what
    hangs on the traced module."""
    origins: dict[str, int | str] = {}
    for node in graph.find_nodes(op="placeholder"):
        origin = node.meta.get("desc")
        while isinstance(origin, SubclassGetAttrAOTInput):
            origin = origin.base
        if isinstance(origin, PlainAOTInput):
            origins[node.name] = origin.idx
        elif isinstance(origin, (ParamAOTInput, BufferAOTInput)):
            origins[node.name] = origin.target
    return origins


def _operators(graph: fx.Graph) -> Counter[str]:
    """Nodes by operator; placeholders and the output by their kind."""
    return Counter(str(node.target) if node.op == "call_function" else node.op for node in graph.nodes)


@lru_cache(maxsize=1)
def _source_hash() -> str:
    """Of every source file, in subfolders too, that shapes a rewrite or what an op in the rewritten graph means."""
    import qgalore_compile
    import qgalore_compile.kernels
    import qgalore_compile.passes

    folders = [folder for package in (qgalore_compile, qgalore_compile.passes, qgalore_compile.kernels)
               for folder in package.__path__]  # fmt: skip
    files = sorted({str(path) for folder in folders for kind in ("*.py", "*.inc") for path in Path(folder).rglob(kind)})
    return get_hash_for_files(tuple(files)).hex()


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
