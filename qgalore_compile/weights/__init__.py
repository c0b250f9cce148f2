"""INT8 weights, as others import them: the tensor, and turning a model's linear weights into it.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
tensor.py             ``Int8Weight``, and the write-back of an optimizer
dequantising.py       reading a weight and its views; what would write into a temporary is refused
assigning.py          what ``copy_`` stores
collectives.py        torch.distributed on a weight
callers.py            callers in PyTorch that are refused by name
targets.py            which layers are meant
conversion.py         ``quantize_``, ``dequantize_``
coverage.py           what was taken, in words
====================  =================================================================================================
"""

from qgalore_compile.weights.conversion import dequantize_, quantize_
from qgalore_compile.weights.targets import BLOCK_LINEARS, Targets, select_linears
from qgalore_compile.weights.tensor import Int8Weight, _rebuilt, write_back_  # _rebuilt: files name it by this path

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
