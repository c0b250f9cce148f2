"""`benchmarks/depth.py`: stages add up to the first step's seconds, and the picture has a bar for each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn


@pytest.fixture
def script(module: Callable[[str], Any]) -> ModuleType:
    found: ModuleType = module("depth")
    return found


def test_stages_add_up_to_the_whole(script: ModuleType) -> None:
    kept = {
        "_compile.compile_inner": [30.0, 2.0],
        "OutputGraph.call_user_compiler": [24.0],
        "backward._backward_impl": [10.0],  # compiled behind what Dynamo handed over
        "compile_fx_inner": [12.0, 8.0],
        "pass.post_grad_passes.post_grad_custom_post_pass": [3.0],
        "PyCodeCache.load_by_key_path": [4.0, 1.0],
        "gc": [100.0],
    }
    found = script.stages(50.0, kept)
    expected = {"tracing": 8.0, "autograd": 14.0, "passes": 3.0, "inductor": 12.0, "compilers": 5.0, "step": 8.0}
    assert found == expected
    assert tuple(found) == script.STAGES
    assert sum(found.values()) == 50.0


def test_a_stage_that_did_not_run_takes_nothing(script: ModuleType) -> None:
    assert script.stages(1.0, {}) == {**dict.fromkeys(script.STAGES, 0), "step": 1.0}


def test_the_picture_is_written_where_sides_have_other_depths(script: ModuleType, tmp_path: Path) -> None:
    row = dict.fromkeys(script.STAGES, 2.0)
    script.draw({"adamw": {"2": row, "16": row}, "inductor": {"2": row}}, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 10_000


@pytest.mark.parametrize("side", ["adamw", "inductor", "qgalore"])
def test_a_side_makes_a_step_and_compiles_nothing_yet(
    script: ModuleType, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = sys.modules[script.make_step.__module__]
    monkeypatch.setattr(shared, "make_model", lambda *_: nn.Sequential(nn.Linear(256, 256)))
    monkeypatch.setattr(shared.qg, "param_groups", lambda model, **_: model.parameters())
    assert callable(script.make_step(side, 1))
