"""The picture of a run's refreshes: which rows, which values, and that any file of metrics can be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from qgalore_compile.training.schedule_plot import _history, _kinds, plot_schedule


def turn(step: int, name: str, **values: Any) -> dict[str, Any]:
    defaults = {"refreshed": True, "gap": 2, "similarity": None, "energy": None, "seconds": 0.5}
    return {"step": step, "name": name, **defaults, **values}


def written(path: Path, turns: list[dict[str, Any]], steps: int) -> Path:
    lines = [
        json.dumps({"step": step, "turns": [each for each in turns if each["step"] == step]})
        for step in range(1, steps + 1)
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_weights_are_sorted_by_what_they_are_and_then_by_layer() -> None:
    names = [f"layers.{layer}.{kind}.weight" for layer in (0, 2, 10) for kind in ("q", "mlp.up")]
    assert _kinds(names) == {
        "q": ["layers.0.q.weight", "layers.2.q.weight", "layers.10.q.weight"],
        "mlp.up": ["layers.0.mlp.up.weight", "layers.2.mlp.up.weight", "layers.10.mlp.up.weight"],
    }


def test_names_without_a_number_and_ends_that_several_kinds_share_stay_whole() -> None:
    assert _kinds(["head.weight", "a"]) == {"head": ["head.weight"], "a": ["a"]}
    assert list(_kinds(["down.0.q.weight", "up.0.q.weight"])) == ["down.*.q", "up.*.q"]


def test_a_value_holds_until_the_next_turn_and_is_unknown_before_the_first() -> None:
    rows = [[turn(2, "a", similarity=0.25), turn(3, "a"), turn(4, "a", similarity=0.5)], [turn(1, "b")]]
    np.testing.assert_array_equal(_history(rows, "similarity", 5), [[np.nan, 0.25, 0.25, 0.5, 0.5], [np.nan] * 5])


def test_long_runs_are_drawn_in_as_many_columns_as_can_be_seen() -> None:
    history = _history([[turn(1, "a", gap=2), turn(50_000, "a", gap=4)]], "gap", 100_000)
    assert history.shape == (1, 1500)
    assert (history[0, 0], history[0, 740], history[0, 760], history[0, -1]) == (2, 2, 4, 4)


@pytest.mark.parametrize("count", [1, 168])
@pytest.mark.parametrize("energy", [None, 0.5])
def test_any_run_can_be_drawn(tmp_path: Path, count: int, energy: float | None) -> None:
    names = [f"layers.{index // 7}.kind{'abcdefg'[index % 7]}.weight" for index in range(count)]
    turns = [
        turn(step, name, gap=step, similarity=0.5 if step > 1 else None, energy=energy)
        for step in (1, 3)
        for name in names
    ]
    assert plot_schedule(written(tmp_path / "metrics.jsonl", turns, 4), tmp_path / "out.png", title="a run")
    assert matplotlib.image.imread(tmp_path / "out.png").ndim == 3


def test_a_run_of_one_step_without_a_refresh_can_be_drawn(tmp_path: Path) -> None:
    metrics = written(tmp_path / "metrics.jsonl", [turn(1, "a", refreshed=False)], 1)
    assert plot_schedule(metrics, tmp_path / "out.png", title="a stand-in")


def test_metrics_without_a_turn_draw_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "refreshed": []}\n')  # as an earlier version wrote them
    assert not plot_schedule(path, tmp_path / "out.png", title="nothing")
    assert not (tmp_path / "out.png").exists()
