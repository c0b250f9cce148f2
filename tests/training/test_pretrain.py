"""The main job on two blocks and a few kilobytes of text: files, resuming, Ctrl-C, exit status, errors."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qgalore_compile.training import run as training
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.llama import PRESETS, LlamaConfig, Preset
from qgalore_compile.training.pretrain import TrainResult, load_checkpoint, pretrain, resumed_config, save_checkpoint
from qgalore_compile.training.run import Run, evaluate, make_model
from qgalore_compile.training.telemetry import Display, MetricsLog, StepRecord, plot_curves, read_metrics

NANO = Preset(LlamaConfig(32, 56, 2, 2, max_seq_len=64), 8, 0.02, 0.005, 4, steps=12, batch=4, seq=16)
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["qgalore", "galore", "adamw"])


@pytest.fixture(autouse=True)
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", NANO)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text in which two bytes say more than one: the model can beat the bigram model."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"one two three two one three three one two " * 200)
    return path


@pytest.fixture
def config(tmp_path: Path, text: Path) -> TrainConfig:
    return TrainConfig.from_preset(
        "nano", data=str(text), out=str(tmp_path / "run"), backend="eager", eval_every=5, eval_tokens=256
    )


def train(config: TrainConfig, **arguments: Any) -> tuple[TrainResult, str]:
    """The result, and what was printed."""
    console = Console(file=io.StringIO(), width=100)
    result = pretrain(config, console=console, **arguments)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def interrupt_at(step: int) -> Any:
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def flatten(state: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by their path; an INT8 weight as its codes, scale and offset."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flatten(value, f"{path}/{key}").items()}
    if isinstance(state, list | tuple):
        return flatten(dict(enumerate(state)), path)
    if isinstance(state, torch.Tensor) and hasattr(state, "codes"):
        return {f"{path}/{name}": getattr(state, name) for name in ("codes", "scale", "offset")}
    return {path: state}


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for path, value in first.items():
        if isinstance(value, torch.Tensor):  # a schedule holds NaN for similarities still to come
            torch.testing.assert_close(value, second[path], rtol=0, atol=0, equal_nan=True, msg=path)
        else:
            assert value == second[path], path


# -- a run ----------------------------------------------------------------------------------------------------------


@OPTIMIZERS
def test_run_learns_and_leaves_metrics_curves_result_and_checkpoint(config: TrainConfig, optimizer: str) -> None:
    config = replace(config, optimizer=optimizer, steps=12)
    result, printed = train(config)
    out = Path(config.out)
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["step"] for r in records if r["val_loss"] is not None] == [5, 10, 12]
    assert [r["step"] for r in records if r["compile_seconds"] is not None] == [1]
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["val_loss"] == result.val_loss
    assert all(r["grad_norm"] > 0 and r["rss"] > 2**20 and r["tokens_per_second"] > 0 for r in records)
    assert json.loads((out / "result.json").read_text())["val_loss"] == result.val_loss
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 12
    assert (result.steps, result.tokens, result.graphs, result.compiling_steps) == (12, 12 * 64, 0, ())
    assert "validation loss" in printed
    assert f"{result.bigram_loss:.4f}" in printed


def test_refreshes_are_counted_and_named_in_the_step_that_did_them(config: TrainConfig) -> None:
    result, _ = train(replace(config, steps=9, stagger=False))
    refreshed = {r["step"]: r["refreshed"] for r in read_metrics(Path(config.out, "metrics.jsonl")) if r["refreshed"]}
    assert len(refreshed[1]) == 14
    assert "layers.1.mlp.down_proj.weight" in refreshed[1]
    assert result.refreshes == sum(map(len, refreshed.values())) > 14


def test_every_turn_is_told_and_no_step_has_more_refreshes_than_its_share(config: TrainConfig) -> None:
    result, _ = train(replace(config, steps=9))
    records = read_metrics(Path(config.out, "metrics.jsonl"))
    turns = {record["step"]: record["turns"] for record in records}
    assert len(turns[1]) == 14  # refreshed or stood in for
    assert all(turn["seconds"] > 0 for each in turns.values() for turn in each)
    share = 7 * -(-2 // config.update_proj_gap)  # the weights of a layer together
    refreshed = [[turn["name"] for turn in turns[step] if turn["refreshed"]] for step in turns]
    assert refreshed == [record["refreshed"] for record in records]
    assert max(map(len, refreshed)) == share
    assert sum(map(len, refreshed)) == result.refreshes
    assert len({name for names in refreshed[: config.update_proj_gap] for name in names}) == 14
    again = [turn for step in range(1 + config.update_proj_gap, 10) for turn in turns[step]]
    assert all(0 <= turn["similarity"] <= 1 and turn["gap"] == config.update_proj_gap for turn in again)
    assert Path(config.out, "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_the_energy_trigger_tells_what_projectors_caught(config: TrainConfig) -> None:
    train(replace(config, steps=9, trigger="energy"))
    turns = [turn for record in read_metrics(Path(config.out, "metrics.jsonl")) for turn in record["turns"]]
    energies = [turn["energy"] for turn in turns if turn["energy"] is not None]
    assert len(energies) >= 14  # a reference each
    assert all(0 <= energy < 1.1 for energy in energies)


def test_learning_rate_warms_up_then_falls_to_a_tenth(config: TrainConfig) -> None:
    train(replace(config, steps=40, eval_every=40))
    rates = [r["lr"] / config.lr for r in read_metrics(Path(config.out, "metrics.jsonl"))]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[22] == pytest.approx(0.55, abs=0.03)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_accumulated_micro_batches_train_like_one_batch_of_both(config: TrainConfig) -> None:
    def losses(name: str, batch: int, accumulate: int) -> list[float]:
        out = str(Path(config.out, name))
        train(replace(config, optimizer="galore", batch=batch, accumulate=accumulate, steps=3, out=out))
        return [r["loss"] for r in read_metrics(Path(out, "metrics.jsonl"))]

    assert losses("one", 4, 1) == pytest.approx(losses("two", 2, 2), rel=1e-5)


@OPTIMIZERS
def test_bfloat16_trains(config: TrainConfig, optimizer: str) -> None:
    result, _ = train(replace(config, optimizer=optimizer, dtype="bfloat16", steps=3))
    assert math.isfinite(result.val_loss)


def test_step_is_one_graph_compiled_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and run without code generation: that is for the tests of the backend."""
    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, *, backend, fullgraph: compile_with(f, backend="eager", fullgraph=True)
    )
    for optimizer in ("qgalore", "adamw"):
        result, _ = train(replace(config, optimizer=optimizer, backend="inductor", accumulate=2, tied=True))
        assert (result.graphs, result.compiling_steps) == (1, (1,))


