"""Kernels compiled for GPUs that are not there: what their machine code contains is found, and limits are errors.

The kernels here are the smallest that show one thing each.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from qgalore_compile.kernels.triton import ahead  # noqa: E402
from qgalore_compile.kernels.triton.ahead import Binary, CompileError, compile_kernel  # noqa: E402
from qgalore_compile.kernels.triton.targets import Target  # noqa: E402

pytestmark = pytest.mark.triton

NVIDIA = ["sm_80", "sm_90", "sm_100", "sm_120"]
EVERY = pytest.mark.parametrize("name", [*NVIDIA, "gfx942"])


@pytest.fixture(autouse=True, scope="module")
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@triton.jit
def copy_kernel(source, destination, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(destination + at, tl.load(source + at))


@triton.jit
def dot_kernel(left, right, product, PRECISION: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr):
    row, column, k = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, K)
    a, b = tl.load(left + row * K + k[None, :]), tl.load(right + k[:, None] * SIZE + column)
    tl.store(product + row * SIZE + column, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def centre_kernel(source, destination, BLOCK: tl.constexpr):
    """Every value is needed again once their sum is known."""
    at = tl.arange(0, BLOCK)
    x = tl.load(source + at)
    tl.store(destination + at, x - tl.sum(x))


@triton.jit
def loop_kernel(left, right, product, steps, SIZE: tl.constexpr):
    """A product of (SIZE, SIZE) blocks whose loop holds as many of them in shared memory as the pipeline has stages."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        total = tl.dot(tl.load(left + step * SIZE + at), tl.load(right + step * SIZE + at), total)
    tl.store(product + at, total)


@triton.jit
def double_kernel(source, destination, ADD: tl.constexpr):
    at = tl.arange(0, 128)
    x = tl.load(source + at).to(tl.float64)
    tl.store(destination + at, x * x + 0.5 if ADD else x)


@triton.jit
def multiply_add_kernel(source, destination):
    at = tl.arange(0, 128)
    x = tl.load(source + at)
    tl.store(destination + at, x * x + x)


@triton.jit
def refused_kernel(source):
    tl.static_assert(False, "not on a Tuesday")


@triton.jit
def assembly_kernel(destination):
    word = tl.inline_asm_elementwise("no.such $0;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(destination, word)


@cache
def copied(name: str, kind: str = "*u8", each: int = 16, aligned: bool = True) -> Binary:
    """The kernel that copies so many elements with each thread."""
    target = Target.named(name)
    return compile_kernel(
        copy_kernel,
        {"source": kind, "destination": kind},
        {"BLOCK": each * 4 * target.warp_size},
        target,
        num_warps=4,
        num_stages=1,
        unaligned=() if aligned else ("source", "destination"),
    )


@cache
def multiplied(name: str, kind: str, precision: str, size: int = 64, k: int = 32) -> Binary:
    pointers = {"left": kind, "right": kind, "product": "*fp32"}
    constexprs = {"PRECISION": precision, "SIZE": size, "K": k}
    return compile_kernel(dot_kernel, pointers, constexprs, Target.named(name), num_warps=4, num_stages=1)


def mapped(fn: Any, name: str, source: str = "*fp32", **options: Any) -> Binary:
    constexprs = {each: options.pop(each) for each in fn.arg_names if each.isupper()}
    pointers = {"source": source, "destination": source}
    return compile_kernel(fn, pointers, constexprs, Target.named(name), 1, 1, **options)


@EVERY
def test_a_tile_of_bytes_moves_in_accesses_of_16_bytes(name: str) -> None:
    binary = copied(name)
    assert binary.loads == binary.stores == {16: 1}
    assert binary.spilled == binary.stack == binary.shared == 0
    assert not binary.tensor
    assert not binary.fp64
    assert 0 < binary.registers < 32
    assert binary.occupancy.fraction == 1


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("kind", "width"), [("*u8", 1), ("*fp16", 2), ("*i64", 8)])
def test_pointers_of_unknown_alignment_are_read_element_by_element(name: str, kind: str, width: int) -> None:
    binary = copied(name, kind, each=2, aligned=False)
    assert binary.loads == binary.stores == {width: 2}


@EVERY
@pytest.mark.parametrize(("kind", "precision"), [("*bf16", "ieee"), ("*fp32", "tf32")])
def test_a_dot_runs_on_the_tensor_cores(name: str, kind: str, precision: str) -> None:
    unit = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"}.get(name, "HMMA")
    found = multiplied(name, kind, precision).tensor
    assert found
    assert all(each.startswith(unit) for each in found)
    if name not in ("sm_100", "gfx942"):  # whose instruction names no type, or xf32
        assert all(("BF16" if kind == "*bf16" else "TF32") in each for each in found)


