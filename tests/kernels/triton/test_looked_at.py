"""The tile that is taken is the first that a compiler keeps in registers, whatever the model thinks of its margins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from kernels_support import load, program

pytest.importorskip("triton")

from triton_products import up

from qgalore_compile.formats.nf4 import NF4
from qgalore_compile.kernels.ir.arithmetic import InProgram, Value
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.triton import ahead, looked_at
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton.ahead import Binary, CompileError
from qgalore_compile.kernels.triton.kernels import (
    Kernel,
    choose_together,
    looking,
    made_for,
    product_kernel,
    region_kernel,
    region_of,
)
from qgalore_compile.kernels.triton.looked_at import MOST_TILES, Seen, choose, look
from qgalore_compile.kernels.triton.targets import Target
from qgalore_compile.kernels.triton.tiling import tilings

pytestmark = pytest.mark.triton

H100 = Target.named("sm_90")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "qgalore-tiles"


@dataclasses.dataclass
class Compiler:
    """What stands in for one: what becomes of each kernel in turn, and how many it was asked for."""

    seen: list[Seen]
    asked: list[Kernel] = dataclasses.field(default_factory=list)

    def __call__(self, kernel: Kernel, target: Target) -> Seen:
        self.asked.append(kernel)
        return self.seen[min(len(self.asked), len(self.seen)) - 1]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler([Seen(0)])
    monkeypatch.setattr(looked_at, "_looked", stand_in)
    return stand_in


def region(width: int = 256) -> BlockProgram:
    made = program(Space(8, 4096, width), "x f32 element in", "y f32 element out")
    made.store("y", load(made, "x"))
    return made


def test_the_models_first_tile_is_taken_where_it_spills_nothing(compiler: Compiler) -> None:
    kernel = product_kernel(up(2048, 2048, 512, 256), H100, look=True)
    assert kernel.tiling == product_kernel(up(2048, 2048, 512, 256), H100).tiling
    assert (len(compiler.asked), kernel.passed) == (1, ())


def test_the_next_tile_of_other_sides_or_warps_is_taken_where_one_spills(compiler: Compiler) -> None:
    compiler.seen = [Seen(168), Seen(0, "does not compile: 1 bytes too many"), Seen(0)]
    product = up(2048, 2048, 512, 256)
    kernel = product_kernel(product, H100, look=True)
    sides = [(each.tiling.m, each.tiling.n, each.warps) for each in compiler.asked if each.tiling]
    assert len(set(sides)) == len(sides) == 3
    order = [(each.m, each.n, each.warps) for each in tilings(product, H100)]
    assert sides == list(dict.fromkeys(order))[:3]
    assert kernel.passed == (
        f"{compiler.asked[0].blocks} spills 168 bytes",
        f"{compiler.asked[1].blocks} does not compile: 1 bytes too many",
    )
    assert kernel.source == compiler.asked[2].source


def test_of_tiles_that_all_spill_the_one_that_spills_least_is_taken_after_a_few(compiler: Compiler) -> None:
    compiler.seen = [Seen(300), Seen(0, "does not compile"), Seen(40), Seen(200)]
    kernel = product_kernel(up(2048, 2048, 512, 256), H100, look=True)
    assert len(compiler.asked) == MOST_TILES == 4
    assert kernel.source == compiler.asked[2].source
    assert [told.split(" stages ")[1] for told in kernel.passed] == [
        "spills 300 bytes", "does not compile", "spills 200 bytes"
    ]  # fmt: skip


def test_a_region_that_spills_takes_fewer_groups(compiler: Compiler) -> None:
    compiler.seen = [Seen(8), Seen(0)]
    kernel = region_kernel(region(), H100)
    assert (kernel.blocks, kernel.grid) == ("4 groups, 4 warps", 32)
    assert kernel.passed == ("8 groups, 4 warps spills 8 bytes",)


def test_what_was_seen_is_kept_and_a_damaged_file_counts_as_none(compiler: Compiler, own_cache: Path) -> None:
    compiler.seen = [Seen(12), Seen(13), Seen(14)]
    kernel = region_kernel(region())
    assert look(kernel, H100) == look(kernel, H100) == Seen(12)
    assert look(kernel, Target.named("sm_80")) == Seen(13)  # of another chip
    (path, other) = sorted(own_cache.iterdir(), key=lambda each: each.stat().st_mtime_ns)
    for damaged in (b"", b"[1", b"null", b'["x", 1]', b"\xff"):
        path.write_bytes(damaged)
        assert look(kernel, H100) == Seen(14)
    assert other.exists()


def test_a_cache_that_cannot_be_written_costs_no_more_than_a_compilation(compiler: Compiler, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    kernel = region_kernel(region())
    assert look(kernel, H100) == look(kernel, H100) == Seen(0)
    assert len(compiler.asked) == 2


def test_a_compilers_refusal_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kernel: Kernel, target: Target) -> None:
        raise CompileError("gemm", "sm_90", "300000 bytes of shared memory, of at most 232448\nand more")

    monkeypatch.setattr(looked_at, "compiled", refuse)
    kernel = choose([region_kernel(region())], H100)
    assert kernel.passed == ()  # there is no other: the compiler will say it again
    assert look(kernel, H100).problem == "does not compile: 300000 bytes of shared memory, of at most 232448"


def test_a_graphs_kernels_are_chosen_together_and_found_where_they_are_asked_for(compiler: Compiler) -> None:
    text, cpu = str(region(128)), torch.device("cpu")
    with made_for(H100, look=True):
        choose_together([(text, [], cpu)] * 3)
        assert len(compiler.asked) == 1
        assert region_of(text, looking(H100)).passed == ()
    assert len(compiler.asked) == 1
    with made_for(H100):
        choose_together([(str(region(64)), [], cpu)])
        assert looking(H100) is None
    assert len(compiler.asked) == 1


def test_where_no_gpu_is_nothing_is_compiled_to_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looking(H100) is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert looking(H100) is H100
    monkeypatch.setattr(triton_kernels, "LOOK", False)
    assert looking(H100) is None


@pytest.mark.parametrize(
    ("lines", "stack", "spilled"),
    [
        (["LDG.E R2, desc[UR4][R2.64] ;"], 64, 0),  # an array that the compiler has left and no instruction touches
        (["STL [R1+0x8], R5 ;", "LDL.64 R2, [R1+0x8] ;"], 8, 12),
        (["STL [R1+0x8], R5 ;"], 64, 64),
    ],
)
def test_values_are_spilled_where_instructions_store_or_load_them(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], stack: int, spilled: int
) -> None:
    sass = "\n".join(f"        /*{16 * at:04x}*/  {line}" for at, line in enumerate(lines))
    monkeypatch.setattr(ahead, "_cuobjdump", lambda code, option: sass)
    binary = Binary("made", H100, "", b"", warps=4, registers=32, stack=stack, shared=0, tensor_memory=0)
    assert looked_at.spills(binary) == spilled


def test_a_region_that_encodes_by_a_tables_bounds_takes_the_models_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of counting the bounds below a number Triton 3.7 leaves a stack, on which nothing is kept."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    form = NF4(64)
    made = program(Space(8, 4096, 64), "x f32 element in", "codes p4 element out", "absmax f32 group out")
    x = Value(made, load(made, "x"))
    for name, value in zip(("codes", "absmax"), form.store(InProgram(made, 64), x, None), strict=True):
        made.store(name, value.number)
    assert region_kernel(made, H100).passed == ()


@pytest.mark.slow
def test_a_write_back_of_1b_keeps_all_in_registers_with_the_triton_that_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With 3.7.1 the first tile does, with 3.9.0 the second: 2048 × 2048 at rank 512 on sm_90."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    kernel = product_kernel(up(2048, 2048, 512, 256), H100, look=True)
    binary = looked_at.compiled(kernel, H100)
    assert (binary.stack, binary.spilled) == (0, 0)