def test_weight_decay_spares_norms(config: TrainConfig) -> None:
    for optimizer in ("qgalore", "adamw"):
        run = Run(replace(config, optimizer=optimizer, weight_decay=0.1), load_corpus(config.data))
        decay = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
        for name, parameter in run.model.named_parameters():
            assert decay[id(parameter)] == (0.0 if name.endswith("norm.weight") else 0.1), name


def test_adamw_clips_to_the_norm_and_reports_it_before_clipping(config: TrainConfig) -> None:
    norms = []
    for name, limit in (("free", None), ("clipped", 1e-3)):
        out = str(Path(config.out, name))
        train(replace(config, optimizer="adamw", steps=1, max_grad_norm=limit, out=out))
        norms.append(read_metrics(Path(out, "metrics.jsonl"))[0]["grad_norm"])
    assert norms[0] == norms[1] > 1e-3


def test_evaluation_weighs_windows_not_batches_and_leaves_the_model_training(config: TrainConfig) -> None:
    corpus, model = load_corpus(config.data), make_model(replace(config, optimizer="adamw"))
    losses = [evaluate(model, corpus.validation, replace(config, batch=batch)) for batch in (1, 3, 16)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert model.training


# -- resuming and Ctrl-C --------------------------------------------------------------------------------------------


@OPTIMIZERS
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config: TrainConfig, optimizer: str) -> None:
    whole = replace(config, optimizer=optimizer, accumulate=2, out=config.out + "-whole")
    train(whole)
    parts = replace(whole, out=config.out + "-parts")
    train(parts, on_step=interrupt_at(7))
    train(resumed_config(out=parts.out))
    first, second = (load_checkpoint(Path(c.out, "checkpoint.pt")) for c in (whole, parts))
    del first["config"], second["config"]  # they differ in `out` and `resume`
    assert_same_state(first, second)
    one, other = (read_metrics(Path(c.out, "metrics.jsonl")) for c in (whole, parts))
    for key in ("step", "loss", "lr", "grad_norm", "val_loss", "refreshed", "refreshes"):
        assert [r[key] for r in one] == [r[key] for r in other], key


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(config: TrainConfig) -> None:
    before = signal.getsignal(signal.SIGINT)
    result, printed = train(config, on_step=interrupt_at(3))
    assert result.interrupted
    assert result.exit_status == 130
    assert result.steps == load_checkpoint(Path(config.out, "checkpoint.pt"))["step"] == 3
    assert f"qgalore train --resume --out {config.out}" in printed
    assert json.loads(Path(config.out, "result.json").read_text())["val_loss"] is None  # nothing was evaluated yet
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_a_line_is_printed_does_not_print_it_twice(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("step  3/"):
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    console = Console(file=Screen(), width=100)
    result = pretrain(replace(config, log_every=1), console=console)
    assert result.steps == 3
    assert console.file.getvalue().count("step  3/") == 1  # type: ignore[attr-defined]


def test_second_ctrl_c_stops_at_once(config: TrainConfig) -> None:
    def twice(record: StepRecord) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=twice)


