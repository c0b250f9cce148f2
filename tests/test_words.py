"""Turns of phrase that messages share."""

from __future__ import annotations

from qgalore_compile.words import first_line


def test_an_error_is_told_by_its_first_line() -> None:
    assert first_line(ValueError("no such device\nin a trace of ten lines")) == "no such device"


def test_an_error_without_words_is_told_by_its_name() -> None:
    assert first_line(AssertionError()) == "AssertionError"
