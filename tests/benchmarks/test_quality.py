"""`benchmarks/quality.py`: what it runs and when, that a run cut off goes on as if it had not been, what it reports."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from qgalore_compile.training import run as training
from qgalore_compile.training.data import Corpus, load_corpus
from qgalore_compile.training.llama import PRESETS


@pytest.fixture
def plan(module: Callable[[str], Any]) -> Any:
    return module("quality_plan")


def done(plan: Any, spec: Any, loss: float | None) -> dict[str, Any]:
    """A result as the planning needs it."""
    result = {"scale": spec.scale.name, "case": spec.case.name, "val_loss": loss, "wall_seconds": 30.0}
    return {**result, "seed": spec.seed, "settings": spec.settings()}


def searched(plan: Any, loss: Callable[[float], float | None], case: str = "qgalore") -> tuple[list[float], float]:
    """The rates that a search has tried when it ends, and the one it has found."""
    scale, method, results = plan.SCALES["tiny"], plan.CASES[case], list[dict[str, Any]]()
    for _ in range(9):
        rates, best = plan.Plan(results).search(scale, method)
        if not math.isnan(best):
            return rates, best
        results = [done(plan, plan.RunSpec(scale, method, rate, 0), loss(rate)) for rate in rates]
    pytest.fail("the search does not end")


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_search_that_finds_its_best_in_the_middle_takes_three_rates(plan: Any) -> None:
    assert searched(plan, lambda rate: abs(math.log(rate / 0.02))) == ([0.01, 0.02, 0.04], 0.02)


@pytest.mark.parametrize(
    ("case", "optimum", "rates"),
    [("qgalore", 0.08, [0.01, 0.02, 0.04, 0.08, 0.16]), ("adamw", 0.0005, [0.00025, 0.0005, 0.001, 0.002])],
)
def test_a_search_goes_on_beyond_the_edge_that_is_best(
    plan: Any, case: str, optimum: float, rates: list[float]
) -> None:
    assert searched(plan, lambda rate: abs(math.log(rate / optimum)), case) == (rates, optimum)


def test_a_search_gives_up_beyond_two_more_rates(plan: Any) -> None:
    rates, best = searched(plan, lambda rate: -rate)
    assert (len(rates), best) == (5, rates[-1])


def test_a_rate_that_diverges_is_not_the_best(plan: Any) -> None:
    assert searched(plan, lambda rate: None if rate > 0.02 else 1 / rate) == ([0.01, 0.02, 0.04], 0.02)


def test_nothing_but_the_search_can_run_before_there_are_results(plan: Any) -> None:
    planned = list(plan.Plan([]))
    assert {each.stage for each in planned if each.pending} == {"search"}
    assert sum(each.pending for each in planned) == 3 * sum(case.lr is not None for case in plan.METHODS)
    assert {each.spec.name for each in planned if each.stage == "larger"} >= {"35m-qgalore-default-lrbest-seed1"}


def test_seeds_variants_and_the_larger_scale_run_at_the_rate_that_was_found(plan: Any) -> None:
    scale, ours = plan.SCALES["tiny"], plan.CASES["qgalore"]
    rates = [(0.01, 2.0), (0.02, 1.0), (0.04, 1.5)]
    results = [done(plan, plan.RunSpec(scale, ours, rate, 0), loss) for rate, loss in rates]
    pending = {each.spec.name for each in plan.Plan(results) if each.pending and each.stage != "search"}
    assert {"tiny-qgalore-lr0.02-seed2", "tiny-nearest-lr0.02-seed0", "35m-qgalore-default-lr0.02-seed0"} <= pending
    assert "tiny-scale-1-lr-lr0.005-seed0" in pending
    assert not any(name.startswith("tiny-adamw") for name in pending)


def test_a_case_that_the_optimizer_does_not_know_is_left_out_with_its_words(
    plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = plan.Case("strange", "strange", keys={"no_such_key": 1})
    monkeypatch.setattr(plan, "VARIANTS", (strange,))
    (left_out,) = {each.skipped for each in plan.Plan([]) if each.spec.case == strange}
    assert "unknown key 'no_such_key'" in left_out


def test_a_variant_that_changes_nothing_is_left_out(plan: Any) -> None:
    skipped = {each.spec.case.name: each.skipped for each in plan.Plan([]) if each.stage == "variants"}
    assert skipped[f"refresh-{plan.BASE['refresh']}"] == "that is ours"
    assert skipped["nearest"] is None


def test_the_defaults_of_today_are_a_case_of_their_own(plan: Any) -> None:
    spec = plan.RunSpec(plan.SCALES["tiny"], plan.DEFAULT, 0.02, 0)
    assert {key: spec.keys[key] for key in plan.PROJECTION_DEFAULTS} == plan.PROJECTION_DEFAULTS | {
        "update_proj_gap": spec.scale.gap
    }
    assert "device" not in spec.settings()
    assert plan.RunSpec(plan.SCALES["60m"], plan.DEFAULT, 0.02, 0).settings()["device"] == "cuda"


def test_a_result_of_other_settings_is_no_result(plan: Any) -> None:
    spec = plan.RunSpec(plan.SCALES["tiny"], plan.CASES["adamw"], 0.001, 0)
    result = done(plan, spec, 1.0)
    assert plan.Plan([result]).result(spec) == result
    result["settings"]["steps"] += 1
    assert plan.Plan([result]).result(spec) is None


@pytest.mark.parametrize("name", ["tiny", "35m"])
def test_the_gap_leaves_a_run_ten_refreshes_and_lets_lazy_ones_save_most_of_them(plan: Any, name: str) -> None:
    scale = plan.SCALES[name]
    fixed = math.ceil(scale.steps / scale.gap)
    growing = sum(scale.steps > scale.gap * gaps for gaps in (0, 1, 2, 3, 4, 5, 7, 11, 19, 35))
    assert fixed >= 10
    assert 1 - growing / fixed >= 0.6


# -- carrying it out --------------------------------------------------------------------------------------------------


class Worker:
    """Stands in for runs: notes their names, and leaves results."""

    def __init__(self, plan: Any, fail: str = "none") -> None:
        self.plan, self.fail, self.names, self.results = plan, fail, list[str](), list[dict[str, Any]]()

    def __call__(self, spec: Any) -> int:
        self.names.append(spec.name)
        if self.fail in spec.name:
            return 1
        self.results.append(done(self.plan, spec, abs(math.log(spec.lr / spec.case.lr)) if spec.case.lr else 1.0))
        return 0

    def load(self) -> Any:
        return self.plan.Plan(self.results)


def test_everything_is_run_once_and_nothing_the_second_time(module: Callable[[str], Any], plan: Any) -> None:
    worker, quality, console = Worker(plan), module("quality"), Console(file=io.StringIO())
    assert quality.carry_out(worker.load, worker, console) == []
    wanted = {json.dumps(each.spec.settings()) for each in worker.load() if each.skipped is None}
    count = len(worker.names)
    assert len(set(worker.names)) == count == len(wanted)
    quality.carry_out(worker.load, worker, console)
    assert len(worker.names) == count


def test_a_run_that_fails_is_tried_once_and_reported_and_the_others_go_on(
    module: Callable[[str], Any], plan: Any
) -> None:
    worker, said = Worker(plan, fail="tiny-nearest-"), io.StringIO()
    console = Console(file=said, width=200)
    failed = module("quality").carry_out(worker.load, worker, console)
    assert failed == ["tiny-nearest-lr0.02-seed0", "tiny-nearest-lr0.02-seed1"]
    assert "exit status 1" in said.getvalue()
    assert len(set(worker.names)) == len(worker.names) > 50


def test_the_pattern_and_the_budget_hold_runs_back(module: Callable[[str], Any], plan: Any) -> None:
    worker, said = Worker(plan), io.StringIO()
    console = Console(file=said, width=200)
    module("quality").carry_out(worker.load, worker, console, only="tiny-adamw-lr*-seed0")
    assert worker.names == [f"tiny-adamw-lr{rate}-seed0" for rate in (0.0005, 0.001, 0.002)]
    module("quality").carry_out(worker.load, worker, console, budget=0.25)  # minutes; a run is expected to take 0.5
    assert len(worker.names) == 3
    assert "the budget is used up" in said.getvalue()


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one two three two one three three one two " * 200)
    return load_corpus(path)


@pytest.fixture
def quick(module: Callable[[str], Any], plan: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`quality_run`, at a scale that takes no time."""
    monkeypatch.setitem(PRESETS, "nano", plan.NANO)
    return module("quality_run")


