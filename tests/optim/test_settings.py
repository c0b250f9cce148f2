"""One table of settings: what a key's row says is what groups, runs, the command line and the guide do."""

from __future__ import annotations

import dataclasses
import inspect
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

import qgalore_compile as qg
from qgalore_compile.cli import train
from qgalore_compile.optim import settings
from qgalore_compile.optim.hyper_parameters import FIXED
from qgalore_compile.optim.settings import KEYS, REQUIRED, Key
from qgalore_compile.training import config
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.setting import Setting

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(6, 4))


def projected(**keys: Any) -> qg.QGaLoreAdamW:
    return qg.QGaLoreAdamW([{"params": [matrix()], "rank": 2, **keys}])


# -- the table, and what follows from it ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_default_is_a_value_that_can_be_and_every_key_tells_what_it_is(key: Key) -> None:
    assert key.default is REQUIRED or key.problem(key.default) is None
    assert key.help.endswith(".")
    assert key.values or key.check is None
    assert (key.default is None) <= bool(key.unset)


def test_a_group_has_every_key_with_its_default() -> None:
    group = projected().param_groups[0]
    for name, key in KEYS.items():
        if key.default is not REQUIRED:
            assert group[name] == (pytest.approx(key.default) if name == "lr" else key.default), name


def test_what_is_fixed_cannot_be_set_and_all_else_can() -> None:
    assert {key.name for key in KEYS.values() if key.fixed} == set(FIXED)
    group = projected().param_groups[0]
    for name, key in KEYS.items():
        others = [each for each in (True, False, 4, 8, 300, 0.1, *key.choices) if key.problem(each) is None]
        other = next((each for each in others if each != key.default and each != group[name]), None)
        if other is None:
            continue
        if key.fixed:
            with pytest.raises(ValueError, match=f"{name} is .* and cannot become"):
                group[name] = other
        else:
            group[name] = other
            assert group[name] == (pytest.approx(other) if name == "lr" else other)


def test_the_optimizer_s_own_defaults_are_the_table_s() -> None:
    given = inspect.signature(qg.QGaLoreAdamW).parameters
    shared = given.keys() & KEYS.keys()
    assert shared == {"lr", "betas", "eps", "weight_decay", "moments", "seed"}
    assert {name: given[name].default for name in shared} == {name: KEYS[name].default for name in shared}


def test_the_guide_s_tables_are_those_of_the_table() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for table in (settings.guide_table(projected=False), settings.guide_table(projected=True)):
        assert not [row for row in table.splitlines() if row not in text]
        assert text.count(table) == 1
        assert text.index("## Group keys") < text.index(table)


# -- a row more -------------------------------------------------------------------------------------------------------

WARMTH = Key("warmth", int, 3, 2, help="How warm a projector is kept.", projected=True)


def _even(value: Any) -> str | None:
    return None if value % 2 == 0 else f"must be even, got {value}"


@pytest.fixture
def warmth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KEYS, "warmth", WARMTH)


@pytest.mark.usefixtures("warmth")
def test_a_key_more_has_its_default_and_its_check_in_groups() -> None:
    group = projected().param_groups[0]
    assert group["warmth"] == 3
    group["warmth"] = 5
    for value in (1, 2.5, True, None):
        with pytest.raises(ValueError, match=rf"warmth must be an integer of at least 2, got {value}"):
            group["warmth"] = value
        with pytest.raises(ValueError, match=r"parameter group 0 \(.*warmth must be"):
            projected(warmth=value)
    assert group["warmth"] == 5
    with pytest.raises(ValueError, match="'warmth' has a meaning only in a projected group"):
        qg.QGaLoreAdamW([{"params": [matrix()], "warmth": 3}])


@pytest.mark.usefixtures("warmth")
def test_a_key_more_is_refused_in_a_saved_state_that_it_cannot_be_in() -> None:
    opt = projected()
    saved = opt.state_dict()
    saved["param_groups"][0] = {**saved["param_groups"][0], "warmth": 0}
    with pytest.raises(ValueError, match="saved parameter group 0: warmth must be an integer of at least 2, got 0; it"):
        opt.load_state_dict(saved)


@pytest.mark.usefixtures("warmth")
def test_a_key_more_is_a_row_of_the_guide() -> None:
    row = "| `warmth` | 3 | an integer of at least 2 | How warm a projector is kept. |\n"
    assert row in settings.guide_table(projected=True)
    assert row not in settings.guide_table(projected=False)


