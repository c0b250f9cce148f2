"""``qg.explain`` and ``qg.report``: what the passes did to a step, layer by layer, and why not more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from rich.filesize import decimal
from rich.table import Table
from torch import fx

from qgalore_compile.backend import compilation, frames
from qgalore_compile.backend.compilation import Compilation
from qgalore_compile.backend.records import Record, note_of
from qgalore_compile.reports.plain_text import plain_text
from qgalore_compile.reports.reach import unwrapped

if TYPE_CHECKING:  # passes load Inductor, which `import qgalore_compile` need not
    from qgalore_compile.passes.context import LayerNote

WIDTH = 140
"""Columns of the text: a layer's sentence fits into two lines."""


@dataclass(frozen=True)
class Report:
    """What the backend did with a step.

    Attributes:
        compilations: one a graph, oldest first.
        graph_breaks: why each graph but the last of a run ends where it does, and where; empty for one graph a step.
        skipped_frames: functions that Dynamo gave up, so that Python runs them and only what they call is compiled:
            which, why and where; empty for one graph a step.
        recompiles: how often the step was compiled again, for another shape say.
    """

    compilations: tuple[Compilation, ...]
    graph_breaks: tuple[str, ...]
    recompiles: int
    skipped_frames: tuple[str, ...] = ()

    @property
    def layers(self) -> list[Record]:
        """Parameters of two dimensions and more, of the latest compilation that updates any, and those that a projected
        group of the optimizer names and the step does not update.

        Attributes of each (and keys: a record is a dict too): name, shape, side, rank, matched, projected, reason,
        node, reassociated, kernels; where a pass tells of it also inequality, not_reassociated, keeps, not_fused,
        refresh_takes, refresh_cost, update_function, ops.
        """
        return self._latest.layers if self._latest else []

    @property
    def passes(self) -> list[Record]:
        """The passes of that compilation, in order: name, tier, matches, skipped, ops, nodes_before, nodes_after,
        milliseconds."""
        return self._latest.passes if self._latest else []

    @property
    def _latest(self) -> Compilation | None:
        with_layers = [each for each in self.compilations if any(layer["matched"] for layer in each.layers)]
        return next(reversed(with_layers or list(self.compilations)), None)

    def to_json(self) -> str:
        """All of it, as JSON: compilations, graph breaks, skipped frames, and the number of recompiles."""
        return json.dumps(
            {
                "graph_breaks": list(self.graph_breaks),
                "skipped_frames": list(self.skipped_frames),
                "recompiles": self.recompiles,
                "compilations": [asdict(each) for each in self.compilations],
            },
            indent=1,
        )

    def __str__(self) -> str:
        return plain_text(self._parts(), WIDTH)

    # -- text ---------------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[str | Table]:
        yield self._headline()
        for reason in self.graph_breaks:
            yield f"graph break: {reason}"
        for reason in self.skipped_frames:
            yield f"in eager: {reason}"
        latest = self._latest
        if latest is None:
            return
        if latest.cuda_graphs is not None:
            yield str(latest.cuda_graphs)
        if not latest.recorded:
            yield (
                "The compiled code came from a cache that holds no record of its passes: it was filled by another "
                "version, or the record was deleted. Compile once with an empty cache to have one."
            )
            return
        yield _layer_table(latest.layers)
        yield from _unmatched(latest.layers)
        yield from _unfused(latest)
        yield _pass_table(latest.passes)
        yield from _skips(latest.passes)
        yield from _program(latest.program)
        if latest.graph:
            yield f"\n{latest.graph['layer']}, before the passes\n{latest.graph['before']}"
            yield f"\n{latest.graph['layer']}, after them\n{latest.graph['after']}"

    def _headline(self) -> str:
        latest = self._latest
        if latest is None:
            return "nothing was compiled"
        projected = [layer for layer in latest.layers if layer["matched"] or layer["projected"]]
        matched = sum(layer["matched"] for layer in latest.layers)
        contracted = sum(bool(note_of(layer).reassociated) for layer in latest.layers)
        count = len(_frames(self.compilations))
        if self.graph_breaks or self.skipped_frames:
            graphs = f"in pieces, {count} of them compiled"
        else:
            graphs = f"{count} graph" + "s" * (count != 1)
        dynamic = f", symbolic sizes: {', '.join(latest.symbolic)}" if latest.symbolic else ""
        return (
            f"{latest.resumes or latest.function or 'step'}: {graphs}, {self.recompiles} recompile(s){dynamic}; "
            f"{matched} of {len(projected)} projected layers matched, {contracted} without a full-rank gradient"
            + (" (compiled code from a cache)" if latest.from_cache else "")
        )


