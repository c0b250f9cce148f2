"""``qgalore export``: the model of a run, which transformers loads and which evaluates as the run did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pretrain_support import NANO, nano_config, train
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import qgalore_compile as qg
from qgalore_compile.cli import app
from qgalore_compile.exports import load_quantised
from qgalore_compile.exports.run_folder import AsTransformers, calibration_batches, export_run, load_run
from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.llama import PRESETS
from qgalore_compile.training.run import evaluate


@pytest.fixture(autouse=True)
def _nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", NANO)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, tied."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", NANO)
        train(nano_config(folder, steps=3, tied=True))
    return folder / "run"


def command(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["export", *map(str, arguments)])


def test_the_loaded_model_is_the_one_that_was_evaluated(run_folder: Path) -> None:
    config, model = load_run(run_folder)
    told = json.loads((run_folder / "result.json").read_text())["val_loss"]
    assert evaluate(model, load_corpus(config.data).validation, config) == pytest.approx(told, abs=1e-6)


def test_transformers_loads_what_the_command_writes(run_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    result = command(run_folder, tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in result.output
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.arange(64).view(2, 32)
    torch.testing.assert_close(loaded(tokens).logits.detach(), load_run(run_folder)[1](tokens), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_the_default(run_folder: Path, tmp_path: Path) -> None:
    assert command(run_folder, tmp_path / "out").exit_code == 0
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_four_bits_are_calibrated_on_the_runs_text(run_folder: Path, tmp_path: Path) -> None:
    arguments = ["--bits", 4, "--group-size", 16, "--compensation", "eora", "--rank", 4, "--sequences", 9]
    result = command(run_folder, tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    config, model = load_run(run_folder)
    named = AsTransformers(qg.dequantize_(model)).requires_grad_(False)  # type: ignore[arg-type]
    tokens = torch.arange(32).view(1, 32)
    before = named(tokens)
    named.load_state_dict(load_quantised(tmp_path / "out", dtype=torch.float32))
    assert 0 < float((named(tokens) - before).norm()) < 0.1 * float(before.norm())
    assert [len(batch) for batch in calibration_batches(config, None, 9)] == [4, 4, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "4", "--compensation", "eora", "--rank", "999"], "rank 999 is not in 1 … 32"),
        (
            ["--bits", "4", "--compensation", "eora", "--rank", "4", "--data", "/nowhere"],
            "--data /nowhere: no such file",
        ),
        (["--bits", "5"], "bits=5: must be 4"),
        (["--max-shard-size", "big"], "max_shard_size='big'"),
    ],
    ids=["rank", "data", "bits", "size"],
)
def test_what_the_user_can_repair_is_a_line(arguments: list[str], words: str, run_folder: Path, tmp_path: Path) -> None:
    result = command(run_folder, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    result = command(tmp_path, tmp_path / "out")
    assert result.exit_code == 2
    assert f"{tmp_path} holds no checkpoint.pt" in result.stderr.replace("\n", "")


def test_a_damaged_checkpoint_is_not_believed(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    damaged = bytearray((run_folder / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "run" / "checkpoint.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_names_the_options() -> None:
    printed = command("--help").output
    for word in ("--bits", "--compensation", "--rank", "--sequences", "--max-shard-size", " run ", " out ", " 74 "):
        assert word in printed