def test_a_key_may_be_checked_by_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key("pairs", int, 4, check=_even, values="an even integer", help="Rows.", projected=True, fixed="state")
    monkeypatch.setitem(KEYS, "pairs", key)
    assert projected(pairs=6).param_groups[0]["pairs"] == 6
    with pytest.raises(ValueError, match=r"pairs must be even, got 7"):
        projected(pairs=7)
    assert "| `pairs` | 4 | an even integer | Rows. |" in settings.guide_table(projected=True)
    assert "pairs" in settings.fixed()


@pytest.mark.usefixtures("warmth")
def test_a_key_more_is_an_option_of_a_run_by_one_field() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Warm:
        warmth: int = config.of_group("warmth")

    assert Warm().warmth == 3
    setting: Setting = dataclasses.fields(Warm)[0].metadata["setting"]
    assert setting.help == "How warm a projector is kept. [default: 3]"
    assert setting.problem(1) == "1: must be at least 2"
    assert setting.problem(2) is None


def test_a_default_that_changes_changes_in_groups_and_in_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KEYS, "power_iterations", dataclasses.replace(KEYS["power_iterations"], default=7))
    assert projected().param_groups[0]["power_iterations"] == 7
    assert "| `power_iterations` | 7 |" in settings.guide_table(projected=True)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "good", "bad", "words"),
    [
        (Key("k", bool, True), [True, False], [0, 1, "yes", None], "must be True or False"),
        (Key("k", int, 1, 1), [1, 2**70], [0, -1, 1.0, True, "1", None], "must be an integer of at least 1"),
        (
            Key("k", float, 1, 0),
            [0, 0.5, Fraction(1, 3)],
            [-1, math.nan, math.inf, True, None],
            "must be a finite number of at least 0",
        ),
        (Key("k", float, 1, above=0), [1e-300, 3], [0, -0.0, math.nan], "must be a finite number above 0"),
        (Key("k", int, 4, choices=(4, 8)), [4, 8], [4.0, 6, "4", True], "must be one of 4, 8"),
        (Key("k", str, "a", choices=("a", "b")), ["a", "b"], ["c", None, 1, torch.ones(2)], "must be one of 'a', 'b'"),
        (Key("k", str, "a"), ["", "x"], [None, 3], "must be a text"),
        (Key("k", int, None, 1, unset="no limit"), [None, 1], [0, 0.5], "must be None or an integer of at least 1"),
    ],
    ids=["bool", "int", "float", "float above", "choice of int", "choice of text", "text", "or None"],
)
def test_a_value_is_taken_or_refused_with_what_may_be_and_what_was_given(
    key: Key, good: list[Any], bad: list[Any], words: str
) -> None:
    assert [key.problem(value) for value in good] == [None] * len(good)
    assert [key.problem(value) for value in bad] == [f"{words}, got {value!r}" for value in bad]


def test_any_real_number_is_a_number_for_a_step() -> None:
    group = projected(scale=Fraction(1, 2), betas=(Fraction(1, 2), Fraction(3, 4))).param_groups[0]
    assert group.numbers.scale.item() == 0.5
    assert group.numbers.betas.tolist() == [0.5, 0.75]


# -- runs and their command line --------------------------------------------------------------------------------------


def test_each_field_s_annotation_is_its_key_s_type() -> None:
    for name, hint in get_type_hints(TrainConfig).items():
        key = config.settings()[name].key
        assert (get_args(hint) or (hint,))[0] is key.type, name
        assert (type(None) in get_args(hint)) == bool(key.unset), name


def test_a_run_s_group_keys_have_the_defaults_of_the_table() -> None:
    tiny = TrainConfig.from_preset("tiny")
    decided_by_presets = {"lr", "rank", "update_proj_gap"}
    assert all(getattr(tiny, name) == KEYS[name].default for name in tiny.projection.keys() - decided_by_presets)
    assert tiny.projection.keys() >= {"rank", "power_iterations", "max_gap", "stagger"}
    assert "weight_decay" not in tiny.projection


def test_every_field_is_an_option_of_the_command() -> None:
    options = inspect.signature(train).parameters
    assert list(options) == [each.name for each in dataclasses.fields(TrainConfig)]
