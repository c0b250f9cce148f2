"""``options={"strict": True}``: everything in a compilation that is not as it was asked for, a sentence each.

What the user has asked for is no fault: a gradient that ``reassociate="never"`` keeps, an update of a few elements that
stays with Inductor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qgalore_compile._torch import ShortenTraceback
from qgalore_compile.backend.compilation import Compilation
from qgalore_compile.backend.frames import Broken
from qgalore_compile.backend.records import Record, note_of

NEEDED = ("update", "fuse")
"""Passes without which nothing can be fused, or nothing is known of what is."""


class UnfusedError(ShortenTraceback, RuntimeError):
    """``options={"strict": True}``: something is not as asked; the message names each place, the reason and
    what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


def problems(record: Compilation) -> list[str]:
    """What is not as asked in one graph, most general first; each names the place, the reason and the remedy."""
    if not record.recorded:
        return [
            "the compiled code came from a cache that holds no record of its passes, so nothing can be said about its "
            "layers; clear the cache (torch.compiler reads TORCHINDUCTOR_CACHE_DIR)"
        ]
    return [*_breaks(record), *(text for layer in record.layers if (text := of_layer(layer))), *_products(record)]


def error(found: Sequence[str]) -> UnfusedError:
    """Of sentences, one or more."""
    return UnfusedError("backend 'qgalore', strict: not everything is as asked\n  " + "\n  ".join(found))


def refusal(broken: Broken) -> UnfusedError:
    """Of a frame that no graph tells of: nothing of it has run."""
    return error([of_frame(broken)])


def of_frame(broken: Broken) -> str:
    """What is not as asked in a frame that is not one graph, a sentence."""
    if broken.kind == "cut":
        return _cut(broken.function, broken.reason)
    what = "of it" if broken.kind == "given up" else "of what follows the break"
    return (
        f"{broken.function} ({broken.place}): Dynamo gives the function up and Python runs all {what}: "
        f"{broken.reason}; move what breaks it out of the step, or out of any try, with or loop in it and behind "
        "opt.step() (fullgraph=True shows where), or leave 'strict' out"
    )


def _cut(function: str, reason: str) -> str:
    return (
        f"{function}: a graph break cuts the step into several graphs: {reason}; move what breaks "
        "it behind the step or out of it (fullgraph=True shows where), or leave 'strict' out"
    )


def _breaks(record: Compilation) -> Iterator[str]:
    if record.broken_by:
        yield _cut(record.resumes or record.function, record.broken_by)
    elif record.resumes:
        yield (
            f"{record.resumes}: this graph is only what follows a graph break; move what breaks the step behind it or "
            "out of it (fullgraph=True shows where), or leave 'strict' out"
        )


def of_layer(layer: Record) -> str | None:
    """Why a parameter's update is not as asked, in a sentence; None where it is."""
    if not layer["matched"] and layer["projected"]:
        return f"{layer['name']}: {layer['reason']}" + (f" (at {layer['node']})" if layer["node"] else "")
    note = note_of(layer)
    if note.not_reassociated is not None and not note.not_reassociated.startswith("reassociate="):
        return f"{layer['name']}: {note.not_reassociated}"
    if note.not_fused is None:
        return None
    if isinstance(layer["rank"], str):
        return (
            f"{layer['name']}: no generated kernel takes its update, for its rank {layer['rank']} is a symbol: "
            "dynamic=True makes one of every size of a tensor that no module and no optimizer holds; let the batch's "
            "size alone vary (qg.mark_dynamic, or no dynamic=), or leave 'strict' out"
        )
    where = "between the projections or behind them" if layer["matched"] else "in its update at full rank"
    return (
        f"{layer['name']}: no generated kernel takes its update: {note.not_fused}; write what stands {where} with "
        "operations that programs know (kernels/read/spelling.py lists them), or leave 'strict' out"
    )


def _products(record: Compilation) -> Iterator[str]:
    for product in record.program.get("unfused_products", ()):
        yield (
            f"{product['name']}: a product with this quantised weight is left without a generated kernel: "
            f"{product['reason']} (at {product['node']}); write it as a linear layer's product of two matrices, or "
            "leave 'strict' out"
        )
