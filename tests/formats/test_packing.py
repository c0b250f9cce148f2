"""Codes of fewer than eight bits in bytes: which bits they are, and back; planar ones are in ``test_formats.py``."""

from __future__ import annotations

import pytest
import torch

from qgalore_compile.formats.packing import BITS, pack, pack_int4, packed_size, unpack, unpack_int4

LENGTHS = pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 77, 128])
MEMORIES = pytest.mark.parametrize("memory", BITS)


@LENGTHS
@MEMORIES
def test_codes_come_back_from_rows_of_any_length(memory: str, n: int) -> None:
    codes = torch.randint(0, 1 << BITS[memory], (2, 3, n), dtype=torch.uint8)
    packed = pack(codes, memory)
    assert (packed.shape, packed.dtype) == ((2, 3, packed_size(memory, n)), torch.uint8)
    assert torch.equal(unpack(packed, memory, n), codes)
    assert torch.equal(pack(codes.int(), memory), packed)


@MEMORIES
def test_a_byte_holds_neighbours_and_the_first_in_its_lowest_bits(memory: str) -> None:
    bits = BITS[memory]
    codes = [place % (1 << bits) for place in range(1, 14)]
    expected = [0] * packed_size(memory, 13)
    for place, code in enumerate(codes):
        expected[place * bits // 8] |= code << (place * bits % 8)
    assert pack(torch.tensor(codes), memory).tolist() == expected


@MEMORIES
def test_places_beyond_the_row_hold_zeros(memory: str) -> None:
    bits = BITS[memory]
    assert pack(torch.tensor([(1 << bits) - 1]), memory).tolist() == [(1 << bits) - 1]


@LENGTHS
def test_planar_codes_are_as_many_bytes_and_come_back(n: int) -> None:
    codes = torch.randint(0, 16, (3, n), dtype=torch.uint8)
    assert pack_int4(codes).shape == (3, packed_size("u4", n))
    assert torch.equal(unpack_int4(pack_int4(codes), n), codes)


def test_codes_of_eight_bits_are_not_packed() -> None:
    assert packed_size("u8", 77) == 77


@MEMORIES
def test_empty_rows_are_empty(memory: str) -> None:
    for shape in ((0, 5), (3, 0)):
        assert unpack(pack(torch.zeros(shape, dtype=torch.uint8), memory), memory, shape[-1]).shape == shape
