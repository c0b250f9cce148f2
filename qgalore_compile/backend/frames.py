"""What became of each frame that Dynamo traced for a step of ours, where it did not become one graph.

Dynamo meets a function as a frame.  What it cannot trace breaks the graph: it *cuts* the frame where it can go on
behind the break, and *gives it up* where it cannot (in a ``try``, a ``with``, a loop), so that Python runs it as it
stands and Dynamo begins anew with every function that it calls.  A frame that is given up, or that is cut before its
first operation, hands no graph to a backend, which therefore cannot tell of it: this is kept here instead, by
``torch.compile`` call.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal
from weakref import WeakKeyDictionary

Kind = Literal["cut", "rest given up", "given up"]
_now = threading.local()


@dataclass(frozen=True)
class Broken:
    """A frame of a step that is not one graph.

    Attributes:
        region: the number of the ``torch.compile`` call that it belongs to.
        owner: which of the functions, or objects, with this code it was.
        function, place: its name, and where it begins, ``file:line``.
        reason: what Dynamo cannot trace, and where it stands.
        kind: whether the rest is traced as a frame of its own ("cut"), Python runs it ("rest given up"), or Python runs
            all of the frame ("given up").
    """

    region: int
    owner: tuple[int, ...]
    function: str
    place: str
    reason: str
    kind: Kind


class _Watched:
    """One frame while it is traced: how its graph ended, and the error that says why."""

    def __init__(self) -> None:
        self.cut: Any = None
        self.error: Any = None


_of_code: WeakKeyDictionary[CodeType, list[Broken]] = WeakKeyDictionary()
_resets: list[None] = []
"""One entry a reset of Dynamo that was noticed."""


def resets() -> int:
    """How often Dynamo has been reset between two steps of ours: what was compiled before is gone."""
    return len(_resets)


def of(code: CodeType, regions: set[int] | None = None) -> list[Broken]:
    """Broken frames of some ``torch.compile`` calls, oldest first, or those of a code where no call is known."""
    if regions is None:
        return list(_of_code.get(code, ()))
    return [each for found in _of_code.values() for each in found if each.region in regions]


def function_of(code: CodeType) -> str:
    """The name of a function, also of one of whose rest, behind a graph break, the code of Dynamo's is."""
    name = code.co_name
    while match := re.fullmatch(r"torch_dynamo_resume_in_(.+)_at_\d+", name):
        name = match[1]
    return name


def owner_of(bound: Any, closure: Sequence[Any] | None) -> tuple[int, ...]:
    """What sets a function or bound method apart from others with the same code: its object and its variables."""
    return (id(bound), *map(id, closure or ()))


# -- watching Dynamo --------------------------------------------------------------------------------------------------


def traced(
    original: Callable[..., Any], args: Any, kwargs: Any, region: int, refuse: Callable[[Broken], Exception] | None
) -> Any:
    """Let Dynamo trace and compile a frame, and keep what broke, if anything did.

    Args:
        original, args, kwargs: Dynamo's function for it, and what that is called with.
        region: the number of the ``torch.compile`` call.
        refuse: makes the error that is raised of a broken frame, before any of it runs; None lets it run in pieces.
    """
    from qgalore_compile._torch import Unsupported, UserError, convert_frame, dynamo_config  # here: they load Dynamo

    if traced.__code__ not in convert_frame.input_codes:  # Dynamo was reset, which empties that list
        _of_code.clear()
        _resets.append(None)
        convert_frame.input_codes.add(traced.__code__)
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    code: CodeType = given["code"]

    def broken(reason: str, kind: Kind) -> Broken:
        found = Broken(
            region=region,
            owner=owner_of(given["locals"].get("self"), given["closure"]),
            function=function_of(code),
            place=f"{code.co_filename}:{code.co_firstlineno}",
            reason=reason,
            kind=kind,
        )
        known = _of_code.setdefault(code, [])
        if found not in known:
            known.append(found)
        return found

    with _watching() as watched:
        try:
            result = original(*args, **kwargs)
        except Exception as error:
            soft = isinstance(error, (Unsupported, UserError)) or dynamo_config.suppress_errors
            if given["one_graph"] or not soft:
                raise
            found = broken(_told(error), "given up")
            if refuse is None:
                raise
            raise refuse(found) from None
        if watched.cut is not None:
            found = broken(why(watched.cut), "rest given up" if watched.cut.reason == _REST else "cut")
            if refuse is not None:
                raise refuse(found)
        return result


@contextmanager
def _watching() -> Iterator[_Watched]:
    before = getattr(_now, "watched", None)
    _now.watched = watched = _Watched()
    try:
        yield watched
    finally:
        _now.watched = before


def cut(original: Callable[..., Any], output: Any, tx: Any, reason: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the end of a graph: where the frame ends there too, ``reason`` is no graph break."""
    if (watched := getattr(_now, "watched", None)) is not None:
        watched.cut = reason if reason.graph_break else None
    return original(output, tx, reason, *args, **kwargs)


def noted(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Around Dynamo's own note of a graph break, which alone is handed the error in every case."""
    if (watched := getattr(_now, "watched", None)) is not None:
        watched.error = kwargs.get("exc", args[-1] if args else None)
    original(self, *args, **kwargs)


# -- words ------------------------------------------------------------------------------------------------------------

_REST = "step_unsupported"
"""How Dynamo calls a break after which it leaves the rest of the frame to Python."""


def why(reason: Any) -> str:
    """Why a graph ends before its frame does, and where, from the reason that Dynamo keeps beside the graph."""
    error = getattr(getattr(_now, "watched", None), "error", None)
    if error is not None:
        return _told(error)
    return _first_sentence(reason.reason) + _place(reason.user_stack)


def in_eager(broken: Broken) -> str:
    """What Python runs of a frame, and why."""
    what = "" if broken.kind == "given up" else ", from the break on"
    return f"{broken.function} ({broken.place}){what}: {broken.reason}"


def _told(error: Any) -> str:
    return _first_sentence(getattr(error, "msg", None) or str(error)) + _place(getattr(error, "real_stack", None))


def _place(stack: Any) -> str:
    return f", at {stack[-1].filename}:{stack[-1].lineno}" if stack else ""


def _first_sentence(message: str) -> str:
    """What Dynamo says, without its hints, which speak of Dynamo's own workings: the kind of break and the explanation
    of the first of several (a break that cannot be resumed from is followed by another that says so)."""
    first = message.split("\n\n***")[0].strip()
    lines = first.splitlines() or ["an error without a message"]
    kind = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
    explanation = re.search(r"^  Explanation: (.*?)(?=^  Hint|\n\n|\Z)", first, re.DOTALL | re.MULTILINE)
    return f"{kind}: {' '.join(explanation[1].split()).rstrip('.')}" if explanation else kind
