"""The benchmark of stages: they add up to the first step's seconds, and the picture has a bar for each."""

from __future__ import annotations

from pathlib import Path

import depth
import pytest


def test_stages_add_up_to_the_whole() -> None:
    kept = {
        "_compile.compile_inner": [30.0, 2.0],
        "OutputGraph.call_user_compiler": [24.0],
        "backward._backward_impl": [10.0],  # compiled behind what Dynamo handed over
        "compile_fx_inner": [12.0, 8.0],
        "pass.post_grad_passes.post_grad_custom_post_pass": [3.0],
        "PyCodeCache.load_by_key_path": [4.0, 1.0],
        "gc": [100.0],
    }
    found = depth.stages(50.0, kept)
    assert found == {
        "tracing": 8.0,
        "autograd": 14.0,
        "passes": 3.0,
        "inductor": 12.0,
        "compilers": 5.0,
        "step": 8.0,
    }
    assert tuple(found) == depth.STAGES
    assert sum(found.values()) == 50.0


def test_a_stage_that_did_not_run_takes_nothing() -> None:
    assert depth.stages(1.0, {})["step"] == 1.0


def test_the_picture_has_a_bar_for_each_depth_side_and_stage(tmp_path: Path) -> None:
    row = dict.fromkeys(depth.STAGES, 2.0)
    depth.draw({"adamw": {"2": row, "16": row}, "inductor": {"2": row}}, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 10_000


@pytest.mark.parametrize("side", [each for each in depth.SIDES if each != "before"])
def test_a_side_makes_a_step(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not compiled before it is called."""
    monkeypatch.setattr(depth, "make_model", lambda *_: __import__("torch").nn.Linear(576, 576))
    monkeypatch.setattr(depth.qg, "param_groups", lambda model, **_: model.parameters())
    assert callable(depth.make_step(side, 1))