@pytest.mark.parametrize("name", NVIDIA)
def test_an_exact_fp32_dot_has_no_tensor_core_instruction(name: str) -> None:
    binary = multiplied(name, "*fp32", "ieee", size=16, k=16)
    assert not binary.tensor
    assert binary.instructions["FFMA"] >= 16 * 16 * 16 // 128


def test_shared_and_tensor_memory_are_the_blocks() -> None:
    # the product, on its way to the threads that store it; the 1 KiB that cuobjdump adds is the driver's
    assert multiplied("sm_90", "*bf16", "ieee").shared == 64 * 64 * 4
    assert multiplied("sm_90", "*bf16", "ieee").tensor_memory == 0
    assert multiplied("sm_100", "*bf16", "ieee").tensor_memory == 64


def test_spilled_bytes_are_those_that_ptxas_reports(tmp_path: Path) -> None:
    from triton import knobs

    binary = mapped(centre_kernel, "sm_80", BLOCK=8192)  # 256 values a thread
    assert binary.registers == 255
    assert binary.stack > 0
    source = tmp_path / "kernel.ptx"
    source.write_text(binary.text)
    command = [knobs.nvidia.ptxas.path, "-v", "--fmad=false", "--regAllocOptLevel=2", "--gpu-name=sm_80", source]
    report = subprocess.run([*command, "-o", os.devnull], check=True, capture_output=True, text=True).stderr
    stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", report))
    assert binary.stack == stack
    assert sum(width * count for width, count in binary.spill_stores.items()) == stores
    assert binary.spilled == stores + loads > 0


def test_spills_of_amds_compiler_are_found() -> None:
    binary = mapped(centre_kernel, "gfx942", BLOCK=8192, options={"waves_per_eu": 8})  # 64 registers for 128 values
    assert binary.stack > 0
    assert binary.spilled > binary.stack
    assert copied("gfx942").spilled == 0


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_arithmetic_in_fp64_is_found_and_conversions_are_none(name: str) -> None:
    assert mapped(double_kernel, name, ADD=True).fp64
    assert not mapped(double_kernel, name, ADD=False).fp64


@pytest.mark.parametrize(("name", "fused"), [("sm_80", "FFMA"), ("gfx942", "v_fma")])
def test_multiplications_and_additions_are_fused_on_demand_only(name: str, fused: str) -> None:
    def count(fusion: bool) -> int:
        found = mapped(multiply_add_kernel, name, fp_fusion=fusion).instructions
        return sum(count for each, count in found.items() if re.match(rf"{fused}|v_pk_fma|v_fmac", each))

    assert count(True) > 0
    assert count(False) == 0


@EVERY
def test_more_shared_memory_than_a_block_can_have_is_an_error(name: str) -> None:
    target, stages = Target.named(name), 6 if name == "gfx942" else 16
    signature = {"left": "*bf16", "right": "*bf16", "product": "*fp32", "steps": "i32"}
    most = target.shared_per_block
    with pytest.raises(CompileError, match=rf"for {name}: \d+ bytes of shared memory, of at most {most}$") as caught:
        compile_kernel(loop_kernel, signature, {"SIZE": 64}, target, num_warps=4, num_stages=stages)
    assert (caught.value.kernel, caught.value.target) == ("loop_kernel", name)


def test_what_the_compiler_refuses_is_an_error_with_its_message() -> None:
    target = Target.named("sm_80")
    with pytest.raises(CompileError, match="not on a Tuesday"):
        compile_kernel(refused_kernel, {"source": "*fp32"}, {}, target, 1, 1)
    with pytest.raises(CompileError, match=r"(?s)`ptxas`.*known instruction: 'no'"):
        compile_kernel(assembly_kernel, {"destination": "*i32"}, {}, target, 1, 1)
    with pytest.raises(CompileError, match="power of 2"):
        compile_kernel(refused_kernel, {"source": "*fp32"}, {}, target, 3, 1)
    with pytest.raises(CompileError, match="2048 threads a block, of at most 1024"):
        compile_kernel(copy_kernel, {"source": "*u8", "destination": "*u8"}, {"BLOCK": 4096}, target, 64, 1)


