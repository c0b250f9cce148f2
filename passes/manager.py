"""The pass manager: runs the list in ``passes/__init__.py`` in order and keeps a record of each pass.

It is what Inductor is given as its custom pass after its own post-grad passes, on the functional ATen graph.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from qgalore_compile import progress
from qgalore_compile._torch import (
    BufferAOTInput,
    CustomGraphPass,
    ParamAOTInput,
    PlainAOTInput,
    SubclassGetAttrAOTInput,
    get_hash_for_files,
    lazy_format_graph_code,
    trace_structured,
)
from qgalore_compile.kernels import lowering
from qgalore_compile.kernels.lowering import Prepared
from qgalore_compile.passes.context import Context, PassRecord, Tier
from qgalore_compile.passes.kernel_calls import kernel_calls
from qgalore_compile.passes.printing import layer_text
from qgalore_compile.passes.regions import LayerUpdate

if TYPE_CHECKING:
    from qgalore_compile.passes.columns import Rerolled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One analysis or rewrite: ``run(graph, record, context)`` changes the graph in place and tells the record.

    Attributes:
        needs: what of a graph it works on, in words of the list's own; see :func:`check_order`.
        leaves: what is there, or done with, behind it.
    """

    name: str
    tier: Tier
    run: Callable[[fx.Graph, PassRecord, Context], None]
    needs: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()


class PassOrderError(ValueError):
    """A list of passes in which one stands before another that leaves what it needs."""


def check_order(passes: Sequence[Pass]) -> None:
    """Raise :class:`PassOrderError` unless every pass stands behind all that leave what it needs.

    Passes may be missing, since an option takes them out: what nobody leaves is as the graph came.
    """
    for place, each in enumerate(passes):
        for later in passes[place:]:
            missing = [need for need in each.needs if need in later.leaves]
            if missing and later is each:
                raise PassOrderError(f"pass {each.name!r} needs {missing[0]!r}, which it leaves itself")
            if missing:
                raise PassOrderError(
                    f"pass {each.name!r} needs {missing[0]!r}, which {later.name!r} leaves: put it behind that"
                )


class PassManager(CustomGraphPass):
    """Runs passes over a graph.

    Args:
        passes: in order.
        lint: check the graph after every pass (``graph.lint()``); for tests and debugging.
        reassociate: "memory", "cost" or "never".
        gemm: "same" or "bf16".
        outline: whether equal layers become calls of one function; None for where it saves much.
        rerolls: equal layers from which on tracing may be shown a few, for ``unroll`` to put the others back; 0 for
            never.
        input_names: readable names of the inputs of the program that was traced: by their number or, for what hangs on
            the traced module, by attribute.
        parameters: which of those are parameters; None if that is not known.
        compiles: begin to compile the kernels that a graph calls, while Inductor goes on with the rest.

    Raises:
        PassOrderError: a pass stands before another that leaves what it needs.

    Attributes:
        records: one a pass, of the graph seen last; empty where the graph came from Inductor's cache, which does not
            run passes.
        context: of that graph.
        kernels: those that were begun.
        rerolled: layers that the graph will be without and shall have.
        salt: made part of ``uuid``, it keeps Inductor from finding what other managers compiled; empty for no salt.
    """

    def __init__(
        self,
        passes: Iterable[Pass],
        *,
        lint: bool = False,
        reassociate: str = "memory",
        gemm: str = "same",
        outline: bool | None = False,
        rerolls: int = 0,
        input_names: Mapping[int | str, str] | None = None,
        parameters: Collection[int | str] | None = None,
        compiles: bool = False,
    ) -> None:
        self.passes = tuple(passes)
        check_order(self.passes)
        self.lint = lint
        self.reassociate = reassociate
        self.gemm = gemm
        self.outline = outline
        self.rerolls = rerolls
        self.input_names = dict(input_names or {})
        self.parameters = parameters
        self.records: list[PassRecord] = []
        self.context = Context()
        self.compiles = compiles
        self.kernels: list[Prepared] = []
        self.salt = ""
        self.rerolled: Rerolled | None = None

    @property
    def unrolls(self) -> bool:
        """Whether layers that tracing is not shown are put back.  What ``gemm`` tells, it counts in the traced ones."""
        return self.rerolls > 0 and self.gemm == "same" and any(each.name == "unroll" for each in self.passes)

    def __call__(self, graph: fx.Graph) -> None:
        """Run every pass on ``graph``, in place."""
        origin_of = _origins(graph)
        names = self.input_names
        name_of = {name: names[origin] for name, origin in origin_of.items() if origin in names}
        parameters = self.parameters
        known = None if parameters is None else frozenset(name for name, at in origin_of.items() if at in parameters)
        self.context = Context(
            self.reassociate, name_of, known, origin_of, gemm=self.gemm, outline=self.outline, rerolled=self.rerolled
        )
        self.records = []
        shown: LayerUpdate | None = None
        calling = [each for each in self.passes if {"update calls", "product calls"} & set(each.leaves)]
        for index, each in enumerate(self.passes):
            progress.tell("passes", index, len(self.passes), name=each.name)
            self.records.append(self._run(each, graph))
            if self.compiles and each in calling[-1:]:  # the compiler works while passes and Inductor go on
                self.kernels += _prepared(graph)
            if shown is None and self.context.layers:
                shown = max(self.context.layers, key=lambda layer: layer.shape[0] * layer.shape[1])
                self.context.layer_text = {"layer": shown.name, "before": self._text(graph, shown)}
        if shown is not None:
            self.context.layer_text["after"] = self._text(graph, shown)
        progress.tell("code")

    def _text(self, graph: fx.Graph, layer: LayerUpdate) -> str:
        return layer_text(graph, layer, self.context.facts(graph))

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
        """What Inductor may reuse a cached graph for: the sources, the passes chosen, the lowerings, the precision that
        kernels were made for, torch's and Triton's versions."""
        names = ",".join(each.name for each in self.passes)
        options = f"{self.reassociate}/{self.gemm}/{self.outline}/{self.rerolls}"
        runs = f"{torch.get_float32_matmul_precision()}/{','.join(lowering.names())}"
        return f"{_source_hash()}/{names}/{options}/{runs}/{torch.__version__}/{_triton_version()}{self.salt}"


def _prepared(graph: fx.Graph) -> list[Prepared]:
    """The kernels that a graph launches, as far as their lowering compiles them before the step."""
    calls = {(call.text, call.device): None for call in kernel_calls(graph)}
    found = [(text, lowering.of_graph(device)) for text, device in calls]
    return [kernel for text, each in found if each is not None for kernel in each.prepare(text)]


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
    found = Counter(node.target if node.op == "call_function" else node.op for node in graph.nodes)
    named: Counter[str] = Counter()
    for target, count in found.items():
        named[str(target)] += count
    return named


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
