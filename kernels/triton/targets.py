"""GPUs that kernels are compiled for, with what bounds a kernel on each: registers, shared memory, bandwidth, peaks.

Numbers are of one product of each architecture.  Sources, by the names used in the table below:

- guide: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
- occupancy: ``cuda_occupancy.h`` of the CUDA toolkit, NVIDIA's own occupancy calculator.
- A100: NVIDIA A100 Tensor Core GPU Architecture whitepaper, and the 80GB SXM data sheet for its bandwidth.
- Ada: NVIDIA Ada GPU Architecture whitepaper v2, appendix A.
- H100: NVIDIA H100 Tensor Core GPU Architecture whitepaper, and the H100 SXM data sheet.
- B200: NVIDIA Blackwell Architecture Technical Brief and the HGX B200 data sheet, a board's figures divided by 8.
- RTX Blackwell: NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A.
- CDNA 3: AMD CDNA 3 white paper and the Instinct MI300X data sheet; the ROCm page "GPU specifications".
- LLVM: ``AMDGPUBaseInfo.cpp`` (namespace IsaInfo), what the compiler itself assumes of a compute unit.

Tensor-core peaks are dense, with fp32 accumulation: data sheets of NVIDIA print the double, for 2:4 sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

_PARTITIONS = 4
"""Parts of a multiprocessor, each with a quarter of its registers: 4 on all targets (occupancy; LLVM: EUs per CU)."""

_REGISTER_STEP = 8
"""A thread's registers are allocated in eights: 256 a warp of 32 (occupancy), 512 a wave of 64 (LLVM, from gfx90a)."""


class UnknownTargetError(ValueError):
    """No target has that name, or none is near that capability; the message lists the known ones."""


class Occupancy(NamedTuple):
    """How many blocks of a kernel a multiprocessor holds at once.

    Attributes:
        blocks: 0 if not even one fits.
        fraction: their warps, of those that the multiprocessor has room for.
        limit: what admits no more: "registers", "shared", "warps" or "blocks"; "threads" if a block is too large.
    """

    blocks: int
    fraction: float
    limit: str


