"""What operations do with quantised weights below autograd: those that keep the storage, and those that write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qgalore_compile._ops import define
from qgalore_compile.weights.assigning import requantised
from qgalore_compile.weights.dequantising import fall_back
from qgalore_compile.weights.tensor import HANDLERS, QuantizedWeight, float_of, like

aten = torch.ops.aten


def _assign(weight: QuantizedWeight, parts: Sequence[Tensor]) -> QuantizedWeight:
    for part, new in zip(weight.parts, parts, strict=True):
        part.copy_(new)
    return weight


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, QuantizedWeight):
        assert isinstance(source, QuantizedWeight)
        return target.copy_(float_of(source, target.dtype), non_blocking)
    if target.shape != source.shape:
        raise ValueError(
            f"cannot copy a tensor of shape {tuple(source.shape)} into {target!r}; the shapes must be equal"
        )
    if isinstance(source, QuantizedWeight):
        if (source.format, source.transposed) == (target.format, target.transposed):
            return _assign(target, source.parts)
        source = float_of(source, torch.float32)
    source = source.to(target.device)
    return _assign(target, requantised(source.t() if target.transposed else source, target.stored, target.label))


def _to_copy(
    weight: QuantizedWeight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **kwargs: Any
) -> Tensor:
    dtype = dtype or weight.dtype
    if not dtype.is_floating_point:
        return float_of(weight).to(dtype=dtype, device=device)
    non_blocking = kwargs.get("non_blocking", False)

    def moved(inner: Tensor) -> Tensor:
        return inner.clone() if device is None else inner.to(device, non_blocking=non_blocking, copy=True)

    return like(weight, moved, dtype)


def _transpose(weight: QuantizedWeight) -> QuantizedWeight:
    return like(weight, _same, transposed=not weight.transposed)


def _view(weight: QuantizedWeight, shape: Sequence[int]) -> Tensor:
    """A view of the same shape, which autograd takes of every parameter that a module moves, is INT8 still."""
    if tuple(shape) != tuple(weight.shape):
        return fall_back(aten.view.default, (weight, shape), {})  # type: ignore[no-any-return]
    return like(weight, _same)


def _empty_like(
    weight: QuantizedWeight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **kwargs: Any
) -> Tensor:
    """INT8 where a device is given, which is how ``Module.to_empty`` asks; zeros, since rubbish may be NaN."""
    if device is None or not (dtype or weight.dtype).is_floating_point:
        return torch.empty_like(weight.value(), dtype=dtype, device=device, **kwargs)
    return like(weight, lambda inner: torch.zeros_like(inner, device=device), dtype)


def _same(inner: Tensor) -> Tensor:
    return inner


HANDLERS |= {
    aten.detach.default: lambda weight: like(weight, _same),
    aten.alias.default: lambda weight: like(weight, _same),
    aten.clone.default: lambda weight, **_: like(weight, torch.clone),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.empty_like.default: _empty_like,
    aten.view.default: _view,
    aten.t.default: _transpose,
    aten.transpose.int: lambda weight, dim0, dim1: _transpose(weight) if (dim0 + dim1) % 2 else like(weight, _same),
    aten.permute.default: lambda weight, dims: _transpose(weight) if dims[0] % 2 else like(weight, _same),
}


def _write_back(weight: QuantizedWeight, value: Tensor, noise: Tensor | None, ok: Tensor) -> None:
    if weight.transposed:
        raise ValueError("write back into the weight itself, not into its transpose")
    weight.stored.store_(value, noise, ok)


def _needs_int8(weight: Tensor, *_: Any) -> Any:
    found = f"a {type(weight).__name__} of dtype {weight.dtype}"
    raise TypeError(f"a quantised weight such as an Int8Weight is needed here, got {found}")


# Both are one node to Dynamo; below, the dispatch above turns them into arithmetic and copies on codes, scale and
# offset, which is what compiler passes see.
_dequantize_op = define("int8_dequantize(Tensor weight, ScalarType dtype) -> Tensor", _needs_int8, None)
_write_back_op = define(
    "int8_write_back_(Tensor(a!) weight, Tensor value, Tensor? noise, Tensor ok) -> ()", _needs_int8, None
)
HANDLERS[_dequantize_op] = float_of
HANDLERS[_write_back_op] = _write_back


def write_back_(weight: QuantizedWeight, value: Tensor, noise: Tensor | None, ok: Tensor) -> None:
    """Quantise ``value`` into ``weight``, or leave the weight as it is.

    Args:
        weight: (m, n), changed in place.
        value: float (m, n), the new weight.
        noise: int32 (m, n), 16 random bits an element, for stochastic rounding; None rounds to nearest.
        ok: 0-d bool; where False the weight keeps what is stored.
    """
    _write_back_op(weight, value, noise, ok)
