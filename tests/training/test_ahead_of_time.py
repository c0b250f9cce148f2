"""The GPU kernels of a preset's step, compiled without a GPU, and what is said of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qgalore_compile.cli import app
from qgalore_compile.kernels.ir.program import BlockProgram
from qgalore_compile.kernels.triton.ahead import CompileError
from qgalore_compile.kernels.triton.gemm import Product
from qgalore_compile.kernels.triton.kernels import Kernel
from qgalore_compile.kernels.triton.looked_at import compiled
from qgalore_compile.kernels.triton.targets import Target, UnknownTargetError
from qgalore_compile.kernels.triton.tiling import REGION_ELEMENTS
from qgalore_compile.training.ahead_of_time import LAYERS, Row, compile_ahead, row, table, traced

pytestmark = pytest.mark.triton

PROJECTED = 7 * LAYERS
PLAIN = 2 * LAYERS + 3
"""Norms, embedding and head: in bfloat16 they draw random bits, however small they are."""


@pytest.fixture(scope="module")
def kernels() -> dict[Kernel, int]:
    """Of `tiny`, for an H100."""
    return traced("tiny", Target.named("sm_90"), torch.bfloat16, batch=2, seq=32)


def kinds(kernels: dict[Kernel, int]) -> dict[str, dict[Kernel, int]]:
    found: dict[str, dict[Kernel, int]] = {"region": {}, "write-back": {}, "product": {}}
    for kernel, calls in kernels.items():
        work = kernel.work
        kind = "region" if isinstance(work, BlockProgram) else "write-back" if work.program.epilogue else "product"
        found[kind][kernel] = calls
    return found


def test_a_step_calls_one_region_and_one_write_back_for_each_projected_weight(kernels: dict[Kernel, int]) -> None:
    found = kinds(kernels)
    assert sum(found["write-back"].values()) == PROJECTED
    assert sum(found["region"].values()) == PROJECTED + PLAIN
    # X of the forward, the input's gradient, and one of R's two products
    assert sum(found["product"].values()) == 3 * PROJECTED


def test_equal_layers_share_kernels(kernels: dict[Kernel, int]) -> None:
    # q, k, v and o are square; gate and up; down
    assert sorted(kinds(kernels)["write-back"].values()) == [LAYERS, 2 * LAYERS, 4 * LAYERS]


def test_a_regions_elements_are_read_and_written_16_bytes_at_a_time(kernels: dict[Kernel, int]) -> None:
    (kernel, *_) = kinds(kernels)["region"]
    assert isinstance(kernel.work, BlockProgram)
    binary = compiled(kernel, Target.named("sm_90"))
    sizes = {"u8": 1, "bf16": 2, "f32": 4}
    for widths, without in ((binary.loads, "out"), (binary.stores, "in")):
        elements = [each for each in kernel.work.buffers if each.extent == "element" and each.access != without]
        assert widths[16] == sum(REGION_ELEMENTS * sizes[each.memory] for each in elements) // 16
        assert set(widths) <= {16, 8, 4, 1}  # a count in int64, a value for each group, a scalar, a bool
    assert not binary.stack
    assert not binary.fp64


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_kernel_of_a_step_compiles_without_spills(tmp_path: Path, target: str) -> None:
    names: list[str] = []
    rows = compile_ahead("tiny", target, tmp_path, batch=2, seq=32, progress=names.append)
    assert [row.kernel for row in rows] == names
    assert not [row for row in rows if row.spills]
    assert all(row.tensor for row in rows if row.kernel.split("-")[1] == "gemm")
    assert all(row.dram <= 1.1 * row.bytes for row in rows if "write-back" in row.kernel)
    assert all(row.bytes <= row.issued and row.floor_us > 0 and 0 < row.occupancy <= 1 for row in rows)
    for name in names:
        assert {path.suffix for path in tmp_path.glob(f"{name}.*")} == {".py", ".ptx", ".cubin", ".asm"}
    with (tmp_path / "kernels.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [each["kernel"] for each in kept] == names
    assert int(kept[0]["registers"]) == rows[0].registers


def test_a_kernels_row_counts_its_operations_and_bytes(kernels: dict[Kernel, int]) -> None:
    kernel = next(each for each in kinds(kernels)["product"])
    found = row(kernel, compiled(kernel, Target.named("sm_90")), "name", 3)
    assert isinstance(kernel.work, Product)
    m, n, k = (size for size in kernel.work.sizes if size is not None)
    assert found.operations == 2 * m * n * k
    codes, scales = n * k, 2 * 4 * n * -(-k // 256)
    assert found.bytes == 2 * m * k + codes + scales + 2 * m * n
    assert found.what.startswith("bf16 × 8-bit")
    assert (found.calls, found.limit) == (3, "bytes")


def test_tf32_is_asked_for() -> None:
    before = torch.get_float32_matmul_precision()
    for tf32, precision in ((False, "ieee"), (True, "tf32")):
        found = traced("tiny", Target.named("sm_90"), torch.float32, tf32=tf32, batch=1, seq=16)
        products = [each.work for each in found if not isinstance(each.work, BlockProgram)]
        assert {each.precision for each in products} == {precision}
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "sm_70"}, "sm_80"),
        ({"preset": "8b"}, "choose one of tiny"),
        ({"dtype": "float16"}, "bfloat16 or float32, got 'float16'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_traced(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    given = {"preset": "tiny", "target": "sm_90", **options}
    with pytest.raises(ValueError, match=message):
        compile_ahead(given.pop("preset"), given.pop("target"), tmp_path / "out", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_the_users_error(tmp_path: Path) -> None:
    assert issubclass(UnknownTargetError, ValueError)
    ran = CliRunner().invoke(app, ["compile", "--target", "h100", "--preset", "tiny", "--out", str(tmp_path)])
    assert ran.exit_code == 2
    assert "sm_90" in ran.output


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CompileError("gemm", "sm_90", "no")

    monkeypatch.setattr("qgalore_compile.kernels.triton.looked_at.compiled", refuse)
    given = ["compile", "--target", "sm_90", "--preset", "tiny", "--batch", "1", "--seq", "16", "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, given)
    assert ran.exit_code == 2
    assert "gemm does not compile for sm_90: no" in ran.output


def line(kernel: str, *, registers: int = 100, spills: int = 0) -> Row:
    """A kernel's line of the table."""
    return Row(
        kernel,
        "bf16 × 8-bit",
        1,
        registers,
        spills,
        0,
        0.5,
        4,
        16,
        4,
        10,
        20,
        10,
        100,
        1.0,
        "bytes",
        "64×256×32, 8 warps, 4 stages",
        "",
    )


def test_a_spilling_kernel_shows_in_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = line("00-gemm", registers=255, spills=8)
    monkeypatch.setattr("qgalore_compile.training.ahead_of_time.compile_ahead", lambda *_, **__: [given])
    ran = CliRunner().invoke(app, ["compile", "--target", "sm_90", "--preset", "tiny", "--out", str(tmp_path)])
    assert ran.exit_code == 1
    assert "00-gemm" in ran.output


def test_the_table_names_every_kernel() -> None:
    rows = [line(f"0{i}-gemm") for i in (0, 1)]
    assert table(rows, "sm_90", "tiny").row_count == 2
