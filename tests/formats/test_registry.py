"""Texts of formats: what there is, what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import itertools

import pytest
from formats_support import ALL

from qgalore_compile.formats import FORMATS, Format, FormatError
from qgalore_compile.formats.registry import MODIFIERS


@pytest.mark.parametrize("text", ALL)
def test_the_text_of_a_format_is_read_back_as_it(text: str) -> None:
    form = Format.parse(text)
    assert Format.parse(str(form)) == form
    assert Format.parse(form) is form
    assert hash(Format.parse(str(form))) == hash(form)
    assert form.text == str(form)


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_alone_is_its_own_group_and_so_is_every_modifier_read_back(name: str) -> None:
    assert Format.parse(name) == FORMATS[name]
    assert str(FORMATS[name]).partition("/")[0] == name
    taken = 0
    for words in itertools.chain.from_iterable(itertools.combinations([*MODIFIERS, "double"], n) for n in (1, 2)):
        try:
            form = Format.parse("+".join([name, *words]))
        except FormatError:
            continue
        taken += 1
        assert Format.parse(str(form)) == form
        assert str(Format.parse(str(form))) == str(form)
    assert taken or name in ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", "int8/256"),
        ("nf4", "nf4/64"),
        ("e4m3/64", "e4m3/64"),
        ("dynamic8", "dynamic8/256"),
        ("dynamic4", "dynamic4/128"),
        ("moment4", "moment4/128"),
        ("dynamic4+rows", "dynamic4/128+rows"),
        ("dynamic8+flat", "dynamic8/256"),
        ("int4/128+planar", "int4/128+planar"),
        ("e2m1+rotated+pow2", "e2m1/32+pow2+rotated"),
        ("nf4/32+double", "nf4/32+double"),
        ("nf4+double+rotated", "nf4/64+rotated+double"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_one_spelling_is_the_format_s_own(text: str, expected: str) -> None:
    assert str(Format.parse(text)) == expected


@pytest.mark.parametrize("text", ["int5", "", "INT8", "float8", "int8 /64", " int8", "e4m3fn", "/64", "+pow2"])
def test_an_unknown_name_is_told_what_there_is(text: str) -> None:
    with pytest.raises(FormatError, match=r"there is no format .*; there are int8, int6, .* 'nf4/64\+double'"):
        Format.parse(text)


@pytest.mark.parametrize("given", [None, 8, 8.0, ["int8"]])
def test_what_is_no_text_is_refused(given: object) -> None:
    with pytest.raises(FormatError, match=r"a format is a text such as 'int8/256', got"):
        Format.parse(given)  # type: ignore[arg-type]


SYMMETRIC = "pow2, pow2row, rotated, rows, flat, double$"


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("int8+wide", "pow2, pow2row, rotated, planar, rows, flat"),
        ("nf4+planar", SYMMETRIC),
        ("dynamic8+pow2", "unsigned, rows, flat"),
        ("official4+rotated", "rows, flat"),
        ("float32+flat", "no modifiers"),
        ("e4m3+", SYMMETRIC),
        ("e4m3+unsigned", SYMMETRIC),
    ],
)
def test_a_modifier_that_a_format_has_not_is_told_which_it_has(text: str, allowed: str) -> None:
    with pytest.raises(FormatError, match=f"has no '.*'; it has {allowed}"):
        Format.parse(text)


@pytest.mark.parametrize("text", ["e4m3+pow2+pow2row", "dynamic4+rows+flat", "int4+pow2+pow2", "nf4+double+double"])
def test_two_words_for_one_thing_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="changes what another word has changed; leave one of them out"):
        Format.parse(text)


@pytest.mark.parametrize("text", ["int8/", "int8/x", "int8/-4", "int8/4.0", "int8/4/4", "float32/4", "int8/²"])
def test_a_group_is_a_whole_number_of_grouped_formats(text: str) -> None:
    with pytest.raises(FormatError, match="behind the slash stands the number of elements in a group"):
        Format.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int8/0", "group_size must be at least 1, got 0"),
        ("int4/0+planar", "at least 1 element"),
        ("int4/5", "groups of 5 elements share bytes; use a multiple of 2"),
        ("int6/6", "groups of 6 elements share bytes; use a multiple of 4"),
        ("nf4/63", "use a multiple of 2"),
        ("e4m3/48+rotated", "rotations are of a power of two of elements, not of 48"),
        ("int8/24+rotated", "rotations are of a power of two"),
    ],
)
def test_a_group_that_a_format_cannot_have_is_told_why(text: str, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        Format.parse(text)


def test_formats_without_bytes_to_share_take_any_group() -> None:
    for text in ("int8/5", "e4m3/7", "int4/5+planar", "dynamic8/100", "official4/3"):
        assert str(Format.parse(text)) == text
