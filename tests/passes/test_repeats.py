"""Equal sections of a list of numbers, written here as letters."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgalore_compile.passes.repeats import Repeat, repeats


def found(text: str, shortest: int = 3) -> list[tuple[str, tuple[int, ...]]]:
    """Each repeat's section, and where it stands."""
    return [
        (text[each.starts[0] : each.starts[0] + each.length], each.starts)
        for each in repeats([*text.encode()], shortest)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("abcdefgh", []),
        ("xxabcabcabcyy", [("abc", (2, 5, 8))]),
        ("aaaa", []),  # a period of one is too short
        ("aaaaaa", [("aaa", (0, 3))]),
        ("abcxabcyabc", [("abc", (0, 4, 8))]),  # never next to each other
        ("abcdefabcdefabcdef", [("abcdef", (0, 6, 12))]),  # two kinds that alternate
        ("xabcabcabdefdefdefabcz", [("def", (9, 12, 15)), ("abc", (1, 4, 18))]),  # one that comes back
    ],
)
def test_repeats_of_a_text(text: str, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    assert found(text) == expected


def test_what_saves_most_comes_first() -> None:
    first, second = repeats([*b"abcabcABCDEFGABCDEFGABCDEFG"], 3)
    assert first.saved == 14
    assert second.saved == 3


def test_a_period_begins_where_a_cut_costs_least() -> None:
    """``cab`` and ``abc`` are as good as each other: the run is longer than three periods."""
    numbers = [*b"abcabcabcab"]

    def costs(period: int) -> list[float]:
        assert period == 3
        return [0.0 if place % 3 == 2 else 1.0 for place in range(len(numbers) + 1)]

    assert repeats(numbers, 3, costs) == [Repeat((2, 5, 8), 3)]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(2, 5))
def test_sections_are_equal_and_do_not_overlap(numbers: list[int], shortest: int) -> None:
    covered: set[int] = set()
    for each in repeats(numbers, shortest):
        assert each.length >= shortest
        assert len(each.starts) > 1
        assert len({tuple(numbers[start : start + each.length]) for start in each.starts}) == 1
        assert all(later - first >= each.length for first, later in pairwise(each.starts))
        places = {start + offset for start in each.starts for offset in range(each.length)}
        assert not places & covered
        covered |= places


@settings(max_examples=50)
@given(st.permutations(range(12)), st.integers(2, 30), st.integers(0, 5), st.integers(0, 5))
def test_equal_layers_between_other_things_are_all_found(layer: list[int], count: int, before: int, after: int) -> None:
    numbers = [*range(100, 100 + before), *layer * count, *range(200, 200 + after)]
    assert repeats(numbers, 12) == [Repeat(tuple(range(before, before + 12 * count, 12)), 12)]