@pytest.mark.parametrize("failures", [1, 4, 5])
def test_where_python_counts_another_thread_s_recursion_the_kernel_is_compiled_again(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five attempts; a kernel must not be lost to what another thread parses (CPython's issue 106905)."""
    calls, real = [], triton.compile

    def compile_it(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= failures:
            raise SystemError("AST constructor recursion depth mismatch (before=60, after=123)")
        return real(*args, **kwargs)

    monkeypatch.setattr(triton, "compile", compile_it)
    if failures < 5:
        assert mapped(multiply_add_kernel, "sm_90").registers
    else:
        with pytest.raises(SystemError, match="recursion depth mismatch"):
            mapped(multiply_add_kernel, "sm_90")
    assert len(calls) == min(failures + 1, 5)


def test_another_system_error_is_no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_it(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise SystemError("something else")

    monkeypatch.setattr(triton, "compile", compile_it)
    with pytest.raises(SystemError, match="something else"):
        mapped(multiply_add_kernel, "sm_90")
    assert len(calls) == 1


def test_arguments_must_be_the_kernels() -> None:
    with pytest.raises(ValueError, match=r"arguments of copy_kernel are \['source', 'destination', 'BLOCK'\], not"):
        compile_kernel(copy_kernel, {"source": "*u8"}, {"BLOCK": 16}, Target.named("sm_80"), 1, 1)
    with pytest.raises(TypeError, match=r"not a function that triton.jit made to be compiled: <function"):
        compile_kernel(copy_kernel.fn, {"source": "*u8"}, {"BLOCK": 16}, Target.named("sm_80"), 1, 1)


def test_a_cache_of_ones_own_leaves_tritons_alone(tmp_path: Path) -> None:
    before, usual = dict(os.environ), Path(os.environ["TRITON_CACHE_DIR"])
    entries = set(usual.iterdir())
    binary = mapped(multiply_add_kernel, "sm_89", cache=tmp_path)
    assert any(tmp_path.rglob("multiply_add_kernel.cubin"))
    assert set(usual.iterdir()) == entries
    assert dict(os.environ) == before
    assert mapped(multiply_add_kernel, "sm_89", cache=tmp_path).code == binary.code


def read(name: str, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Binary:
    """A kernel whose assembly is these lines."""
    target = Target.named(name)
    sass = "\n".join(
        f"        /*{16 * at:04x}*/  {line:>40}   /* 0x0000000c02027981 */" for at, line in enumerate(lines)
    )
    monkeypatch.setattr(ahead, "_cuobjdump", lambda code, option: "// HMMA DADD\n" + sass)
    amd = "; v_mfma_f32\n.Lv_add_f64:\n" + "\n".join(f"\t{line} v0, v1" for line in lines)
    return Binary("made", target, amd, b"", warps=4, registers=32, stack=0, shared=0, tensor_memory=0)


def test_instructions_of_sass_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["@!P0 LDG.E.EF.LTC128B.64 R2, desc[UR4][R2.64] ;", "LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;"]
    lines += ["LDGSTS.E.BYPASS.128 [R9], [R2.64] ;", "@UP0 UBLKCP.S.G [UR8], [UR6], UR9 ;", "LDL.LU.64 R2, [R1] ;"]
    lines += [
        "STG.E.U16 desc[UR4][R4.64], R5 ;",
        "UBLKCP.G.S [UR8], [UR6], UR9 ;",
        "STL [R1+0x8], R5 ;",
        "LDS.128 R4, [R2] ;",
    ]
    lines += ["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR17] ;", "QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4 ;"]
    lines += [
        "HFMA2.MMA R7, -RZ, RZ, 0, 0 ;",
        "UTCATOMSWS.AND URZ, UR4 ;",
        "DSETP.GT.AND P0, PT, R2, R4, PT ;",
        "DEPBAR ;",
    ]
    found = read("sm_100", lines, monkeypatch)
    assert found.instructions.total() == len(lines)
    assert found.loads == {8: 1, 32: 1, 16: 2}
    assert found.stores == {2: 1, 16: 1}
    assert found.spill_loads == {8: 1}
    assert found.spill_stores == {4: 1}
    assert found.spilled == 12
    # HFMA2.MMA moves a constant, on the half-precision units that Ampere has beside its tensor cores
    assert found.tensor == {"UTCHMMA": 1, "QMMA.16832.F32.E4M3.E4M3": 1}
    assert found.fp64 == {"DSETP.GT.AND": 1}


def test_instructions_of_amds_assembly_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "global_load_dwordx4",
        "buffer_load_ushort",
        "global_load_ubyte_d16_hi",
        "flat_load_dword",
        "s_load_dwordx2",
    ]
    lines += [
        "global_store_dwordx3",
        "buffer_store_byte",
        "scratch_load_dwordx2",
        "scratch_store_dword",
        "ds_read_b128",
    ]
    lines += ["v_mfma_f32_32x32x8_bf16", "v_fma_f64", "v_cvt_f64_f32_e32", "global_atomic_add_f64", "v_cmp_lt_f64_e32"]
    found = read("gfx942", lines, monkeypatch)
    assert found.instructions.total() == len(lines)
    assert found.loads == {16: 1, 2: 1, 1: 1, 4: 1}
    assert found.stores == {12: 1, 1: 1}
    assert found.spilled == 8 + 4
    assert found.tensor == {"v_mfma_f32_32x32x8_bf16": 1}
    assert found.fp64 == {"v_fma_f64": 1, "v_cmp_lt_f64_e32": 1}
