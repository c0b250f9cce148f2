"""Targets: consistent tables, occupancy as NVIDIA's calculator and LLVM have it, and errors that list what is known."""

from __future__ import annotations

import pytest

from qgalore_compile.kernels.triton.targets import TARGETS, Target, UnknownTargetError

ALL = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def test_names_are_those_that_compilers_use() -> None:
    assert list(TARGETS) == ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
    assert all(Target.named(name).name == name for name in TARGETS)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownTargetError, match=r"no target 'sm_70'; known: sm_80, .*, gfx942"):
        Target.named("sm_70")


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),  # RTX 3090: shared memory and warps of an RTX 4090, not of an A100
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "sm_120"),
    ],
)
def test_a_capability_gives_the_nearest_target(capability: tuple[int, int], name: str) -> None:
    assert Target.of(capability).name == name


def test_devices_before_bf16_are_near_no_target() -> None:
    with pytest.raises(UnknownTargetError, match=r"\(7, 5\); known: sm_80, sm_89, sm_90, sm_100, sm_120$"):
        Target.of((7, 5))


@ALL
def test_numbers_agree_with_each_other(target: Target) -> None:
    assert target.shared_per_block + target.shared_reserved <= target.shared_per_multiprocessor
    assert target.threads_per_multiprocessor in (1536, 2048)
    assert target.fp32_flops <= target.tf32_flops < target.bf16_flops
    assert target.bf16_flops / target.tf32_flops == pytest.approx(2, rel=0.03)
    # one thread may not take more than its partition has for a warp
    assert target.registers_per_thread * target.warp_size <= target.registers_per_multiprocessor // 4


@ALL
def test_fp32_peak_is_that_of_the_multiprocessors_at_a_plausible_clock(target: Target) -> None:
    lanes = 64 if target.name == "sm_80" else 128
    assert 1.4e9 <= target.fp32_flops / (2 * lanes * target.multiprocessors) <= 2.6e9


@pytest.mark.triton
@ALL
def test_triton_is_told_backend_architecture_and_warp_size(target: Target) -> None:
    expected = ("hip", "gfx942", 64) if target.name == "gfx942" else ("cuda", int(target.name[3:]), 32)
    assert (target.triton.backend, target.triton.arch, target.triton.warp_size) == expected


# Register limits: cudaOccMaxBlocksPerSMRegsLimit. Shared memory: 1 KiB of each block is the driver's.
@pytest.mark.parametrize(
    ("name", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 4, (16, 1.0, "warps")),
        ("sm_80", 33, 0, 4, (12, 0.75, "registers")),  # 33 are 40: 12 warps in each partition
        ("sm_80", 64, 0, 1, (32, 0.5, "blocks")),
        ("sm_80", 255, 0, 8, (1, 0.125, "registers")),
        ("sm_80", 168, 0, 3, (4, 0.1875, "registers")),  # 3 warps in each partition: 12 / 3, not 65536 / (168 × 96)
        ("sm_80", 128, 0, 32, (0, 0.0, "registers")),
        ("sm_80", 32, 163 * 1024, 4, (1, 0.0625, "shared")),
        ("sm_80", 32, 163 * 1024 + 1, 4, (0, 0.0, "shared")),
        ("sm_80", 32, 81 * 1024, 4, (2, 0.125, "shared")),
        ("sm_80", 32, 81 * 1024 + 1, 4, (1, 0.0625, "shared")),
        ("sm_90", 64, 64 * 1024, 8, (3, 0.375, "shared")),
        ("sm_120", 32, 0, 4, (12, 1.0, "warps")),
        ("sm_120", 40, 0, 8, (6, 1.0, "warps")),
        ("sm_120", 0, 0, 1, (24, 0.5, "blocks")),
        ("gfx942", 64, 0, 4, (8, 1.0, "warps")),
        ("gfx942", 72, 0, 4, (7, 0.875, "registers")),  # llvm-calc-occupancy: 512 // 72 waves a SIMD
        ("gfx942", 512, 0, 4, (1, 0.125, "registers")),
        ("gfx942", 64, 64 * 1024, 4, (1, 0.125, "shared")),
        ("gfx942", 64, 0, 32, (0, 0.0, "threads")),
    ],
)
def test_occupancy(name: str, registers: int, shared: int, warps: int, expected: tuple[int, float, str]) -> None:
    assert Target.named(name).occupancy(registers, shared, warps) == expected


@ALL
def test_more_of_anything_never_raises_occupancy(target: Target) -> None:
    for warps in (1, 2, 3, 4, 8, 16):
        blocks = [target.occupancy(registers, 0, warps).blocks for registers in range(target.registers_per_thread + 8)]
        assert blocks == sorted(blocks, reverse=True)
        assert blocks[-1] == 0
        blocks = [target.occupancy(32, shared, warps).blocks for shared in range(0, target.shared_per_block + 513, 512)]
        assert blocks == sorted(blocks, reverse=True)
        assert blocks[-1] == 0
