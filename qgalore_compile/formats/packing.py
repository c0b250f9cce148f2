"""Codes of fewer than eight bits in bytes.

=========  ===========================================================  =============================================
memory     a byte holds                                                 used
=========  ===========================================================  =============================================
"p4"       the codes of places 2j (low nibble) and 2j + 1 of a row      whatever a kernel writes: a group of an even
                                                                        size has bytes of its own
"p2"       those of places 4j to 4j + 3, lowest bits first              the upper two bits of six
"u4"       those of places j (low nibble) and j + ⌈n / 2⌉, *planar*     projectors, which kernels read alone:
                                                                        unpacking is two contiguous stores
=========  ===========================================================  =============================================
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {"p4": 4, "p2": 2}
"""Of a code, by the kind of memory that kernels write."""


def packed_size(memory: str, n: int) -> int:
    """Elements of a row as a tensor holds it."""
    return -(-n * BITS[memory] // 8) if memory in BITS else -(-n // 2) if memory == "u4" else n


def pack(codes: Tensor, memory: str) -> Tensor:
    """(..., n) codes → uint8 (..., ⌈n · bits / 8⌉); places beyond the row hold 0."""
    bits = BITS[memory]
    each = 8 // bits
    codes = codes.to(torch.uint8)
    missing = -codes.shape[-1] % each
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    lanes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
    packed = lanes[..., 0]
    for lane in range(1, each):
        packed = packed | (lanes[..., lane] << (bits * lane))
    return packed


def unpack(packed: Tensor, memory: str, n: int) -> Tensor:
    """The inverse of :func:`pack`: codes (..., n) in uint8."""
    bits = BITS[memory]
    lanes = [(packed >> (bits * lane)) & ((1 << bits) - 1) for lane in range(8 // bits)]
    codes = torch.stack(lanes, dim=-1)
    return codes.flatten(-2)[..., :n]


def pack_int4(codes: Tensor) -> Tensor:
    """(..., n) codes below 16 → (..., ceil(n / 2)) bytes, planar: low nibbles hold the first half of the row.

    Planar, not interleaved: unpacking is then two contiguous stores, which vectorise in generated CPU code.
    """
    half = -(-codes.shape[-1] // 2)
    low, high = codes[..., :half], codes[..., half:]
    if high.shape[-1] < half:  # an odd row: the last high nibble stays empty
        high = torch.nn.functional.pad(high, (0, half - high.shape[-1]))
    return low | (high << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_int4`: (..., ceil(columns / 2)) bytes → (..., columns) codes in uint8."""
    codes = torch.cat([packed & 15, packed >> 4], dim=-1)
    return codes if codes.shape[-1] == columns else codes[..., :columns]