@dataclass(frozen=True)
class Target:
    """A GPU.  On AMD's, read compute unit for multiprocessor, wave for warp, and LDS for shared memory.

    Attributes:
        name: as compilers spell the architecture: "sm_90", "gfx942".
        chip: the product that the numbers are of.
        backend: of Triton, "cuda" or "hip".
        warp_size: threads.
        multiprocessors: of the product, which has fewer than the die.
        registers_per_multiprocessor: of 32 bits.
        registers_per_thread: of 32 bits, at most.
        shared_per_multiprocessor: bytes, all blocks together.
        shared_per_block: bytes at most, opted in to (Triton's launcher does).
        shared_reserved: bytes of each block that the driver keeps to itself, on top of the block's own.
        shared_step: bytes in whose multiples shared memory is allocated.
        threads_per_block: at most.
        warps_per_multiprocessor: at most.
        blocks_per_multiprocessor: at most.
        l2_bytes: last cache that is not behind the memory controllers.
        dram_bytes_per_second: peak.
        bf16_flops: dense peak of the tensor cores a second; a multiply-add counts two.
        tf32_flops: the same of tf32 operands.
        fp32_flops: peak of fp32 multiply-adds outside the tensor cores.
    """

    name: str
    chip: str
    multiprocessors: int
    l2_bytes: int
    dram_bytes_per_second: float
    bf16_flops: float
    tf32_flops: float
    fp32_flops: float
    shared_per_multiprocessor: int
    shared_per_block: int
    warps_per_multiprocessor: int
    blocks_per_multiprocessor: int
    # What is equal on all of NVIDIA's here (guide; occupancy; cudaDeviceProp.reservedSharedMemPerBlock).
    backend: str = "cuda"
    warp_size: int = 32
    registers_per_multiprocessor: int = 65536
    registers_per_thread: int = 255
    shared_reserved: int = 1024
    shared_step: int = 128
    threads_per_block: int = 1024

    @property
    def threads_per_multiprocessor(self) -> int:
        """Threads that can be resident at once."""
        return self.warps_per_multiprocessor * self.warp_size

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability (major, minor); None on AMD's."""
        return divmod(int(self.name.removeprefix("sm_")), 10) if self.backend == "cuda" else None

    @property
    def triton(self) -> Any:
        """Triton's ``GPUTarget``; imports Triton."""
        from triton.backends.compiler import GPUTarget

        arch = int(self.name.removeprefix("sm_")) if self.backend == "cuda" else self.name
        return GPUTarget(self.backend, arch, self.warp_size)

    def occupancy(self, registers: int, shared: int, warps: int) -> Occupancy:
        """Blocks that fit a multiprocessor at once, by NVIDIA's occupancy calculation, which holds for AMD's too.

        Args:
            registers: of a thread.
            shared: bytes of a block, without what the driver reserves.
            warps: of a block.
        """
        if warps * self.warp_size > self.threads_per_block:
            return Occupancy(0, 0.0, "threads")
        allocated = _round_up(registers, _REGISTER_STEP) * self.warp_size
        # A warp's registers lie in one partition.
        resident = self.registers_per_multiprocessor // _PARTITIONS // allocated * _PARTITIONS if registers else inf
        # Whether one block fits is asked as if its warps were spread over all partitions evenly.
        fits = registers <= self.registers_per_thread and _round_up(warps, _PARTITIONS) <= resident
        held = _round_up(shared + self.shared_reserved, self.shared_step)
        limits = {
            "blocks": self.blocks_per_multiprocessor,
            "warps": self.warps_per_multiprocessor // warps,
            "shared": self.shared_per_multiprocessor // held if held else inf,
            "registers": resident // warps if fits else 0,
        }
        if shared > self.shared_per_block:
            limits["shared"] = 0
        # Of equal limits the first counts: no kernel can do anything about the first two.
        limit = min(limits, key=lambda name: limits[name])
        blocks = int(limits[limit])
        return Occupancy(blocks, blocks * warps / self.warps_per_multiprocessor, limit)

    @staticmethod
    def named(name: str) -> Target:
        """The target of that name.

        Raises:
            UnknownTargetError: lists the known names.
        """
        try:
            return TARGETS[name]
        except KeyError:
            raise UnknownTargetError(f"no target {name!r}; known: {', '.join(TARGETS)}") from None

    @staticmethod
    def of(capability: tuple[int, int]) -> Target:
        """The known target nearest to a CUDA device's compute capability, of its own major version if there is one.

        For NVIDIA's devices only: ROCm reports a capability too, (9, 4) for gfx942, which goes by its name.

        Raises:
            UnknownTargetError: below 8.0, where tensor cores lack bf16 and no number of a known target holds.
        """
        known = {each.capability: each for each in TARGETS.values() if each.capability is not None}
        if capability < min(known):
            names = ", ".join(each.name for each in known.values())
            raise UnknownTargetError(f"no target near compute capability {capability}; known: {names}")
        wanted = 10 * capability[0] + capability[1]
        return known[
            min(known, key=lambda each: (each[0] != capability[0], abs(10 * each[0] + each[1] - wanted), each))
        ]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


_KIB = 1 << 10
_MIB = 1 << 20