def result_of(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.mark.parametrize("case", ["adamw", "galore-torch", "qgalore"])
def test_a_run_that_is_cut_off_ends_as_if_it_had_not_been(
    quick: Any, plan: Any, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    spec = plan.RunSpec(plan.SCALES["quick"], plan.CASES[case], 0.02, 1)
    whole = result_of(quick.train(spec, corpus, folder=tmp_path / "whole", work=tmp_path))
    monkeypatch.setattr(quick, "CHECKPOINT_SECONDS", 0)
    advance = training.Run.advance

    def cut(run: training.Run) -> Any:
        if run.step == 2:
            raise KeyboardInterrupt
        return advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", cut)
        with pytest.raises(KeyboardInterrupt):
            quick.train(spec, corpus, folder=tmp_path / "parts", work=tmp_path)
    assert not (tmp_path / "parts").exists()
    parts = result_of(quick.train(spec, corpus, folder=tmp_path / "parts", work=tmp_path))
    assert parts["processes"] == 2
    for key in ("val_loss", "curve", "refreshes", "live_bytes", "settings"):
        assert parts[key] == whole[key], key
    assert list(tmp_path.glob("*.pt")) == []


@pytest.mark.parametrize("case", ["galore-torch", "galore", "qgalore"])
def test_refreshes_are_counted_and_timed(quick: Any, plan: Any, corpus: Corpus, tmp_path: Path, case: str) -> None:
    spec = plan.RunSpec(plan.SCALES["quick"], plan.CASES[case], 0.02, 0)
    result = result_of(quick.train(spec, corpus, folder=tmp_path, work=tmp_path))
    assert spec.scale.gap == 1
    assert result["refreshes_a_weight"] == spec.scale.steps
    assert result["refreshes"] == 14 * spec.scale.steps
    assert 0 < result["refresh_share"] < 1


def test_live_bytes_are_those_of_what_is_stored(quick: Any, plan: Any, corpus: Corpus, tmp_path: Path) -> None:
    live = {}
    for case in ("adamw", "galore-torch", "galore", "qgalore"):
        spec = plan.RunSpec(plan.SCALES["quick"], plan.CASES[case], 0.02, 0)
        live[case] = result_of(quick.train(spec, corpus, folder=tmp_path, work=tmp_path))["live_bytes"]
    weights = sum(parameter.numel() for parameter in training.make_model(quick.config_of(spec)).parameters())
    assert live["adamw"]["weights"] == live["galore"]["weights"] == 4 * weights
    assert live["adamw"]["state"] == pytest.approx(8 * weights, rel=0.01)  # beside the moments a count a parameter
    # 1.0 % more: schedules, and a count in int64 a parameter, which at this size of model are seen
    assert live["galore"]["state"] == pytest.approx(live["galore-torch"]["state"], rel=0.02)
    assert live["qgalore"]["weights"] < 0.7 * live["adamw"]["weights"]
    assert live["qgalore"]["state"] < 0.3 * live["galore"]["state"]


# -- the report -------------------------------------------------------------------------------------------------------


def test_differences_are_taken_between_runs_of_one_seed(module: Callable[[str], Any], plan: Any) -> None:
    scale, case = plan.SCALES["tiny"], plan.CASES["nearest"]
    ours = [{"seed": seed, "val_loss": loss} for seed, loss in ((0, 1.0), (1, 2.0), (2, 9.0))]
    variant = [{"seed": seed, "val_loss": loss} for seed, loss in ((1, 2.5), (0, 1.25))]
    assert module("quality_report").Row(scale, case, 0.02, variant, ours).differences == [0.5, 0.25]


@pytest.mark.slow
def test_quick_runs_every_case_and_reports(module: Callable[[str], Any], plan: Any, monkeypatch: Any) -> None:
    kept: dict[str, str] = {}
    quality = module("quality")
    write = quality.write_report

    def keep(planned: Any, folder: Path) -> list[Path]:
        paths: list[Path] = write(planned, folder)
        kept.update({path.name: path.read_text() for path in paths if path.suffix in (".md", ".csv")})
        kept.update({path.name: path.read_bytes()[:4].decode("latin-1") for path in paths if path.suffix == ".png"})
        return paths

    monkeypatch.setattr(quality, "write_report", keep)
    monkeypatch.setitem(PRESETS, "nano", plan.NANO)  # put back afterwards
    app = typer.Typer()
    app.command()(quality.main)
    result = CliRunner().invoke(app, ["--quick", "--only", "*-seed0"])
    assert result.exit_code == 0, result.output
    assert all(kept[name] == "\x89PNG" for name in ("curves-quick.png", "rates-quick.png", "variants-quick.png"))
    rows = list(csv.DictReader(kept["summary.csv"].splitlines()))
    assert {row["case"] for row in rows} >= {case.name for case in plan.METHODS} | {"nearest", "rank-half"}
    assert "Ours refreshed 0% less often than with a fixed gap" in kept["summary.md"]


def test_the_list_says_what_is_left(module: Callable[[str], Any], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(module("quality").main)
    result = CliRunner().invoke(app, ["--list", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "tiny-adamw-lr0.001-seed0" in result.output
    assert "left: about" in result.output
