"""What a model loses when it is exported: held-out loss of floats, 4 bits, and 4 bits with LoRC and EoRA.

    .venv/bin/python benchmarks/export_quality.py --steps 800

Trains a preset as ``qgalore train`` does, into a folder under runs/, or takes the finished run that is there; one that
was cut off goes on.  Then each case is exported to a file, read back, and evaluated in float32 on the same held-out
bytes: the difference to the model as it was trained is what the form of the file costs.  EoRA is calibrated on windows
of the training part.  Differences this small are told apart by pairs: of the loss of each window the difference to the
trained model's is taken, and the standard error of its mean stands beside it.

Writes `results/export-quality.json` and prints a table.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from backends import RESULTS, machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import qgalore_compile as qg
from qgalore_compile.exports import load_quantised
from qgalore_compile.exports.run_folder import calibration_batches, load_run
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus, validation_batches
from qgalore_compile.training.llama import Llama
from qgalore_compile.training.pretrain import CHECKPOINT, RESULT, pretrain, resumed_config

RUNS = Path(__file__).parents[1] / "runs"


def trained(preset: str, steps: int, backend: str, folder: Path) -> tuple[TrainConfig, Llama]:
    """The run in ``folder``, trained to its end if it is not there."""
    asked: dict[str, Any] = {"steps": steps, "backend": backend, "out": str(folder)}
    if (folder / CHECKPOINT).exists():
        config = resumed_config(**asked)
        if config.preset != preset:
            raise ValueError(f"{folder} holds a run of {config.preset}; give another --folder")
        done = (folder / RESULT).exists() and json.loads((folder / RESULT).read_text())["steps"] >= steps
    else:
        config, done = TrainConfig.from_preset(preset, **asked), False
    if not done:
        pretrain(config)
    return load_run(folder)


@torch.no_grad()
def window_losses(model: Llama, config: TrainConfig, tokens: Tensor, count: int) -> Tensor:
    """Loss of each held-out window, nats per byte, float64."""
    model.eval()
    losses = [
        torch.nn.functional.cross_entropy(model(inputs).float().transpose(1, 2), targets, reduction="none").mean(1)
        for inputs, targets in validation_batches(tokens, batch=config.batch, seq=config.seq, count=count)
    ]
    return torch.cat(losses).double()


def cases(ranks: list[int], groups: list[int]) -> list[dict[str, Any]]:
    floats: list[dict[str, Any]] = [{"dtype": "float32"}, {"dtype": "bfloat16"}]
    compensations: list[dict[str, Any]] = [{}] + [
        {"compensation": kind, "rank": rank} for rank in ranks for kind in ("lorc", "eora")
    ]
    return floats + [{"bits": 4, "group_size": group, **each} for group in groups for each in compensations]


def title(case: dict[str, Any]) -> str:
    if "bits" not in case:
        return str(case["dtype"])
    kind = f" + {case['compensation']}, rank {case['rank']}" if "rank" in case else ""
    return f"4-bit, groups of {case['group_size']}{kind}"


def measured(model: Llama, case: dict[str, Any], calibration: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that the file of a case gives back, in float32; bytes of the file and seconds that it took."""
    given = {"calibration": calibration} if case.get("compensation") == "eora" else {}
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "model.safetensors", time.perf_counter()
        qg.export(model, path, **case, **given)
        told = {"seconds": time.perf_counter() - started, "bytes": path.stat().st_size}
        return load_quantised(path, dtype=torch.float32) if "bits" in case else load_file(path), told


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main(
    preset: Annotated[str, typer.Option(help="Model to train.")] = "tiny",
    steps: Annotated[int, typer.Option(help="Of its training.")] = 800,
    backend: Annotated[str, typer.Option(help="Of its training.")] = "qgalore",
    folder: Annotated[Path, typer.Option(help="Of its run.")] = RUNS / "export-quality",
    ranks: Annotated[str, typer.Option(help="Of compensations, by comma.")] = "8,32",
    groups: Annotated[str, typer.Option(help="Sizes of groups, by comma.")] = "512,128,32",
    sequences: Annotated[int, typer.Option(help="Of calibration, each as long as those of training.")] = 128,
    windows: Annotated[int, typer.Option(help="Held-out windows.")] = 1024,
) -> None:
    config, model = trained(preset, steps, backend, folder)
    tokens = load_corpus(config.data).validation
    base = window_losses(model, config, tokens, windows)
    probe = qg.dequantize_(load_run(folder)[1])  # floats, to load each case into
    rows: list[dict[str, Any]] = [{"case": "as trained, INT8", "loss": float(base.mean())}]
    table = Table("case", "loss", "difference", "± standard error", "bytes", "s")
    table.add_row(rows[0]["case"], f"{rows[0]['loss']:.4f}", "", "", "", "")
    for case in cases(numbers(ranks), numbers(groups)):
        state, row = measured(model, case, list(calibration_batches(config, None, sequences)))
        probe.load_state_dict(state)
        losses = window_losses(probe, config, tokens, windows)
        apart = losses - base
        row |= {"case": title(case), **case, "loss": float(losses.mean()), "difference": float(apart.mean())}
        row["standard_error"] = float(apart.std() / math.sqrt(len(apart)))
        rows.append(row)
        table.add_row(
            row["case"], f"{row['loss']:.4f}", f"{row['difference']:+.4f}", f"{row['standard_error']:.4f}",
            f"{row['bytes']:,}", f"{row['seconds']:.1f}",
        )  # fmt: skip
    Console().print(table)
    told = json.loads((folder / RESULT).read_text())
    result = {
        "preset": preset, "steps": steps, "run": told, "windows": len(base), "seq": config.seq,
        "calibration_tokens": sequences * config.seq, "rows": rows, "machine": machine(),
        "command": shlex.join([
            "benchmarks/export_quality.py", "--preset", preset, "--steps", str(steps), "--backend", backend,
            "--ranks", ranks, "--groups", groups, "--sequences", str(sequences), "--windows", str(windows),
        ]),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "export-quality.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
