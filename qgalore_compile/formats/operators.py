"""``encode`` and ``decode`` as operators: one node each in a traced program, whatever the format.

A quantised operand of a compiled step is then a ``decode`` of inputs, and a write-back an ``encode``; both carry the
format's text, by which kernels are generated for them.  Formats that are ``inline`` are plain PyTorch in a graph: there
``decode`` is a composite operator (``composites.py``), and ``encode`` is traced through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore_compile._ops import define, define_traced
from qgalore_compile.composites import COMPOSITES, Composite, stay
from qgalore_compile.formats.base import Format, dtype_of


def _encode(x: Tensor, noise: Tensor | None, format: str) -> list[Tensor]:
    return [each.contiguous() for each in Format.parse(format).encode(x, noise)]


def _encode_fake(x: Tensor, noise: Tensor | None, format: str) -> list[Tensor]:
    own = Format.parse(format)
    return [x.new_empty(own.shape_of(part, x.shape), dtype=dtype_of(part)) for part in own.parts]


def _decode(stored: Sequence[Tensor], shape: Sequence[int], format: str, dtype: torch.dtype) -> Tensor:
    return Format.parse(format).decode(stored, shape, dtype).contiguous()


def _decode_fake(stored: Sequence[Tensor], shape: Sequence[int], format: str, dtype: torch.dtype) -> Tensor:
    return stored[0].new_empty(tuple(shape), dtype=dtype)


_encode_op = define("encode(Tensor x, Tensor? noise, str format) -> Tensor[]", _encode, _encode_fake)
_decode_op = define(
    "decode(Tensor[] stored, SymInt[] shape, str format, ScalarType dtype) -> Tensor", _decode, _decode_fake
)
TRACED = {
    _decode_op: define_traced(
        "decode.traced(Tensor[] stored, SymInt[] shape, str format, ScalarType dtype) -> Tensor", _decode
    )
}
"""Of a composite operator, the overload that is traced through."""


COMPOSITES[_decode_op] = Composite(_decode, lambda stored, shape, format, dtype: Format.parse(format).inline)


def encode(x: Tensor, format: Format, noise: Tensor | None = None) -> list[Tensor]:
    """:meth:`Format.encode`, as one node where it is traced."""
    return format.encode(x, noise) if format.inline else list(_encode_op(x, noise, format.text))


def decode(
    stored: Sequence[Tensor], shape: Sequence[int], format: Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:meth:`Format.decode`, as one node where it is traced."""
    if format.inline and not stay():
        return format.decode(stored, shape, dtype)
    return _decode_op(list(stored), list(shape), format.text, dtype)  # type: ignore[no-any-return]
