"""Turns of phrase that messages share."""

from __future__ import annotations

from qgalore_compile.words import first_line, listed, unknown_key


def test_an_error_is_told_by_its_first_line() -> None:
    assert first_line(ValueError("no such device\nin a trace of ten lines")) == "no such device"


def test_an_error_without_words_is_told_by_its_name() -> None:
    assert first_line(AssertionError()) == "AssertionError"


def test_many_names_are_told_by_the_first_ones_and_how_many_more_there_are() -> None:
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(list("abcdefgh")) == "a, b, c and 5 more"
    assert listed(list("abcdefgh"), 4) == "a, b, c, d and 4 more"


def test_clauses_are_told_apart_by_semicolons() -> None:
    assert listed(["a is odd", "b is not"], between="; ") == "a is odd; b is not"
    assert listed(list("abcd"), between="; ") == "a; b; c; and 1 more"


def test_a_wrong_key_is_told_beside_the_closest_one_and_all_there_are() -> None:
    assert unknown_key("ranck", ["lr", "rank"]) == "unknown key 'ranck', closest to 'rank'; known keys: lr, rank"
    assert unknown_key("colour", ["lr", "rank"]) == "unknown key 'colour'; known keys: lr, rank"