def test_ctrl_c_in_the_first_step_stops_at_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiling(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "make_step", lambda *_: compiling)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not Path(config.out, "checkpoint.pt").exists()


def test_metrics_written_after_the_checkpoint_are_dropped_on_resume(config: TrainConfig) -> None:
    class Killed(Exception):
        pass

    def kill(record: StepRecord) -> None:
        if record.step == 7:
            raise Killed

    with pytest.raises(Killed):
        train(replace(config, checkpoint_every=5), on_step=kill)
    path = Path(config.out, "metrics.jsonl")
    path.write_text(path.read_text() + '{"step": 8, "lo')
    train(resumed_config(out=config.out))
    assert [r["step"] for r in read_metrics(path)] == list(range(1, 13))


def test_finished_run_can_be_resumed_with_more_steps(config: TrainConfig) -> None:
    train(replace(config, steps=4))
    result, _ = train(resumed_config(out=config.out, steps=6))
    assert (result.interrupted, result.steps) == (False, 6)


def test_finished_run_with_nothing_left_to_do_reports_again(config: TrainConfig) -> None:
    first, _ = train(replace(config, steps=4))
    again, _ = train(resumed_config(out=config.out))
    assert (again.val_loss, again.steps) == (first.val_loss, 4)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 4), ("tied", True), ("optimizer", "adamw"), ("seq", 8), ("seed", 1), ("lr", 0.5), ("dtype", "bfloat16")],
)
def test_resuming_with_another_setting_names_the_option(config: TrainConfig, option: str, value: object) -> None:
    train(replace(config, steps=1))
    with pytest.raises(ValueError, match=rf"^--{option} {value} does not fit .*trained with {getattr(config, option)}"):
        train(resumed_config(out=config.out, **{option: value}))


def test_resuming_on_another_text_is_refused(config: TrainConfig, text: Path) -> None:
    train(replace(config, steps=1))
    text.write_bytes(b"something else " * 100)
    with pytest.raises(ValueError, match=r"is not the text that .* was trained on"):
        train(resumed_config(out=config.out))


def test_resuming_without_a_checkpoint_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume: .*checkpoint\.pt does not exist"):
        resumed_config(out=config.out)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip file"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no checkpoint that can be read"):
        load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="is no checkpoint of `qgalore train`"):
        load_checkpoint(path)


