"""The storage formats: INT8 groups, packed INT4 groups and dynamic 8-bit blocks, as pure functions.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
affine.py             INT8 groups; INT4 groups, packed
dynamic.py            dynamic 8-bit blocks
official.py           official groups
grouping.py           rows in groups, the last of which may be short
rounding.py           stochastic rounding of floats to bfloat16 and float16
====================  =================================================================================================

====================  ======================  =================================  =======================
format                used for                code of x                          grouped along
====================  ======================  =================================  =======================
INT8 groups           weights                 round((x - min) / s), 0..255       the last dimension
INT4 groups, packed   projectors              round((x - min) / s), 0..15        the last dimension
dynamic 8-bit blocks  Adam's two moments      nearest entry of a fixed map       the flattened tensor
official groups       parity with Q-GaLore    clamp(round(x / s) + zero)         the last dimension
====================  ======================  =================================  =======================

A *group* is ``group_size`` neighbours of one row; a row that it does not divide ends in a short group, so no shape is
refused.  Affine groups store ``scale`` s = (max - min) / (2**bits - 1) and ``offset`` = min, both float32.  The
published Q-GaLore code stores an integer zero point clamped to 0..2**bits - 1 instead, which saturates every group
that does not straddle zero; it is kept as :func:`quantize_official` so that parity can be tested.  The dynamic map
needs no official variant: it is bitsandbytes' map, entry for entry.

All arithmetic is float32, whatever the input's dtype.  Affine formats need max - min within float32.  Nothing here
looks at values on the host, so every function traces into one graph.
"""

from __future__ import annotations

from qgalore_compile.formats.affine import (
    Int4Groups,
    Int8Groups,
    dequantize_int4,
    dequantize_int8,
    pack_int4,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)
from qgalore_compile.formats.dynamic import (
    BLOCK_SIZE,
    Dynamic8,
    dequantize_dynamic8,
    dynamic_map,
    quantize_dynamic8,
)
from qgalore_compile.formats.official import OfficialGroups, dequantize_official, quantize_official

__all__ = [
    "BLOCK_SIZE",
    "Dynamic8",
    "Int4Groups",
    "Int8Groups",
    "OfficialGroups",
    "dequantize_dynamic8",
    "dequantize_int4",
    "dequantize_int8",
    "dequantize_official",
    "dynamic_map",
    "pack_int4",
    "quantize_dynamic8",
    "quantize_int4",
    "quantize_int8",
    "quantize_official",
    "unpack_int4",
]
