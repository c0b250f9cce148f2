"""`benchmarks/gpu.py` as far as it goes without a GPU: what it refuses, and that mistakes end it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from fake_cuda import emitted, fake_cuda
from rich.console import Console
from torch import Tensor
from torch._subclasses import FakeTensorMode
from typer.testing import CliRunner

from qgalore_compile import formats
from qgalore_compile.kernels.ir.evaluate import evaluate
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.triton.targets import Target
from qgalore_compile.training.ahead_of_time import floor

CPU = torch.device("cpu")


@pytest.fixture
def invoke(module: Callable[[str], Any]) -> Callable[..., Any]:
    """The command, run with arguments."""
    app = typer.Typer()
    app.command()(module("gpu").main)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(invoke: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "gpu.csv"
    result = invoke("--out", out)
    assert result.exit_code == 2
    assert "there is no device 'cuda'" in result.output
    assert not out.exists()


@pytest.mark.parametrize("shapes", ["512x1376", "axbxc", "512x1376x128,"])
def test_a_shape_that_is_none_is_refused(invoke: Callable[..., Any], shapes: str) -> None:
    result = invoke("--device", "cpu", "--quick", "--shapes", shapes)
    assert result.exit_code == 2
    assert "rows x columns x rank" in result.output


def test_after_a_wrong_result_nothing_is_measured_or_written(
    invoke: Callable[..., Any], module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finding = module("gpu_checks").Finding
    found = [finding("update 3x4", "codes", 0.0, 1.0), finding("update 3x4", "weight", float("nan"), 1.0)]
    monkeypatch.setattr(module("gpu"), "findings", lambda *_: iter(found))
    monkeypatch.setattr(module("gpu"), "ceilings", lambda *_, **__: pytest.fail("measured"))
    out = tmp_path / "gpu.csv"
    result = invoke("--device", "cpu", "--quick", "--out", out)
    assert result.exit_code == 1
    assert "WRONG  update 3x4, weight: nan" in result.output
    assert "2 comparisons, 1 wrong" in result.output
    assert not out.exists()


def test_a_check_that_raises_is_wrong_and_the_next_ones_run(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, said = module("gpu_checks"), list[str]()

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(checks, "random_bits", fails)
    monkeypatch.setattr(checks, "update", fails)
    monkeypatch.setattr(checks, "products", lambda *_: iter([checks.Finding("products", "error", 0, 1)]))
    found = list(checks.findings(checks.QUICK[:1], CPU, said.append))
    assert [each.ok for each in found] == [False, False, True]
    assert all("no such instruction" in text for text in said)


def test_random_bits_are_compared_bit_for_bit(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checks, off = module("gpu_checks"), 0

    def run(text: str, written: list[Tensor], read: list[Tensor], numbers: list[int]) -> None:
        program = BlockProgram.parse(text)
        names = [buffer.name for buffer in program.buffers]
        evaluate(
            program, dict(zip(names, [*read, *written], strict=True)), dict(zip(program.numbers, numbers, strict=True))
        )
        written[0][-1, -1] += off

    monkeypatch.setattr(checks.ops, "run_program", run)
    assert all(each.ok for each in checks.random_bits(CPU))
    off = 1
    assert [each.value for each in checks.random_bits(CPU)] == [1, 0] * 6


def test_the_table_keeps_median_and_deciles(module: Callable[[str], Any], tmp_path: Path) -> None:
    results = module("gpu_measure").Results(tmp_path / "new" / "gpu.csv")
    results.add("machine", "device", "", "NVIDIA H100 80GB HBM3")
    results.spread("update", "2x3 rank 1", "qgalore", [float(each) for each in range(11)], "ms")
    results.spread("kernels", "gemm_0", "qgalore", [7.0], "µs")
    results.write()
    with results.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["NVIDIA H100 80GB HBM3", "5", "7"]
    assert (rows[1]["low"], rows[1]["high"]) == ("1", "9")
    assert module("gpu_measure").slug(rows[0]["value"]) == "nvidia-h100-80gb-hbm3"


def test_sides_take_turns_within_a_round(module: Callable[[str], Any]) -> None:
    measure, calls = module("gpu_measure"), list[str]()
    times = measure.Clock(CPU).rounds({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == ["a", "b"] * (module("common").WARM_UP + 2)
    assert [len(each.device) for each in times.values()] == [2, 2]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="its device guard and hooks are real")
def test_generated_kernels_are_known_by_the_names_that_a_profile_shows(module: Callable[[str], Any]) -> None:
    measure = module("gpu_measure")

    def both(x: Tensor, dy: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
        weight = formats.dequantize_int8(*stored, 16, dtype=torch.bfloat16)
        return x @ weight.t(), dy @ weight

    with fake_cuda(), measure.watched() as kernels:
        with FakeTensorMode():
            stored = [part.to("cuda") for part in formats.quantize_int8(torch.randn(64, 32), 16)[:3]]
            x, dy = (torch.zeros(48, size, device="cuda", dtype=torch.bfloat16) for size in (32, 64))
        program = emitted(both, x, dy, *stored, backend="qgalore")
    assert list(kernels) == ["gemm_0", "gemm_1"]
    for name, kernel in kernels.items():
        assert f"def {name}(" in program.kernels()[name]
        assert not measure.writes_back(kernel)

    # What a profile says of them becomes a table beside what bounds them.
    gpu, clock, chip = module("gpu"), measure.Clock(CPU), Target.named("sm_90")
    bench = gpu.Bench(measure.Results(None), clock, 3, chip, Console(file=StringIO(), width=160))
    ceilings = {name: measure.Ceiling([1e12], "", None) for name in ("copy", "bf16", "tf32", "fp32")}
    profiled = {"gemm_0": [3.0, 5.0, 4.0], "gemm_1": [7.0] * 6, "fill": [1.0] * 3}
    settings = module("train_step").Settings("tiny", 1, 2, 32)
    gpu._kernels(bench, settings, kernels, profiled, ceilings)
    rows = {(row.what.split(",")[0], row.side, row.unit): row.value for row in bench.results.rows}
    name = "tiny-1layers: gemm_0 gemm-48x64x32"
    bound = floor(kernels["gemm_0"], measure.as_measured(chip, ceilings))
    assert rows[name, "qgalore", "µs"] == 4
    assert rows["tiny-1layers: gemm_1 gemm-48x32x64", "qgalore", "launches a step"] == 2
    assert rows[name, f"floor by {bound.limit}", "µs"] == pytest.approx(1e6 * bound.seconds)
    assert rows["tiny-1layers: all other kernels", "qgalore", "ms a step"] == pytest.approx(1e-3)
