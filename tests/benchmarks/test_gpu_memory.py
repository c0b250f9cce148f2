"""`benchmarks/gpu_memory.py` as far as it goes without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.llama import PRESETS


@pytest.fixture
def invoke(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command, run with arguments; steps are eager, for compiling is no matter of its own here."""
    script = module("gpu_memory")
    known = TrainConfig.from_preset
    monkeypatch.setitem(PRESETS, "tiny-1layers", PRESETS["tiny"])  # put there by the script, and taken away again
    monkeypatch.setattr(
        script.TrainConfig, "from_preset", lambda preset, **options: known(preset, backend="eager", **options)
    )
    app = typer.Typer()
    app.command()(script.main)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(invoke: Callable[..., Any], tmp_path: Path) -> None:
    result = invoke("--preset", "tiny", "--out", tmp_path)
    assert result.exit_code == 2
    assert "there is no device 'cuda'" in result.output
    assert not list(tmp_path.iterdir())


def test_a_run_on_a_cpu_tells_everything_but_memory(invoke: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--layers", 4, "--steps", 4, "--seq", 16, "--device", "cpu", "--out", tmp_path]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "memory-tiny-4layers-cpu.json").read_text())
    assert len(found["losses"]) == found["steps"] == 4
    assert found["refreshes"] == 28  # staggered: a layer a step, with all of its seven weights
    assert found["step_ms_with_a_turn"] > 0
    assert found["memory"] == {}
    assert found["limit_gib"] is None
