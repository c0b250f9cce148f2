"""The command: help, options, exit status, and errors without a traceback."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import ShortenTraceback
from torch._inductor.exc import InvalidCxxCompiler
from typer.testing import CliRunner, Result

from qgalore_compile import cli
from qgalore_compile.cli import app
from qgalore_compile.training import pretrain as job
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.stopping import Stopped

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
    arguments += "--nonfinite skip_parameter --plain-lr 0.25 --rule factored --momentum-format 8bit"
    assert run("train", *arguments.split()).exit_code == 0
    assert trained == [
        TrainConfig(
            preset="60m", steps=7, batch=3, seq=99, accumulate=2, lr=0.5, rank=16, update_proj_gap=11, scale=0.75,
            optimizer="galore", backend="inductor", dtype="bfloat16", data="text", out="there", seed=4, tied=True,
            eval_every=2, eval_tokens=1000, log_every=3, checkpoint_every=5, refresh="power",
            power_iterations=3, moments_on_refresh="rotate",
            similarity="official", weight_decay=0.125, max_grad_norm=1.5, vocab_size=300, device="cpu",
            max_gap=44, stagger=False, trigger="similarity", energy_threshold=0.5,
            nonfinite="skip_parameter", plain_lr=0.25, rule="factored", momentum_format="8bit",
        )
    ]  # fmt: skip


def test_a_rank_of_zero_hands_the_rule_all_of_the_gradient(trained: list[TrainConfig]) -> None:
    assert run("train", "--rank", "0", "--rule", "muon").exit_code == 0
    assert trained[0].projection["rank"] is None
    assert TrainConfig.from_preset(rank=3).projection["rank"] == 3


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", ""], "--data '': names no file or folder"),
        (["--out", ""], "--out '': names no file or folder"),
        (["--data", "/dev/zero"], "--data /dev/zero is a device; give a text file"),
        (["--device", "warp"], "--device warp: "),
        (["--device", "meta"], "--device meta: "),
        (["--batch", "2000000000"], "this run needs at least"),
        (["--batch", "1" + "0" * 30], "must be at most 2147483647"),
        (["--vocab-size", "2000000000"], "this run needs at least"),
        (["--update-proj-gap", "1" + "0" * 30], "must be at most 2147483647"),
        (["--lr", "1e300"], "--lr 1e+300: must be a number above 0, in float32 too"),
        (["--lr", "1e-300"], "--lr 1e-300: must be a number above 0, in float32 too"),
        (["--weight-decay", "inf"], "--weight-decay inf"),
    ],
    ids=lambda given: "".join(given)[:24] if isinstance(given, list) else "",
)
def test_what_cannot_be_is_said_in_a_line(arguments: list[str], message: str, text: Path, tmp_path: Path) -> None:
    given = dict(zip(["--data", "--out"], [str(text), str(tmp_path / "run")], strict=True))
    given.update([arguments])  # type: ignore[list-item]
    result = run("train", "--seq", "16", *(word for pair in given.items() for word in pair))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_named_pipe_as_data_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = run("train", "--data", str(tmp_path / "pipe"), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "is a named pipe; give a text file or a folder of text files: what a pipe brings, save to a file" in (
        result.stderr
    )


class NoCompilerError(ShortenTraceback, RuntimeError):
    """As the backend raises it, Dynamo's advice appended."""

    __module__ = "qgalore_compile.kernels.cpp.launch"


def wrapped(cause: Exception) -> Exception:
    error = RuntimeError("a compiler's own words")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (
            NoCompilerError("found no C++ compiler\n\nSet TORCHDYNAMO_VERBOSE=1", first_useful_frame=None),
            2,
            "error: found no C++ compiler",
        ),
        (wrapped(InvalidCxxCompiler()), 2, "error: No working C++ compiler found"),
        (job.SavingError("cannot write x: No space left on device"), 74, "error: cannot write x"),
        (OSError(28, "No space left on device", "cache"), 74, "error: cache: No space left on device"),
        (wrapped(OSError(28, "No space left on device", "cache")), 74, "error: cache: No space left on device"),
        (OSError(13, "Permission denied", "run"), 2, "error: run: Permission denied"),
        (BrokenPipeError(32, "Broken pipe"), 141, "error: the output cannot be written (Broken pipe)"),
        (MemoryError(), 2, "error: not enough memory (no words)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "not enough memory (CUDA out of memory. Tried)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory"),
        (Stopped(signal.SIGTERM), 143, "stopped at once by SIGTERM; the last checkpoint, if any, is as it was"),
        (Stopped(signal.SIGHUP), 129, "stopped at once by SIGHUP"),
    ],
    ids=str,
)
def test_what_ends_a_run_has_a_line_and_a_status(
    error: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr(job, "pretrain", failing)
    result = run("train")
    assert result.exit_code == status
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), RuntimeError("x"), AssertionError(), TypeError("x")])
def test_no_bug_ends_with_the_status_of_a_verdict(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr(job, "pretrain", failing)
    # raised by this file, which is not the package's
    assert run("train").exit_code == 70


def test_help_names_every_exit_status() -> None:
    printed = run("train", "--help").output
    for status in ("0", "1", "2", "70", "74", "129", "130", "141", "143"):
        assert f" {status} " in printed.replace("\n", " ")


def test_a_stream_that_is_not_utf_8_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli._print_what_the_encoding_has()
    print("α – ok", flush=True)
    assert raw.getvalue() == b"? ? ok\n"
    monkeypatch.undo()


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
