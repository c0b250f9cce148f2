"""Operators that stand for functions: which of the two runs where."""

from __future__ import annotations

import threading

import pytest
import torch

from qgalore_compile import formats
from qgalore_compile.composites import kept, stay
from qgalore_compile.formats.operators import decode


def test_operators_stay_where_they_are_told_to_and_in_that_thread() -> None:
    seen: list[bool] = []
    with kept(True):
        thread = threading.Thread(target=lambda: seen.append(stay()))
        thread.start()
        thread.join()
        seen.append(stay())
        with kept(False):
            seen.append(stay())
        seen.append(stay())
    assert [*seen, stay()] == [False, True, False, True, False]


def test_an_error_leaves_what_was_told_before() -> None:
    with pytest.raises(RuntimeError, match="wrong"), kept(True):
        raise RuntimeError("wrong")
    assert not stay()


@pytest.mark.parametrize("text", ["int8/8", "int4/8+planar"])
def test_an_operator_returns_what_its_function_does(text: str) -> None:
    form = formats.Format.parse(text)
    stored = formats.encode(torch.randn(4, 24), form)
    expected = decode(stored, (4, 24), form)
    with kept(True):
        found = decode(stored, (4, 24), form)
    assert torch.equal(found, expected)