def _layer_table(layers: list[Record]) -> Table:
    table = Table(title="Projected layers", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("layer", "shape", "side", "rank", "gradient", "a refresh takes", "update", "ops"):
        table.add_column(heading, justify="right" if heading in ("rank", "ops") else "left", overflow="fold")
    for layer in layers:
        if layer["matched"]:
            note = note_of(layer)
            if note.reassociated:
                gradient = f"never formed: {note.inequality}" + (f"; keeps {note.keeps}" if note.keeps else "")
            else:
                gradient = f"formed: {note.not_reassociated or 'no pass took it apart'}"
                gradient += f"; {note.inequality}" if note.inequality else ""
            table.add_row(
                layer["name"],
                "×".join(map(str, layer["shape"])),
                layer["side"],
                str(layer["rank"]),
                gradient,
                f"{note.refresh_takes or 'no refresh op'}; {note.refresh_cost or ''}".rstrip("; "),
                _update(note),
                "" if note.ops is None else str(note.ops),
            )
    return table


def _update(note: LayerNote) -> str:
    """What runs a layer's update."""
    instead = note.update_function or "left to Inductor"
    return f"NOT FUSED: {instead}" if note.not_fused else instead


def _unmatched(layers: list[Record]) -> Iterator[str]:
    for layer in layers:
        if not layer["matched"]:
            shape = "×".join(map(str, layer["shape"]))
            what = "NOT MATCHED" if layer["projected"] else "not projected"
            yield f"{what}: {layer['name']} {shape}: {layer['reason']}"


def _unfused(latest: Compilation) -> Iterator[str]:
    for layer in latest.layers:
        if refused := note_of(layer).not_fused:
            what = "the update" if layer.matched else "the update at full rank"
            yield f"NOT FUSED: {layer.name} {'×'.join(map(str, layer.shape))}: {what}: {refused}"
    for product in latest.program.get("unfused_products", ()):
        yield f"NOT FUSED: {product['name']}: a product with it ({product['node']}): {product['reason']}"


def _pass_table(passes: list[Record]) -> Table:
    table = Table(title="Passes", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("pass", "tier", "matched", "skipped", "nodes", "operators", "ms"):
        table.add_column(heading, justify="right" if heading in ("matched", "skipped", "ms") else "left")
    for each in passes:
        largest = sorted(each["ops"].items(), key=lambda item: -abs(item[1]))
        shown = ", ".join(f"{_short(name)} {change:+d}" for name, change in largest[:6])
        shown += f", {len(largest) - 6} more" if len(largest) > 6 else ""
        table.add_row(
            each["name"],
            each["tier"],
            str(len(each["matches"])),
            str(len(each["skipped"])),
            f"{each['nodes_before']:,} → {each['nodes_after']:,}",
            shown or "–",
            f"{each['milliseconds']:.0f}",
        )
    return table


def _short(operator: str) -> str:
    return operator.replace("<built-in function getitem>", "getitem").removesuffix(".default")


def _skips(passes: list[Record]) -> Iterator[str]:
    for each in passes:
        if each["name"] != "update":  # those are the unmatched layers
            for node, reason in each["skipped"]:
                yield f"{each['name']} left {node}: {reason}"


def _program(program: dict[str, Any]) -> Iterator[str]:
    if functions := program.get("functions"):
        calls = ", ".join(f"{name} × {count}" for name, count in functions.items())
        yield f"\nFunctions, compiled once each: {calls}"
    if rerolled := program.get("rerolled"):
        yield (
            f"\n{rerolled['traced']} of {rerolled['traced'] + rerolled['copied']} equal layers were traced, and the "
            "passes above counted in them; the others are copies with tensors of their own"
        )
    if narrow := program.get("products_in_bfloat16"):
        yield f'\n{narrow} products in bfloat16, since the option gemm is "bf16"'
    for loss in program.get("losses", ()):
        how = "some rows of them at a time" if loss["how"] == "by rows" else "in their place"
        yield f"\nA loss over {loss['rows']:,} × {loss['columns']:,} logits, down to their gradient {how}"
    if live := program.get("live_bytes"):
        for when in ("before", "after"):
            at = live[when]
            holds = ", ".join(f"{item['node']} {item['shape']} {decimal(item['bytes'])}" for item in at["holds"][:4])
            yield f"Live bytes {when} ordering: at most {decimal(at['peak'])}, at {at['at']}; the largest: {holds}"


# -- making one -------------------------------------------------------------------------------------------------------


def report(compiled_step: Callable[..., Any]) -> Report:
    """What became of a step that has run, whether it was compiled now or came from a cache.

    Args:
        compiled_step: what ``torch.compile(step, backend="qgalore")`` returned, or ``step`` itself.

    Raises:
        ValueError: the step has not been compiled by this backend in this process.
    """
    code = _code(compiled_step)
    regions = _regions(compiled_step, code)
    found, broken = compilation.of(code, regions), frames.of(code, regions)
    if not found and not broken:
        raise ValueError(
            f"{code.co_name} has not been compiled by the backend 'qgalore' in this process: call the compiled step "
            "once before report(), or use explain(step, *args), which runs nothing"
        )
    breaks = [each.reason for each in broken if each.kind != "given up"]
    breaks += [each.broken_by for each in found if each.broken_by]
    skipped = [frames.in_eager(each) for each in broken if each.kind != "cut"]
    return Report(
        tuple(found), tuple(dict.fromkeys(breaks)), len(found) - len(_frames(found)), tuple(dict.fromkeys(skipped))
    )


def _frames(compilations: Iterable[Compilation]) -> set[str]:
    """Dynamo's numbers of the frames that graphs are of, whatever was compiled again."""
    return {each.identity.split("/")[0] for each in compilations}


def _regions(step: Any, code: CodeType) -> set[int] | None:
    """The ``torch.compile`` calls that are meant: the one that returned ``step``, or those of that very function."""
    from qgalore_compile.backend.tracing import region_of  # here: it loads Dynamo

    region = region_of(step)
    if region is not None:
        return {region}
    owner = compilation.owner_of(step)
    compiled = {each.region for each in compilation.of(code) if each.owner == owner}
    return compiled | {each.region for each in frames.of(code) if each.owner == owner} or None


def explain(step: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """What the backend would do with a step: traces and runs every pass on the side; changes and runs nothing.

    Args:
        step: a function to be compiled, or one that is.
        *args, **kwargs: what it would be called with.
        options: of the backend, as for ``torch.compile``.
    """
    from qgalore_compile._torch import Unsupported
    from qgalore_compile.backend.dry_run import dry, without_cache
    from qgalore_compile.backend.entry import qgalore
    from qgalore_compile.backend.tracing import step_backend

    seen: list[Compilation] = []

    @step_backend
    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with without_cache():
            qgalore(gm, example_inputs, options=options, into=seen, inner_compile=dry(lambda graph: _stop))
        return _stop

    breaks: tuple[str, ...] = ()
    try:
        # one graph or nothing: what stands behind a graph break could be seen only by running what is before it
        torch.compile(_aside(unwrapped(step)), backend=backend, fullgraph=True)(*args, **kwargs)
    except _Stop:
        pass
    except Unsupported as error:
        breaks = (str(error).strip(),)
    code = _code(step)
    for each in seen:
        each.function, each.file, each.line = code.co_name, code.co_filename, code.co_firstlineno
    return Report(tuple(seen), breaks, 0)


class _Stop(BaseException):
    """Raised in place of the step, before anything of it runs."""


def _stop(*inputs: Any) -> Any:
    raise _Stop


def _aside(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step under a code object of its own: Dynamo keeps compiled code by code object, and the step's own shall not
    change.  Variables keep their names, and so do the layers in the report."""
    function = getattr(step, "__func__", step)
    if isinstance(function, FunctionType):
        code = function.__code__.replace()
        copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy if function is step else MethodType(copy, step.__self__)  # type: ignore[attr-defined]

    def call(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)


def _code(step: Callable[..., Any]) -> CodeType:
    """The code that Dynamo compiles for a step: a function's, a method's, a module's ``forward``."""
    step = unwrapped(step)
    if isinstance(step, torch.nn.Module):
        step = step.forward
    function: Any = getattr(step, "__func__", step)
    if not hasattr(function, "__code__"):
        function = getattr(type(step), "__call__", None)  # noqa: B004  # the question is which code, not whether any
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        raise ValueError(f"{step!r} is no Python function or module; pass the step or what torch.compile returned")
    return code
