"""Records of a report: what is told about one layer, one pass or one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # passes load Inductor, which `import qgalore_compile` need not
    from qgalore_compile.passes.context import LayerNote


class Record(dict[str, Any]):
    """What is told about one thing, by name; the entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this record has no {name!r}, but {', '.join(self)}") from None


def note_of(layer: Record) -> LayerNote:
    """What passes told of a layer, of its record."""
    from qgalore_compile.passes.context import LayerNote

    return LayerNote(**{each.name: layer.get(each.name) for each in fields(LayerNote)})


def layer_record(name: str, shape: Sequence[Any], **facts: Any) -> Record:
    """The record of one parameter of two dimensions or more.

    Args:
        name, shape: of the parameter; a size that varies becomes text, and so does a rank.
        **facts: what else is known.  These are always there: ``input`` (the program's input that it is), ``side`` and
            ``rank`` (None unless it is matched), ``matched`` (whether its update was found), ``projected`` (whether it
            is, or was asked to be), ``reason`` (why it is not matched), ``node`` (where), ``reassociated`` (whether its
            gradient is never formed), ``kernels`` (names of generated kernels that update it).
    """
    sizes = list(map(_plain, shape))
    if "rank" in facts:
        facts["rank"] = _plain(facts["rank"])
    always: dict[str, Any] = dict(
        input=None, side=None, rank=None, matched=False, projected=False, reason=None, node="", reassociated=False,
        kernels=[],
    )  # fmt: skip
    return Record(name=name, shape=sizes, **{**always, **facts})


def _plain(size: Any) -> int | str | None:
    return size if size is None or isinstance(size, int) else str(size)


@dataclass
class GraphsRecord:
    """What became of a step that was to be replayed as a CUDA graph.

    Attributes:
        numbers: tensors of the host that it is given on the device.
        schedules: that the host asks before each step.
        captures, replays: so far.
        eager: calls that ran launch by launch; ``due`` of them because a subspace was due.
        ended: why nothing is captured any more.
    """

    numbers: int = 0
    schedules: int = 0
    captures: int = 0
    replays: int = 0
    eager: int = 0
    due: int = 0
    ended: str | None = None

    def __str__(self) -> str:
        counts = f"{self.replays} steps replayed, {self.eager} launch by launch, {self.due} of them with a subspace due"
        if self.ended is not None:
            return f"CUDA graphs: NOT CAPTURED any more: {self.ended}; {counts}"
        if not self.captures:
            return (
                f"CUDA graphs: not captured yet; the host asks {self.schedules} schedules before a step, and "
                f"{self.numbers} numbers are on the device; {counts}"
            )
        return f"CUDA graphs: captured {self.captures} time(s); {counts}"
