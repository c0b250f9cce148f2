"""Quantised weights, as others import them: the tensor, and turning a model's linear weights into it.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
tensor.py             ``QuantizedWeight``, in any format; ``Int8Weight``, Q-GaLore's own
operations.py         what operations do with one: keep the storage, or write it; an optimizer's write-back
dequantising.py       reading a weight and its views; what would write into a temporary is refused
assigning.py          what ``copy_`` stores
collectives.py        torch.distributed on a weight
callers.py            callers in PyTorch that are refused by name
targets.py            which layers are meant
conversion.py         ``quantize_``, ``dequantize_``
filling.py            values for parameters on the meta device, in blocks of rows
places.py             what is on the meta device, shared when it has come, put back where that fails
initialization.py     ``initialize_``: first values, drawn weight by weight
coverage.py           what was taken, in words
====================  =================================================================================================
"""

from qgalore_compile.weights.conversion import dequantize_, quantize_
from qgalore_compile.weights.operations import write_back_
from qgalore_compile.weights.targets import BLOCK_LINEARS, Targets, select_linears
from qgalore_compile.weights.tensor import (
    Int8Weight,
    QuantizedWeight,
    _rebuilt,  # files name these two by this path
    _rebuilt_from_text,
)

__all__ = [
    "BLOCK_LINEARS",
    "Int8Weight",
    "QuantizedWeight",
    "Targets",
    "_rebuilt",
    "_rebuilt_from_text",
    "dequantize_",
    "quantize_",
    "select_linears",
    "write_back_",
]
