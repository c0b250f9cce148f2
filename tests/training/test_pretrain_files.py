"""The files of a run: verified before anything changes, one process at a time, and whole whatever ends it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_support import NANO, nano_config, send_at, train
from rich.console import Console

from qgalore_compile import files
from qgalore_compile.files import lock_folder
from qgalore_compile.training import pretrain as job
from qgalore_compile.training import run as training
from qgalore_compile.training import telemetry
from qgalore_compile.training.checkpoint_file import load_checkpoint, save_checkpoint
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.llama import PRESETS
from qgalore_compile.training.pretrain import SavingError, pretrain, resumed_config
from qgalore_compile.training.run import Run
from qgalore_compile.training.telemetry import read_metrics


@pytest.fixture(autouse=True)
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", NANO)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return nano_config(tmp_path)


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def steps(config: TrainConfig) -> list[int]:
    return [record["step"] for record in read_metrics(Path(config.out, "metrics.jsonl"))]


# -- what a run goes on from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
def test_a_flipped_bit_is_refused_by_name_and_no_file_changes(config: TrainConfig, resume: bool) -> None:
    train(replace(config, steps=2))
    path = Path(config.out, "checkpoint.pt")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    path.write_bytes(damaged)
    before = contents(config.out)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint that can be read: it is damaged"):
        train(replace(config, resume=resume))
    assert contents(config.out) == before


SAVED = [
    (lambda s: s["model"].pop("norm.weight"), "model is another one than this run's: it lacks norm.weight"),
    (lambda s: s["model"].update(more=torch.ones(1)), "another one than this run's: it has more"),
    (lambda s: s["model"].update({"norm.weight": torch.ones(33)}), r"norm.weight is \(33,\) .*, not \(32,\)"),
    (lambda s: s["model"].update({"norm.weight": torch.ones(32).double()}), "norm.weight is .*float64, not .*float32"),
    (lambda s: s["model"].update({"norm.weight": 3}), "norm.weight is a int, not"),
    (lambda s: s["model"]["layers.0.mlp.up_proj.weight"].scale.fill_(torch.nan), "up_proj.weight: the saved scale"),
    (lambda s: s["model"]["layers.0.mlp.up_proj.weight"].offset.fill_(torch.inf), "the saved offset holds NaN, Inf"),
    (lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.9, 3.0)), r"betas must be in \[0, 1\)"),
    (lambda s: s["optimizer"]["state"][0]["schedule"].fill_(-7), "the saved schedule has clock -7"),
    (lambda s: s["optimizer"]["state"].pop(0), "the saved state has .*this optimizer needs"),
    (lambda s: s["scheduler"].update(last_epoch=1), "schedule of the learning rate is at 1, the run at 2"),
    (lambda s: s["scheduler"].update(base_lrs=["fast"] * 3), "schedule of the learning rate has base_lrs"),
    (lambda s: s["scheduler"].pop("_last_lr"), "schedule of the learning rate has"),
]


@pytest.mark.parametrize(("change", "message"), SAVED, ids=[message for _, message in SAVED])
def test_loading_is_all_or_nothing(config: TrainConfig, change: Any, message: str) -> None:
    """A file that is whole, and says what cannot be: neither model nor optimizer nor step changes."""
    train(replace(config, steps=2))
    path = Path(config.out, "checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    change(saved)
    save_checkpoint(path, saved)
    run = Run(config, load_corpus(config.data))
    run.advance()
    before = io.BytesIO()
    torch.save(run.state_dict(), before)
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(load_checkpoint(path))
    after = io.BytesIO()
    torch.save(run.state_dict(), after)
    assert after.getvalue() == before.getvalue()
    with pytest.raises(ValueError, match=rf"checkpoint\.pt: .*{message}.*choose another --out"):
        train(resumed_config(out=config.out))


ADAMW = [
    (lambda o: o["param_groups"][0].update(lr=-1.0), "saved parameter group 0: lr is -1.0"),
    (lambda o: o["param_groups"][0].update(betas=(0.9, 1.5)), "betas are"),
    (lambda o: o["param_groups"][0].pop("eps"), "has other keys than this run's"),
    (lambda o: o["param_groups"].pop(), "has other groups than this run's"),
    (lambda o: o["state"][0].pop("exp_avg"), "state of parameter 0 has"),
    (lambda o: o["state"][0].update(exp_avg=torch.zeros(3)), r"parameter 0: exp_avg is \(3,\)"),
    (lambda o: o["state"][0]["exp_avg_sq"].fill_(-1), "parameter 0: exp_avg_sq holds"),
    (lambda o: o["state"][0]["step"].fill_(0.5), "parameter 0: step is"),
    (lambda o: o["state"].update({99: {}}), "state of what is no parameter"),
]


@pytest.mark.parametrize(("change", "message"), ADAMW, ids=[message for _, message in ADAMW])
def test_adamw_s_state_is_looked_at_as_well(config: TrainConfig, change: Any, message: str) -> None:
    config = replace(config, optimizer="adamw", steps=1)
    train(config)
    saved = torch.load(Path(config.out, "checkpoint.pt"), weights_only=True)
    change(saved["optimizer"])
    run = Run(config, load_corpus(config.data))
    weights = [parameter.clone() for parameter in run.model.parameters()]
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(saved)
    assert all(map(torch.equal, weights, run.model.parameters()))


def test_another_run_s_checkpoint_is_refused_in_words(config: TrainConfig) -> None:
    train(replace(config, steps=1))
    train(replace(config, steps=1, rank=4, out=config.out + "-other"))
    shutil.copy(config.out + "-other/checkpoint.pt", config.out)
    with pytest.raises(ValueError, match=r"--rank 8 does not fit .*checkpoint\.pt, which was trained with 4"):
        train(replace(config, resume=True))


def test_settings_that_are_none_of_this_version_are_refused_in_words(config: TrainConfig) -> None:
    train(replace(config, steps=1))
    path = Path(config.out, "checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    saved["config"]["batch"] = "many"
    save_checkpoint(path, saved)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: its settings are none of this version"):
        resumed_config(out=config.out)


def test_a_text_that_has_moved_is_gone_on_with(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, steps=2))
    (tmp_path / "text.txt").rename(tmp_path / "elsewhere.txt")
    with pytest.raises(ValueError, match=r"text\.txt: no such file .*if it has moved, name its place with --data"):
        train(resumed_config(out=config.out, steps=4))
    result, _ = train(resumed_config(out=config.out, steps=4, data=str(tmp_path / "elsewhere.txt")))
    assert result.steps == 4
    assert load_checkpoint(Path(config.out, "checkpoint.pt"))["config"]["data"].endswith("elsewhere.txt")


# -- one process, whole files ------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_and_names_the_first(config: TrainConfig) -> None:
    seen: list[str] = []

    def second(record: telemetry.StepRecord) -> None:
        if record.step == 2:
            for resume in (False, True):
                with pytest.raises(
                    ValueError, match=rf"is in use: process {os.getpid()} on .*choose another --out"
                ) as e:
                    train(replace(config, resume=resume))
                seen.append(str(e.value))

    train(config, on_step=second)
    assert len(seen) == 2
    assert steps(config) == list(range(1, 13))
    assert sorted(os.listdir(config.out)) == [
        "checkpoint.pt",
        "curves.png",
        "metrics.jsonl",
        "result.json",
        "schedule.png",
    ]


@pytest.mark.parametrize("fault", [{"data": "/nowhere"}, {"device": "warp"}, {"batch": 2**31 - 1}])
def test_a_run_that_cannot_begin_leaves_no_folder(config: TrainConfig, fault: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"/nowhere|--device warp|needs at least"):
        train(replace(config, **fault))
    assert not Path(config.out).exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "result.json", "curves.png"])
def test_what_stands_in_the_place_of_a_file_is_told_before_the_first_step(config: TrainConfig, name: str) -> None:
    Path(config.out, name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{name} is a folder, where a file belongs"):
        train(config)
    assert os.listdir(config.out) == [name]


def test_a_new_run_that_does_not_get_through_a_step_leaves_the_finished_one(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(config, steps=2))
    before = contents(config.out)

    def no_compiler(*_: object) -> None:
        raise RuntimeError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_step", lambda *_: no_compiler)
        with pytest.raises(RuntimeError, match="no compiler"):
            train(config)
    assert contents(config.out) == before


def test_a_killed_new_run_leaves_no_checkpoint_of_the_one_before_beside_its_own_metrics(config: TrainConfig) -> None:
    train(replace(config, steps=2))

    def killed(record: telemetry.StepRecord) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        train(config, on_step=killed)
    assert sorted(os.listdir(config.out)) == ["metrics.jsonl"]
    assert steps(config) == [1]


def test_bad_lines_of_the_metrics_are_told_and_dropped_on_resume(config: TrainConfig) -> None:
    train(replace(config, steps=4))
    path = Path(config.out, "metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff\xfe\n" + lines[1] + lines[2] + b"{}\n" + lines[3] + b'{"step": 5, "lo')
    _, printed = train(resumed_config(out=config.out, steps=6))
    assert steps(config) == [1, 2, 3, 4, 5, 6]
    for told in ("line 2 is no JSON; dropped", "line 5 has no 'step'; dropped", "line 7 ends in the middle; dropped"):
        assert told in printed


def test_metrics_are_synced_before_a_checkpoint_counts_on_them(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, save = telemetry.MetricsLog.sync, save_checkpoint
    monkeypatch.setattr(telemetry.MetricsLog, "sync", lambda self: (order.append("metrics"), sync(self)))
    monkeypatch.setattr(job, "save_checkpoint", lambda path, state: (order.append("checkpoint"), save(path, state)))
    train(replace(config, steps=4, checkpoint_every=2))
    assert order == ["metrics", "checkpoint"] * 2


# -- what ends a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_is_answered_with_a_checkpoint_words_and_its_status(
    config: TrainConfig, number: signal.Signals, status: int
) -> None:
    result, printed = train(config, on_step=send_at(3, number))
    assert (result.exit_status, result.stopped_by, result.steps) == (status, number.name, 3)
    assert json.loads(Path(config.out, "result.json").read_text())["stopped_by"] == number.name
    assert f"Stopped and saved at step 3. To continue: qgalore train --resume --out {config.out}" in printed
    result, _ = train(resumed_config(out=config.out))
    assert (result.steps, result.stopped_by, steps(config)) == (12, None, list(range(1, 13)))


def test_a_signal_after_the_last_step_lets_the_run_end(config: TrainConfig) -> None:
    result, _ = train(replace(config, steps=2), on_step=send_at(2, signal.SIGTERM))
    assert (result.interrupted, result.exit_status, result.stopped_by) == (False, int(not result.beats_bigram), None)


@pytest.mark.parametrize(("errno", "status"), [(32, 141), (28, 74)])
def test_output_that_is_lost_ends_the_run_with_a_checkpoint(
    config: TrainConfig, errno: int, status: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Head(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("step  2/"):
                raise OSError(errno, os.strerror(errno))
            return super().write(text)

    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich's answer is for standard output
    result = pretrain(replace(config, log_every=1), console=Console(file=Head(), width=200))
    assert (result.exit_status, result.steps) == (status, 2)
    assert load_checkpoint(Path(config.out, "checkpoint.pt"))["step"] == 2
    told = capfd.readouterr().err
    assert f"the output cannot be written ({os.strerror(errno)}); stopping" in told
    assert f"Stopped and saved at step 2. To continue: qgalore train --resume --out {config.out}" in told


def test_output_that_is_lost_before_the_first_step_changes_nothing(
    config: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, os.strerror(28))

    result = pretrain(config, console=Console(file=Full()))
    assert (result.exit_status, result.steps) == (74, 0)
    assert "Stopped before the first step; nothing was changed." in capfd.readouterr().err
    assert not Path(config.out).exists()


def test_a_full_disk_is_told_with_what_there_is_to_go_on_from(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = save_checkpoint

    def full(path: Path, state: dict[str, Any]) -> None:
        if state["step"] > 4:
            raise OSError(28, "No space left on device", str(path))
        save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(job, "save_checkpoint", full)
        message = r"cannot write .*checkpoint\.pt: No space left on device; the checkpoint of step 4 is whole: "
        with pytest.raises(SavingError, match=f"{message}.* qgalore train --resume --out {config.out}"):
            train(replace(config, checkpoint_every=2))
    train(resumed_config(out=config.out))
    assert steps(config) == list(range(1, 13))


def test_a_full_disk_under_the_metrics_saves_no_checkpoint_that_lacks_their_line(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = telemetry.os.write

    def full(descriptor: int, data: bytes) -> int:
        if data.startswith(b'{"step": 6,'):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(telemetry.os, "write", full)
        with pytest.raises(
            SavingError, match=r"cannot write .*metrics\.jsonl: No space left.*the checkpoint of step 4"
        ):
            train(replace(config, checkpoint_every=2))
    assert load_checkpoint(Path(config.out, "checkpoint.pt"))["step"] == 4
    train(resumed_config(out=config.out))
    assert steps(config) == list(range(1, 13))


def test_partial_files_of_a_killed_process_go_with_the_next_run(config: TrainConfig) -> None:
    Path(config.out).mkdir()
    left = Path(config.out, ".checkpoint.pt.0123456789abcdef.partial")
    left.write_bytes(b"half")
    with lock_folder(Path(config.out)), pytest.raises(ValueError, match="is in use"):
        train(config)
    assert left.exists()  # it may be being written
    train(replace(config, steps=1))
    assert not left.exists()
    assert files.LOCK not in os.listdir(config.out)
