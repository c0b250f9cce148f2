"""`benchmarks/launches.py`: what is replayed, what is counted, and that nothing stays replaced."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def script(module: Callable[[str], Any]) -> ModuleType:
    found: ModuleType = module("launches")
    return found


def test_a_first_step_is_recorded_and_further_ones_are_handed_its_results_and_run_nothing(script: ModuleType) -> None:
    ran: list[int] = []

    def product(x: int) -> int:
        ran.append(x)
        return x * x

    replay = script.Replay()
    stand_in = replay.of("products", product)
    assert [stand_in(2), stand_in(3)] == [4, 9]
    for _ in range(2):
        replay.rewind()
        assert [stand_in(5), stand_in(7)] == [4, 9]
    assert ran == [2, 3]
    assert replay.calls == {"products": 2}


def test_what_a_replayed_function_calls_is_part_of_it(script: ModuleType) -> None:
    replay = script.Replay()
    inner = replay.of("products", lambda x: x + 1)
    outer = replay.of("library", lambda x: inner(x) * 2)
    assert outer(1) == 4
    assert replay.calls == {"library": 1}
    replay.rewind()
    assert outer(8) == 4


def test_calls_are_counted_by_whose_functions_they_are(script: ModuleType) -> None:
    def own(x: list[int]) -> int:
        return len(x)

    found = script.calls_of(lambda: [own([1]), own([2]), abs(-1)])
    assert found["most_c"]["len"] == 2
    assert found["most_c"]["abs"] == 1
    assert found["python"] == 3  # own, twice, and the function that is counted


def test_what_was_replaced_is_put_back_when_a_step_fails(script: ModuleType) -> None:
    held = SimpleNamespace(kernel=abs)

    def failing_step() -> None:
        with script._undone() as put:
            put(vars(held).__setitem__, "kernel", held.kernel, len)
            held.kernel(3)  # as abs takes it, and len does not

    with pytest.raises(TypeError, match="has no len"):
        failing_step()
    assert held.kernel is abs
