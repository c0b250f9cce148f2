"""INT8 weights, as others import them: the tensor, and turning a model's linear weights into it."""

from qgalore_compile.conversion import dequantize_, quantize_
from qgalore_compile.int8_weight import Int8Weight, _rebuilt, write_back_  # _rebuilt: files name it by this path
from qgalore_compile.targets import BLOCK_LINEARS, Targets, select_linears

__all__ = [
    "BLOCK_LINEARS",
    "Int8Weight",
    "Targets",
    "_rebuilt",
    "dequantize_",
    "quantize_",
    "select_linears",
    "write_back_",
]