def test_an_unfinished_run_is_not_overwritten_and_a_finished_one_is(config: TrainConfig) -> None:
    train(config, on_step=interrupt_at(2))
    with pytest.raises(ValueError, match=r"unfinished run \(2 of 12 steps\); continue it with --resume"):
        train(config)
    train(replace(config, resume=True))
    result, _ = train(replace(config, steps=2))
    assert result.steps == 2


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def disk_full(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


# -- the verdict and the settings -----------------------------------------------------------------------------------


def result_with(val_loss: float, interrupted: bool = False) -> TrainResult:
    return TrainResult(interrupted, 1, 1, val_loss, 2.0, 1.0, 1.0, 1, (1,), 0, 0)


def test_exit_status_tells_whether_the_model_beats_the_bigram_model() -> None:
    assert result_with(1.9).exit_status == 0
    assert result_with(2.0).exit_status == 1
    assert result_with(math.nan).exit_status == 1
    assert result_with(1.9, interrupted=True).exit_status == 130


def test_enough_steps_beat_the_bigram_model_and_words_say_so(config: TrainConfig) -> None:
    result, printed = train(replace(config, steps=60, batch=8, seq=32, eval_every=60))
    assert result.exit_status == 0
    assert "The model beats the bigram model by" in printed
    result, printed = train(replace(config, steps=1, out=config.out + "-short"))
    assert result.exit_status == 1
    assert "does NOT beat the bigram model" in printed


def test_preset_gives_the_settings_and_options_replace_them() -> None:
    config = TrainConfig.from_preset("60m", rank=64, lr=None)
    assert (config.rank, config.lr, config.update_proj_gap, config.scale) == (64, 0.015, 200, 0.25)
    assert config.out == "runs/60m-qgalore-qgalore"
    assert TrainConfig.from_preset("60m", optimizer="adamw").lr == PRESETS["60m"].adamw_lr
    assert TrainConfig.from_preset().preset == "tiny"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "2b"}, "no preset is called '2b'"),
        ({"optimizer": "sgd"}, "--optimizer 'sgd': must be one of qgalore, galore, adamw"),
        ({"backend": "tvm"}, "--backend 'tvm': must be one of qgalore, inductor, eager"),
        ({"dtype": "float16"}, "--dtype 'float16'"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"update_proj_gap": -1}, "--update-proj-gap -1"),
        ({"lr": 0.0}, "--lr 0.0: must be a number above 0"),
        ({"lr": math.nan}, "--lr nan"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1"),
        ({"trigger": "loss"}, "--trigger 'loss': must be one of similarity, energy"),
        ({"trigger": "energy", "similarity": "official"}, "--trigger energy is no part of the published rule"),
        ({"nonfinite": "skip"}, "--nonfinite 'skip': must be one of skip_step, skip_parameter"),
        ({"energy_threshold": -1.0}, "--energy-threshold -1.0: must be a number of at least 0"),
        ({"max_gap": 5, "update_proj_gap": 6}, "--max-gap 5: must be at least --update-proj-gap, which is 6"),
        ({"seed": -1}, "--seed -1"),
        ({"vocab_size": 255}, "--vocab-size 255: tokens are bytes"),
        ({"seq": 65}, "--seq 65: the model of 'nano' takes at most 64 tokens"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_preset(**{"preset": "nano", **options})


# -- telemetry ------------------------------------------------------------------------------------------------------

RECORD = StepRecord(3, 2.5, 0.01, 1.0, 1000.0, 2**30, 28, ("a", "b"), 0, 1)


def test_numbers_that_are_not_finite_are_null_in_the_metrics(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(replace(RECORD, loss=math.nan, grad_norm=math.inf))
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["loss"], record["grad_norm"], record["lr"]) == (None, None, 0.01)
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title="nothing finite", bigram=2.4)


def test_output_that_is_no_terminal_gets_a_plain_line_every_so_many_steps() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    with Display(console, "tiny", steps=100, done=0, every=5) as display:
        for step in range(1, 13):
            display.update(replace(RECORD, step=step, val_loss=2.25 if step == 7 else None))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split("/")[0] for line in lines] == ["step   5", "step   7", "step  10"]
    assert lines[-1].endswith("loss 2.500  validation 2.250  1,000 tokens/s  1.00 GiB  28 refreshes")


def test_skipped_steps_are_shown_once_there_are_some() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with Display(console, "tiny", steps=9, done=0, every=1) as display:
        display.update(RECORD)
        display.update(replace(RECORD, skipped_steps=2))
    first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "skipped" not in first
    assert "2 steps skipped" in second


def test_a_terminal_gets_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with Display(console, "tiny qgalore", steps=9, done=0, every=1) as display:
        display.update(RECORD)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/9" in printed
    assert "28 refreshes" in printed
