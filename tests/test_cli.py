"""The command: help, options, exit status, and errors without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qgalore_compile import pretrain as job
from qgalore_compile.cli import app
from qgalore_compile.train_config import TrainConfig

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [*arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one two three two one three three one two " * 40)
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configs that `train` was called with; nothing is trained."""
    configs: list[TrainConfig] = []

    def pretrain(config: TrainConfig) -> Any:
        configs.append(config)
        return job.TrainResult(False, 1, 1, 1.9, 2.0, 1.0, 1.0, 1, (1,), 0, 0)

    monkeypatch.setattr(job, "pretrain", pretrain)
    return configs


def test_help_lists_the_subcommand_and_its_options() -> None:
    assert "train" in run("--help").output
    printed = run("train", "--help").output
    for option in ("--preset", "--optimizer", "--backend", "--resume", "--update-proj-gap", "--accumulate", "--untied"):
        assert option in printed
    assert "130" in printed


def test_help_does_not_wait_for_dynamo_and_matplotlib() -> None:
    code = "import sys, qgalore_compile.cli; sys.exit(bool({'torch._dynamo', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_options_mean_the_tiny_preset(trained: list[TrainConfig]) -> None:
    assert run("train").exit_code == 0
    assert trained == [TrainConfig.from_preset("tiny")]


def test_options_arrive(trained: list[TrainConfig]) -> None:
    arguments = "--preset 60m --steps 7 --batch 3 --seq 99 --accumulate 2 --lr 0.5 --rank 16 --update-proj-gap 11 "
    arguments += "--scale 0.75 --optimizer galore --backend inductor --dtype bfloat16 --data text --out there --seed 4 "
    arguments += "--tied --eval-every 2 --eval-tokens 1000 --log-every 3 --checkpoint-every 5 --refresh power "
    arguments += "--power-iterations 3 --moments-on-refresh rotate "
    arguments += "--similarity official --weight-decay 0.125 --max-grad-norm 1.5 --vocab-size 300 --device cpu "
    arguments += "--max-gap 44 --no-stagger --trigger similarity --energy-threshold 0.5 "
    arguments += "--nonfinite skip_parameter"
    assert run("train", *arguments.split()).exit_code == 0
    assert trained == [
        TrainConfig(
            preset="60m", steps=7, batch=3, seq=99, accumulate=2, lr=0.5, rank=16, update_proj_gap=11, scale=0.75,
            optimizer="galore", backend="inductor", dtype="bfloat16", data="text", out="there", seed=4, tied=True,
            eval_every=2, eval_tokens=1000, log_every=3, checkpoint_every=5, refresh="power",
            power_iterations=3, moments_on_refresh="rotate",
            similarity="official", weight_decay=0.125, max_grad_norm=1.5, vocab_size=300, device="cpu",
            max_gap=44, stagger=False, trigger="similarity", energy_threshold=0.5,
            nonfinite="skip_parameter",
        )
    ]  # fmt: skip


@pytest.mark.parametrize("val_loss", [1.9, 2.1])
def test_exit_status_is_the_verdict(monkeypatch: pytest.MonkeyPatch, val_loss: float) -> None:
    result = job.TrainResult(False, 1, 1, val_loss, 2.0, 1.0, 1.0, 1, (1,), 0, 0)
    monkeypatch.setattr(job, "pretrain", lambda config: result)
    assert run("train").exit_code == (0 if val_loss < 2 else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "2b"], "no preset is called '2b'"),
        (["--lr", "-1"], "--lr -1.0: must be a number above 0"),
        (["--data", "/nowhere/at/all"], "--data /nowhere/at/all: no such file or folder"),
        (["--resume", "--out", "/nowhere/at/all"], "nothing to resume: /nowhere/at/all/checkpoint.pt does not exist"),
    ],
)
def test_user_errors_are_one_line_and_exit_status_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    result = run("train", *arguments, *out)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


def test_unwritable_output_is_a_user_error(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("train", "--data", str(text), "--seq", "16", "--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 2
    assert "Not a directory" in result.stderr


def test_option_that_does_not_exist_exits_with_status_2() -> None:
    assert run("train", "--optimizer", "sgd").exit_code == 2
    assert run("train", "--no-such-option").exit_code == 2


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: TrainConfig) -> None:
        int("no number")  # raised by code that is not this package's

    monkeypatch.setattr(job, "pretrain", broken)
    result = run("train")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert 'int("no number")' in result.stderr
    assert "this is a bug of qgalore-compile" in result.stderr


def test_ctrl_c_that_reaches_the_command_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: TrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "pretrain", interrupted)
    result = run("train")
    assert result.exit_code == 130
    assert "stopped at once" in result.stderr


def test_version_is_printed() -> None:
    assert run("--version").output.startswith("qgalore-compile ")


@pytest.mark.slow
def test_example_script_is_the_command(text: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(text), "--backend", "eager", "--steps", "1", "--batch", "2", "--seq", "16"]
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), *arguments, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1, done.stderr
    assert "does NOT beat the bigram model" in done.stdout
    assert (tmp_path / "run" / "curves.png").exists()
