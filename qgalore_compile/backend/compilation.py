"""What became of one graph: a record of its passes and layers, kept with the compiled code.

Inductor's cache hands out compiled code without running a pass, so a record collected by passes alone would be empty in
the next process.  It is written beside that cache, under a name that depends on what the compiled code depends on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import operator
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from qgalore_compile._torch import CompileContext
from qgalore_compile.backend import frames
from qgalore_compile.backend.asked import Asked, asked, hold_against
from qgalore_compile.backend.records import GraphsRecord, Record, layer_record
from qgalore_compile.files import replacing

if TYPE_CHECKING:  # imported with Inductor, a second that `import qgalore_compile` need not take
    from qgalore_compile.passes import PassManager

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the file's format; a file of another version counts as absent."""


@dataclass
class Compilation:
    """One graph that the backend was given.

    Attributes:
        number: its place among the compilations of the process.
        identity: Dynamo's number, "frame/recompile".
        resets: how often Dynamo had been reset before.
        region: the number of the ``torch.compile`` call that it belongs to.
        owner: which of the functions, or objects, with this code it was: ``owner_of``.
        function, file, line: whose code it is.
        broken_by: why the graph ends before the function does, and where; None where it does not.
        recorded: whether a record of the passes exists: they ran, or their record was found beside the cache.
        from_cache: whether the compiled code came from a cache and no pass ran.
        resumes: the function whose rest, behind a graph break, the graph is; None where it begins with the function.
        layers: one record a parameter: name, shape, side, rank, matched, projected, reason, reassociated, kernels,
            inequality, …
        passes: one entry a pass: name, tier, matches, skipped, ops, nodes_before, nodes_after, milliseconds.
        program: facts about the whole: functions and their calls, live bytes before and after ordering.
        graph: one layer's name, and its part of the graph before and after the passes.
        symbolic: inputs with a symbolic size, as text.
        asked: the parameters that the optimizers in the graph project (:mod:`qgalore_compile.backend.asked`).
        cuda_graphs: what becomes of the step as a CUDA graph; None without the option.
    """

    number: int = field(default_factory=itertools.count().__next__)
    identity: str = ""
    resets: int = 0
    region: int = -1
    owner: tuple[int, ...] = ()
    function: str = ""
    file: str = ""
    line: int = 0
    broken_by: str | None = None
    resumes: str | None = None
    recorded: bool = False
    from_cache: bool = False
    layers: list[Record] = field(default_factory=list)
    passes: list[Record] = field(default_factory=list)
    program: dict[str, Any] = field(default_factory=dict)
    graph: dict[str, str] = field(default_factory=dict)
    symbolic: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    cuda_graphs: GraphsRecord | None = None


_PERSISTED = ("layers", "passes", "program", "graph")
_of_code: WeakKeyDictionary[CodeType, list[Compilation]] = WeakKeyDictionary()
"""By the code that was traced; functions of one factory share it, ``region`` tells them apart."""


def begin(gm: fx.GraphModule, into: list[Compilation] | None = None) -> Compilation:
    """A record of the graph that Dynamo hands over now, registered under the code that it is tracing, or put ``into``
    a list of the caller's instead."""
    examples = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    found = Compilation()
    for name, example in zip(input_names(gm).values(), examples, strict=False):
        if isinstance(example, Tensor) and any(not isinstance(size, int) for size in example.shape):
            found.symbolic.append(f"{name} ({', '.join(map(str, example.shape))})")
    from qgalore_compile._torch import InstructionTranslator
    from qgalore_compile.backend.tracing import current_region

    try:
        tracer = InstructionTranslator.current_tx()
    except AttributeError:  # the backend was called by hand, not by Dynamo
        if into is not None:
            into.append(found)
        return found
    code, reason = tracer.f_code, tracer.output.compile_subgraph_reason
    found.region, found.resets = current_region(), frames.resets()
    found.owner = frames.owner_of(tracer.f_locals.get("self"), tracer.closure)
    found.identity = str(CompileContext.current_compile_id())
    found.function, found.file, found.line = code.co_name, code.co_filename, code.co_firstlineno
    if reason is not None and reason.graph_break:
        found.broken_by = frames.why(reason)
    found.resumes = _resumed(code)
    found.asked = asked(gm, tracer)
    if into is not None:
        into.append(found)
        return found
    for known in _of_code.values():
        known[:] = [each for each in known if each.region != found.region or each.resets == found.resets]
    known = _of_code.setdefault(code, [])
    if known and _frame(known[-1]) != _frame(found):  # Dynamo numbers frames anew when it is reset
        known.clear()
    known.append(found)
    return found


