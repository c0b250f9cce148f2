"""The formats that there are, a row each, and how their texts are read.

A text is ``name/group`` with modifiers: ``"int8/256"``, ``"e4m3"``, ``"nf4/64+double"``, ``"int4/128+pow2"``.  Without
a group it is the name's own.  To add a format write one file with its formula, and one row here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from qgalore_compile.formats.base import Format, FormatError, Grouped
from qgalore_compile.formats.double import Double
from qgalore_compile.formats.dynamic import Dynamic8Blocks
from qgalore_compile.formats.dynamic4 import Dynamic4
from qgalore_compile.formats.integers import Integers
from qgalore_compile.formats.minifloat import Minifloat
from qgalore_compile.formats.moment4 import Moment4
from qgalore_compile.formats.nf4 import NF4
from qgalore_compile.formats.official import Official
from qgalore_compile.formats.plain import Plain
from qgalore_compile.formats.symmetric import Symmetric

FORMATS: dict[str, Format] = {
    "int8": Integers(256, name="int8"),
    "int6": Integers(128, name="int6"),
    "int4": Integers(256, name="int4"),
    "dynamic8": Dynamic8Blocks(256),
    "dynamic4": Dynamic4(128),
    "moment4": Moment4(128),
    "e4m3": Minifloat(128, name="e4m3"),
    "e5m2": Minifloat(128, name="e5m2"),
    "e2m3": Minifloat(32, name="e2m3"),
    "e3m2": Minifloat(32, name="e3m2"),
    "e2m1": Minifloat(32, name="e2m1"),
    "e3m0": Minifloat(32, name="e3m0"),
    "nf4": NF4(64),
    "official8": Official(256, name="official8"),
    "official4": Official(256, name="official4"),
    "float32": Plain("float32"),
    "bfloat16": Plain("bfloat16"),
}
"""By name, each with its own group."""

MODIFIERS: dict[str, dict[str, Any]] = {
    "pow2": {"scaling": "pow2"},
    "pow2row": {"scaling": "pow2row"},
    "rotated": {"rotated": True},
    "planar": {"planar": True},
    "unsigned": {"signed": False},
    "rows": {"axis": "rows"},
    "flat": {"axis": "flat"},
}
"""What a word behind a "+" changes; "double" wraps the whole."""


def parse(text: str) -> Format:
    """The format of a text, one object a process; FormatError where it is none."""
    if not isinstance(text, str):
        raise FormatError(f"a format is a text such as 'int8/256', got {text!r}; {_known()}")
    return _parsed(text)


@cache
def _parsed(text: str) -> Format:
    head, *words = text.split("+")
    name, slash, width = head.partition("/")
    found = FORMATS.get(name)
    if found is None:
        raise FormatError(f"{text!r}: there is no format {name!r}; {_known()}")
    changes: dict[str, Any] = {}
    if slash:
        if not width.isdecimal() or not isinstance(found, Grouped):
            raise FormatError(
                f"{text!r}: behind the slash stands the number of elements in a group, of grouped formats"
            )
        changes["width"] = int(width)
    for word in words:
        change = {} if word == "double" else MODIFIERS.get(word)
        if change is None or not change.keys() <= vars(found).keys():
            allowed = [each for each, does in MODIFIERS.items() if does.keys() <= vars(found).keys()]
            allowed += ["double"] if isinstance(found, Symmetric) else []
            raise FormatError(f"{text!r}: {name} has no {word!r}; it has {', '.join(allowed) or 'no modifiers'}")
        if change.keys() & changes.keys() or words.count(word) > 1:
            raise FormatError(f"{text!r}: {word!r} changes what another word has changed; leave one of them out")
        changes.update(change)
    made = replace(found, **changes)  # type: ignore[type-var]
    if "double" not in words:
        return made
    if not isinstance(made, Symmetric):
        raise FormatError(f"{text!r}: double quantisation is of formats with one scale a group")
    return Double(made)


def _known() -> str:
    return f"there are {', '.join(FORMATS)}, with a group as in 'int4/128' and modifiers as in 'nf4/64+double'"
