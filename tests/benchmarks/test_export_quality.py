"""`benchmarks/export_quality.py`: it trains once, and its differences are those of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain_support import NANO, nano_config, train

from qgalore_compile.training.llama import PRESETS


def test_it_measures_every_case_on_a_run_that_is_there(
    module: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "nano", NANO)
    benchmark = module("export_quality")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    config = nano_config(tmp_path)
    train(config)
    monkeypatch.setattr(benchmark, "pretrain", lambda config: pytest.fail("it trains again"))
    benchmark.main(
        preset="nano", steps=config.steps, backend="eager", folder=Path(config.out), ranks="2,4", groups="16",
        sequences=16, windows=20,
    )  # fmt: skip
    result = json.loads((tmp_path / "export-quality.json").read_text())
    rows = {row["case"]: row for row in result["rows"]}
    assert len(rows) == 8
    assert rows["float32"]["difference"] == pytest.approx(0, abs=1e-6)
    assert rows["float32"]["bytes"] > 1.9 * rows["bfloat16"]["bytes"]
    names = [f"4-bit, groups of 16{kind}" for kind in ("", " + eora, rank 2", " + eora, rank 4")]
    assert rows[names[0]]["bytes"] < rows[names[1]]["bytes"] < rows[names[2]]["bytes"]
    for row in result["rows"][1:]:
        assert row["loss"] - rows["as trained, INT8"]["loss"] == pytest.approx(row["difference"], abs=1e-9)
    with pytest.raises(ValueError, match="holds a run of nano; give another --folder"):
        benchmark.trained("tiny", config.steps, "eager", Path(config.out))