def _resumed(code: CodeType) -> str | None:
    """The function whose rest, behind a graph break, a code of Dynamo's is."""
    name = frames.function_of(code)
    return None if name == code.co_name else name


def _frame(compilation: Compilation) -> str:
    return compilation.identity.split("/")[0]


def owner_of(step: Any) -> tuple[int, ...]:
    """:func:`~qgalore_compile.backend.frames.owner_of` of a function or bound method."""
    return frames.owner_of(
        getattr(step, "__self__", None), getattr(getattr(step, "__func__", step), "__closure__", None)
    )


def of(code: CodeType, regions: Collection[int] | None = None) -> list[Compilation]:
    """Every graph of some ``torch.compile`` calls, oldest first: what follows a graph break, and the functions that are
    called there, are frames of their own with graphs of the same call.  Where no call is known, those of a code and of
    what follows a break in it."""
    if regions is not None:
        found = [each for compilations in _of_code.values() for each in compilations if each.region in regions]
        return sorted(found, key=lambda each: each.number)
    found = list(_of_code.get(code, ()))
    for other, compilations in _of_code.items():
        if other.co_filename == code.co_filename and _resumed(other) == code.co_name:
            found += compilations
    return found


def input_names(gm: fx.GraphModule) -> dict[int | str, str]:
    """Readable names of a Dynamo graph's inputs, by number, and of the tensors that hang on it, by attribute:
    ``model.layers.0.weight`` where the source says ``_modules[…]``, and the group's own name of a parameter that Dynamo
    met through the optimizer."""
    names: dict[int | str, str] = {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        source = getattr(node, "_dynamo_source", None)
        names[index] = node.name if source is None else _in_a_group(source) or _readable(source.name)
    for attribute, source in getattr(gm, "_param_name_to_source", {}).items():
        names[attribute] = _readable(source.name)
    return names


def _in_a_group(source: Any) -> str | None:
    """The name that a parameter group gives to what Dynamo found as ``….param_groups[i]["params"][j]``."""
    listed: Any = getattr(source, "base", None)
    base: Any = getattr(listed, "base", None)
    if base is None or ".param_groups[" not in source.name:
        return None
    from qgalore_compile._torch import InstructionTranslator

    value = InstructionTranslator.current_tx().output.resolve_source_value
    group = value(base)
    if not isinstance(group, dict) or group.get("params") is not value(listed) or "param_names" not in group:
        return None
    return str(group["param_names"][source.index])


def parameters(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> set[int | str]:
    """Which of those are parameters."""
    given = {index for index, example in enumerate(example_inputs) if isinstance(example, torch.nn.Parameter)}
    return given | {name for name, _ in gm.named_parameters()}


def _readable(source: str) -> str:
    name = re.sub(r"\.(_modules|_parameters|_buffers)(?=\[)", "", source)
    name = re.sub(r"\[(['\"])(.+?)\1\]", r".\2", name)
    return re.sub(r"^[LG]\.", "", name)


def finish(compilation: Compilation, manager: PassManager, gm_key: str) -> None:
    """Fill a record from the passes and write it down, or read it where no pass ran.

    A record tells about a step and is no part of it: one that cannot be written is missing in the next process, and one
    that cannot be read, or is not what was written, counts as missing.
    """
    if manager.records:
        _fill(compilation, manager)
        _write(gm_key, {name: getattr(compilation, name) for name in _PERSISTED})
        hold_against(compilation.layers, compilation.asked)
        return
    compilation.from_cache = True
    kept = _read(gm_key)
    if kept is not None:
        for name in _PERSISTED:
            setattr(compilation, name, kept[name])
        compilation.layers, compilation.passes = (list(map(Record, kept[name])) for name in ("layers", "passes"))
        _rename(compilation, manager.input_names)
        hold_against(compilation.layers, compilation.asked)
        compilation.recorded = True


def _write(gm_key: str, record: dict[str, Any]) -> None:
    try:
        text = json.dumps({"version": VERSION, **record})
        path = _folder() / f"{gm_key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps({"sha256": _digest(text), **json.loads(text)}).encode())
    except (OSError, ValueError, TypeError, RecursionError) as error:  # a full disk, a folder in its place, no JSON
        logger.warning("the record of this compilation is not kept: %s", error)


def _read(gm_key: str) -> dict[str, Any] | None:
    """A record as it was written, which its digest tells; None for none."""
    try:
        path = _folder() / f"{gm_key}.json"
        kept = json.loads(path.read_bytes()) if path.is_file() else None  # reading a pipe would wait for its other end
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(kept, dict) or kept.get("version") != VERSION:
        return None
    digest = kept.pop("sha256", None)
    return kept if digest == _digest(json.dumps(kept)) else None


def rerolled(gm_key: str) -> bool | None:
    """Whether layers were put back when this was compiled before; None where nothing is known of it."""
    kept = _read(gm_key)
    return None if kept is None else "rerolled" in kept["program"]


def is_damaged(gm_key: str) -> bool:
    """Whether something stands in the place of a record that is none."""
    try:
        return os.path.lexists(_folder() / f"{gm_key}.json") and _read(gm_key) is None
    except OSError:
        return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _folder() -> Path:
    """Where records are kept: in Inductor's cache, so that they go when it goes."""
    from qgalore_compile._torch import cache_dir

    return Path(cache_dir()) / "qgalore"


def _fill(compilation: Compilation, manager: PassManager) -> None:
    context = manager.context
    compilation.recorded = True
    compilation.passes = [Record(asdict(record)) for record in manager.records]
    compilation.program = dict(context.program)
    compilation.graph = dict(context.layer_text)
    compilation.layers = [
        layer_record(
            layer.name, layer.shape, input=context.origin_of.get(layer.parameter[0].name), side=layer.side,
            rank=layer.rank, matched=True, projected=True, node=layer.up.name, **context.told(layer.name),
        )
        for layer in context.layers
    ]  # fmt: skip
    for other in context.updates.unmatched if context.updates else ():
        compilation.layers.append(layer_record(
            other.name, other.shape, input=context.origin_of.get(other.input), projected=other.projected,
            reason=other.reason.value, node=other.node, **context.told(other.name),
        ))  # fmt: skip


def _rename(compilation: Compilation, names: Mapping[int | str, str]) -> None:
    """Layers carry the names of this process's program: equal graphs share compiled code, not names."""
    for layer in compilation.layers:
        layer["name"] = names.get(layer["input"], layer["name"])


def key(gm: fx.GraphModule, example_inputs: Sequence[Any], manager: PassManager) -> str:
    """What the record of a graph's compilation depends on: the graph, what its inputs look like, and the passes."""
    place = {node: f"%{index}" for index, node in enumerate(gm.graph.nodes)}
    lines = [manager.uuid(), *map(_looks, example_inputs)]
    for node in gm.graph.nodes:
        target = node.op if node.op == "placeholder" else _target(gm, node)
        lines.append(f"{node.op} {target} {fx.map_arg((node.args, node.kwargs), place.__getitem__)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _target(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op != "get_attr":
        return str(getattr(node.target, "__qualname__", node.target))
    held = operator.attrgetter(str(node.target))(gm)
    return held.code if isinstance(held, fx.GraphModule) else _looks(held)


def _looks(given: Any) -> str:
    """Metadata of an input, those of a subclass' inner tensors included."""
    if not isinstance(given, Tensor):
        return str(type(given)) if isinstance(given, torch.SymInt) else repr(given)
    layout = f"{given.dtype} {tuple(given.shape)} {given.stride()} {given.device} {given.requires_grad}"
    inner, context = given.__tensor_flatten__() if hasattr(given, "__tensor_flatten__") else ([], "")
    parts = [_looks(getattr(given, name)) for name in inner]
    return " ".join([type(given).__name__, layout, str(context), *parts])
