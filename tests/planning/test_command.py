"""Budgets, refusals, the plot, ``qgalore plan`` and what ``qgalore train`` says before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import qgalore_compile as qg
from qgalore_compile.cli import app
from qgalore_compile.planning.cards import amount, smallest_card
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.forecast import check_forecast
from qgalore_compile.training.llama import Llama, LlamaConfig


def small() -> Llama:
    """A model on the meta device."""
    with torch.device("meta"):
        return Llama(LlamaConfig(64, 96, 4, 3))


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("16GB", 16 * 10**9), ("15.5 GiB", int(15.5 * 2**30)), ("900mb", 900 * 10**6), (1234, 1234), ("64k", 64_000)],
)
def test_a_budget_is_read(text: int | str, bytes_: int) -> None:
    assert amount(text) == bytes_


@pytest.mark.parametrize("text", ["", "sixteen", "-4GB", "16 parsecs", "0", True, 3.5])
def test_a_budget_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="write it as 16GB"):
        amount(text)


def test_the_smallest_card_that_holds_it() -> None:
    assert [card and card.gb for card in map(smallest_card, (10**9, 15 * 10**9, 17 * 10**9, 10**12))] == [
        8,
        16,
        24,
        None,
    ]


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seq": -1}, {"batch": 2.0}, {"accumulate": 0}, {"device": "tpu"}])
def test_numbers_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"plan: {next(iter(wrong))} must be"):
        qg.plan(small(), **{"batch": 1, "seq": 8, **wrong})


def test_a_model_with_nothing_to_project() -> None:
    with pytest.raises(ValueError, match=r"has no nn\.Linear"):
        qg.plan(nn.Embedding(5, 4, device="meta"), batch=1, seq=8)


def test_proposals_keep_to_the_budget_in_order() -> None:
    free = qg.plan(small(), batch=8, seq=64, rank=16, compare=False)
    plan = qg.plan(small(), batch=8, seq=64, rank=16, compare=False, budget=free.total - 500_000)
    assert not plan.fits
    assert plan.proposals[-1].total <= plan.budget < free.total  # type: ignore[operator]
    assert "with these together it keeps to" in str(plan)
    assert any("checkpointing" in each.words for each in plan.proposals)


def test_what_cannot_fit_says_so() -> None:
    plan = qg.plan(small(), batch=2, seq=64, rank=16, compare=False, budget="1MB")
    assert "nothing of what was tried keeps to it" in str(plan)


def test_it_is_written_as_json_and_drawn(tmp_path: Path) -> None:
    plan = qg.plan(small(), batch=2, seq=16, rank=16, budget="4GB")
    told = json.loads(plan.to_json())
    assert told["fits"] is plan.fits is True
    assert told["forecasts"]["qgalore"]["peak"] == plan.peak
    for name in ("plan.png", "plan.svg"):
        plan.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"a plot is a \.png or a \.svg"):
        plan.plot(tmp_path / "plan.txt")


def test_the_command(tmp_path: Path) -> None:
    options = ["plan", "--preset", "tiny", "--batch", "2", "--seq", "64"]
    told = CliRunner().invoke(app, [*options, "--budget", "16GB", "--plot", str(tmp_path / "plan.svg")])
    assert told.exit_code == 0, told.output
    for words in ("qgalore", "AdamW", "QLoRA", "activations", "8 GB", "keeps to 16.00 GB"):
        assert words in told.output
    assert (tmp_path / "plan.svg").exists()
    assert CliRunner().invoke(app, [*options, "--budget", "1MB"]).exit_code == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "nano"], "choose one of tiny, 35m, 60m"),
        (["--preset", "tiny", "--batch", "0"], "--batch 0: must be at least 1"),
        (["--preset", "tiny", "--budget", "much"], "write it as 16GB"),
    ],
)
def test_the_command_refuses_in_words(options: list[str], words: str) -> None:
    told = CliRunner().invoke(app, ["plan", *options])
    assert told.exit_code == 2
    assert words in told.output


def test_a_run_above_its_budget_does_not_start() -> None:
    cpu = torch.device("cpu")
    line = check_forecast(TrainConfig.from_preset("tiny"), cpu)
    assert line is not None
    assert line.startswith("memory   ")
    with pytest.raises(ValueError, match="more than --budget 1MB"):
        check_forecast(TrainConfig.from_preset("tiny", budget="1MB"), cpu)
    assert check_forecast(TrainConfig.from_preset("tiny", optimizer="adamw"), cpu) is None