TARGETS = {
    each.name: each
    for each in (
        Target(
            name="sm_80",
            chip="A100 80GB SXM",
            multiprocessors=108,  # A100
            l2_bytes=40 * _MIB,  # A100
            dram_bytes_per_second=2.039e12,  # A100, data sheet
            bf16_flops=312e12,  # A100
            tf32_flops=156e12,  # A100
            fp32_flops=19.5e12,  # A100
            shared_per_multiprocessor=164 * _KIB,  # guide, 8.0
            shared_per_block=163 * _KIB,  # guide
            warps_per_multiprocessor=64,  # guide
            blocks_per_multiprocessor=32,  # guide
        ),
        Target(
            name="sm_89",
            chip="RTX 4090",
            multiprocessors=128,  # Ada
            l2_bytes=72 * _MIB,  # Ada
            dram_bytes_per_second=1.008e12,  # Ada
            bf16_flops=165.2e12,  # Ada
            tf32_flops=82.6e12,  # Ada
            fp32_flops=82.6e12,  # Ada
            shared_per_multiprocessor=100 * _KIB,  # guide, 8.9
            shared_per_block=99 * _KIB,  # guide
            warps_per_multiprocessor=48,  # guide
            blocks_per_multiprocessor=24,  # guide
        ),
        Target(
            name="sm_90",
            chip="H100 SXM",
            multiprocessors=132,  # H100
            l2_bytes=50 * _MIB,  # H100
            dram_bytes_per_second=3.35e12,  # H100, data sheet
            bf16_flops=989.4e12,  # H100
            tf32_flops=494.7e12,  # H100
            fp32_flops=66.9e12,  # H100
            shared_per_multiprocessor=228 * _KIB,  # guide, 9.0
            shared_per_block=227 * _KIB,  # guide
            warps_per_multiprocessor=64,  # guide
            blocks_per_multiprocessor=32,  # guide
        ),
        Target(
            name="sm_100",
            chip="B200",
            # NVIDIA publishes neither: cudaDeviceProp.multiProcessorCount and .l2CacheSize of a B200.
            multiprocessors=148,
            l2_bytes=129536 * _KIB,
            dram_bytes_per_second=8e12,  # B200; in some boards 7.7e12
            bf16_flops=2250e12,  # B200
            tf32_flops=1100e12,  # B200, rounded there: half of bf16 would be 1125
            fp32_flops=75e12,  # B200
            shared_per_multiprocessor=228 * _KIB,  # guide, 10.0
            shared_per_block=227 * _KIB,  # guide
            warps_per_multiprocessor=64,  # guide
            blocks_per_multiprocessor=32,  # guide
        ),
        Target(
            name="sm_120",
            chip="RTX 5090",
            multiprocessors=170,  # RTX Blackwell
            l2_bytes=96 * _MIB,  # RTX Blackwell
            dram_bytes_per_second=1.792e12,  # RTX Blackwell
            bf16_flops=209.5e12,  # RTX Blackwell
            tf32_flops=104.8e12,  # RTX Blackwell
            fp32_flops=104.8e12,  # RTX Blackwell
            shared_per_multiprocessor=100 * _KIB,  # guide, 12.0
            shared_per_block=99 * _KIB,  # guide
            warps_per_multiprocessor=48,  # guide
            blocks_per_multiprocessor=24,  # guide
        ),
        Target(
            name="gfx942",
            chip="MI300X",
            backend="hip",
            warp_size=64,  # CDNA 3
            multiprocessors=304,  # CDNA 3
            l2_bytes=32 * _MIB,  # CDNA 3: 4 MiB in each of 8 dies; behind it lie 256 MiB of Infinity Cache
            dram_bytes_per_second=5.3e12,  # CDNA 3
            bf16_flops=1307.4e12,  # CDNA 3
            tf32_flops=653.7e12,  # CDNA 3
            fp32_flops=163.4e12,  # CDNA 3
            registers_per_multiprocessor=131072,  # CDNA 3: 512 KiB of vector registers
            registers_per_thread=512,  # LLVM: vector and accumulation registers are one file
            shared_per_multiprocessor=64 * _KIB,  # CDNA 3
            shared_per_block=64 * _KIB,  # CDNA 3
            shared_reserved=0,
            shared_step=512,  # LLVM: 128 words
            warps_per_multiprocessor=32,  # LLVM: 8 a partition
            blocks_per_multiprocessor=16,  # LLVM: its barriers, so blocks of one wave alone have no such limit
        ),
    )
}
"""The known targets by name."""
