"""`benchmarks/format_spills.py`: which combinations it takes, in which order, and how its table is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qgalore_compile.formats.registry import FORMATS

pytest.importorskip("triton")

TARGETS, PRESETS = ("sm_80", "sm_90", "sm_100"), ("60m", "7b")
ELSEWHERE = {"dynamic8", "dynamic4", "moment4", "official8", "official4", "float32", "bfloat16"}
"""Formats of moments, as which they have other names, and those that are not stored in codes of groups."""


@pytest.fixture
def script(module: Callable[[str], Any]) -> ModuleType:
    found: ModuleType = module("format_spills")
    return found


def names(texts: Any) -> set[str]:
    return {text.split("/")[0].split("+")[0] for text in texts}


def row(script: ModuleType, target: str, preset: str, formats: Any) -> Any:
    return script.Row(target, preset, *formats, 13, 1, 0, 0, 2, 212, "gemm in 64×64×64: 8", 99)


def test_every_format_is_a_weights_and_a_projectors(script: ModuleType) -> None:
    for role in ("weight", "projector"):
        assert names(getattr(each, role) for each in script.FORMATS) == FORMATS.keys() - ELSEWHERE


def test_every_combination_is_wanted_once_and_the_first_have_all_formats(script: ModuleType) -> None:
    found = script.missing([], TARGETS, PRESETS)
    assert len(set(found)) == len(found) == len(script.FORMATS) * 6
    first = found[: len(script.FORMATS) * 2]
    assert {(preset, formats) for _, preset, formats in first} == {
        (preset, formats) for preset in PRESETS for formats in script.FORMATS
    }
    assert {target for target, *_ in first} == set(TARGETS)


def test_what_has_a_row_is_left_out_when_it_is_started_again(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    assert script.read(path) == []
    rows = [row(script, *each) for each in script.missing([], TARGETS, PRESETS)[:5]]
    script.write(path, rows)
    assert script.read(path) == rows
    assert script.missing(script.read(path), TARGETS, PRESETS) == script.missing([], TARGETS, PRESETS)[5:]


def test_a_row_names_what_was_asked_for(script: ModuleType) -> None:
    formats = script.FORMATS[0]
    found = row(script, "sm_90", "7b", formats)
    assert found.combination == ("sm_90", "7b", formats)
    assert {each.type for each in dataclasses.fields(found)} == {"str", "int"}
