"""The storage formats: how floats are kept in fewer bits, an object for each way.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
base.py               ``Format``, what all of them are; ``Grouped``, codes in groups
registry.py           the formats that there are, a row each, and how their texts are read
stored.py             ``Stored``: tensors beside the format that they are in, read and written as floats
operators.py          ``encode`` and ``decode``, one node each in a traced program
integers.py           int8, int6, int4
minifloat.py          e4m3, e5m2, e2m3, e3m2, e2m1, e3m0, by one description
nf4.py                sixteen entries, quantiles of a normal distribution
moment4.py            sixteen entries each for Adam's m and √v
dynamic4.py           bitsandbytes' dynamic map in sixteen entries
dynamic.py            bitsandbytes' dynamic 8-bit blocks
plain.py              float32, bfloat16
official.py           Q-GaLore's published quantiser
--------------------  -------------------------------------------------------------------------------------------------
symmetric.py          the common half of formats whose group shares its largest magnitude
codebook.py           formats of sixteen entries
scaling.py            groups with a scale: as it is, or as a power of two
double.py             scales that are quantised once more
rotation.py           groups that are rotated before
arithmetic.py         what formulas are written in, on tensors or in a program; stochastic rounding of codes
packing.py            codes of fewer than eight bits in bytes
grouping.py           rows in groups, the last of which may be short
affine.py             INT8 and planar INT4 groups as functions, which Q-GaLore's own tensors are traced to
rounding.py           stochastic rounding of floats to bfloat16 and float16
====================  =================================================================================================

A *group* is so many neighbours of one row, or of the flattened tensor; a row that it does not divide ends in a short
group, so no shape is refused.  The published Q-GaLore code stores an integer zero point clamped to 0..2**bits - 1 where
integers here have an offset, which saturates every group that does not straddle zero; it is kept as
:func:`quantize_official` so that parity can be tested.  The dynamic map needs no official variant: it is bitsandbytes'
map, entry for entry.

All arithmetic is float32, whatever the input's dtype; max - min must be within it.  Nothing here looks at values on the
host, so everything traces into one graph.  ``docs/formats.md`` has the formats' errors and what they cost in training.
"""

from __future__ import annotations

from qgalore_compile.formats.affine import (
    Int4Groups,
    Int8Groups,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
)
from qgalore_compile.formats.base import Format, FormatError, Part
from qgalore_compile.formats.dynamic import (
    BLOCK_SIZE,
    Dynamic8,
    dequantize_dynamic8,
    dynamic_map,
    quantize_dynamic8,
)
from qgalore_compile.formats.official import OfficialGroups, dequantize_official, quantize_official
from qgalore_compile.formats.operators import decode, encode
from qgalore_compile.formats.packing import pack_int4, unpack_int4
from qgalore_compile.formats.registry import FORMATS
from qgalore_compile.formats.stored import Stored

__all__ = [
    "BLOCK_SIZE",
    "FORMATS",
    "Dynamic8",
    "Format",
    "FormatError",
    "Int4Groups",
    "Int8Groups",
    "OfficialGroups",
    "Part",
    "Stored",
    "decode",
    "dequantize_dynamic8",
    "dequantize_int4",
    "dequantize_int8",
    "dequantize_official",
    "dynamic_map",
    "encode",
    "pack_int4",
    "quantize_dynamic8",
    "quantize_int4",
    "quantize_int8",
    "quantize_official",
    "unpack_int4",
]
