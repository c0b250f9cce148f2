"""What memory may hold, a line each: the one place that names a format of single elements for every language.

A program's values are of fewer types (``TYPES`` in ``program.py``): a load widens what memory holds to one of them, a
store narrows it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """A format of elements in memory.

    Attributes:
        name: as in a program's text.
        bits: of an element.
        widened: the type of the value that a load has.
        dtype: of the tensor that holds it; elements of fewer than eight bits share a byte (``formats/packing.py``).
        cpp: C++'s type of what a pointer points to.
        pointer: Triton's name for that, in a signature.
        triton: Triton's type of an element in a tensor of its own; "" where none is stored.
    """

    name: str
    bits: int
    widened: str
    dtype: torch.dtype
    cpp: str
    pointer: str
    triton: str

    @property
    def bytes(self) -> float:
        """Of an element."""
        return self.bits / 8

    @property
    def lanes(self) -> int:
        """Elements in one of the tensor's."""
        return max(1, 8 // self.bits)

    def pitch(self, columns: int) -> int:
        """Elements of the tensor that a row of so many columns takes."""
        return -(-columns // self.lanes)


_ALL = (
    #       name  bits  value   tensor           C++          Triton: pointer, element
    Memory("f32", 32, "f32", torch.float32, "float", "fp32", "tl.float32"),
    Memory("bf16", 16, "f32", torch.bfloat16, "uint16_t", "bf16", "tl.bfloat16"),
    Memory("f16", 16, "f32", torch.float16, "c10::Half", "fp16", "tl.float16"),
    Memory("f64", 64, "f64", torch.float64, "double", "fp64", "tl.float64"),
    Memory("u4", 4, "i32", torch.uint8, "uint8_t", "u8", ""),
    Memory("p4", 4, "i32", torch.uint8, "uint8_t", "u8", "tl.uint8"),
    Memory("p2", 2, "i32", torch.uint8, "uint8_t", "u8", "tl.uint8"),
    Memory("u8", 8, "i32", torch.uint8, "uint8_t", "u8", "tl.uint8"),
    Memory("i8", 8, "i32", torch.int8, "int8_t", "i8", "tl.int8"),
    Memory("i16", 16, "i32", torch.int16, "int16_t", "i16", "tl.int16"),
    Memory("i32", 32, "i32", torch.int32, "int32_t", "i32", "tl.int32"),
    Memory("i64", 64, "i64", torch.int64, "int64_t", "i64", "tl.int64"),
    Memory("bool", 8, "bool", torch.bool, "bool", "i1", "tl.int1"),
)
PACKED = ("p4", "p2")
"""Neighbours in a row share a byte, so groups of whole bytes are written on their own; "u4" is planar over a row."""

MEMORY = {each.name: each for each in _ALL}
"""By name."""

OF_DTYPE = {each.dtype: each for each in reversed(_ALL) if each.bits >= 8}
"""By the dtype of a tensor that holds one element an element."""
