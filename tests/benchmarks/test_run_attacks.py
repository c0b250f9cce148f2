"""The attack on a run's files, in small: every kind of damage, and a kill at every place where a file is replaced."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qgalore_compile.training.pretrain import pretrain


@pytest.fixture
def attacks(module: Callable[[str], Any]) -> Any:
    return module("run_attacks")


@pytest.fixture
def runs(module: Callable[[str], Any]) -> Any:
    return module("run_attacks_runs")


@pytest.fixture
def corruptions(module: Callable[[str], Any]) -> Any:
    return module("run_attacks_corruptions")


def test_no_damage_is_loaded_and_no_model_changes(corruptions: Any, attacks: Any, tmp_path: Path) -> None:
    found = corruptions.corruptions(tmp_path, 66, command_every=10**9)
    assert found["tried"] == found["refused in words"] == 66
    assert not any(found[what] for what in attacks.FAILURES["corruptions"])
    assert {*corruptions.CORRUPTIONS, corruptions.OTHERS} <= found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replace", pytest.param("fsync", marks=pytest.mark.more)])
def test_a_kill_wherever_a_file_is_replaced_loses_no_line(attacks: Any, runs: Any, tmp_path: Path, name: str) -> None:
    """Of metrics, checkpoints and results, in a run of four steps that was resumed after two."""
    whole = runs.config_of(tmp_path, "whole", steps=4, checkpoint_every=1, log_every=9)
    pretrain(replace(whole, steps=2), console=Console(file=io.StringIO()))
    pretrain(replace(whole, resume=True), console=Console(file=io.StringIO()))
    expected = runs.outcome(whole)
    place, killed = 0, True
    while killed:
        place += 1
        config = replace(whole, out=str(tmp_path / f"killed{place}"))
        pretrain(replace(config, steps=2), console=Console(file=io.StringIO()))
        killed = runs.killed_at(place, name, replace(config, resume=True))
        assert attacks._lost_lines(config) == 0
        pretrain(replace(config, resume=True), console=Console(file=io.StringIO()))
        assert runs.outcome(config) == expected
        assert not [left for left in os.listdir(config.out) if left.endswith(".partial")]
    assert place > 5  # metrics, two checkpoints, result, curves, schedule
