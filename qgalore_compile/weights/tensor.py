"""``Int8Weight``: a parameter stored as INT8 groups, whose gradient is an ordinary float tensor.

The subclass takes part in PyTorch below autograd (``__torch_dispatch__``): every reading operation sees the
dequantised values, so ``F.linear`` and its backward dequantise on the fly and autograd's formulas stay PyTorch's own.
No float copy of the weight outlives the operation that asked for it: what autograd saves for backward is the INT8
weight itself, or its transpose, which is a flag.

Writing is explicit.  ``copy_`` (hence ``load_state_dict``) quantises to nearest (``assigning.py`` has
the one exception), and :func:`write_back_` rounds stochastically for an optimizer.  Every other mutating operation
raises: a dequantising fallback would change a temporary and lose the result silently
(:mod:`qgalore_compile.weights.dequantising`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgalore_compile import formats
from qgalore_compile._ops import define
from qgalore_compile._torch import is_fake, skip_frames_of
from qgalore_compile.weights.assigning import requantised
from qgalore_compile.weights.callers import refuse_swap
from qgalore_compile.weights.dequantising import Dequantising, fall_back

aten = torch.ops.aten


_OWN = ("codes", "scale", "offset", "group_size", "transposed", "label", "_exported")


class Int8Weight(Dequantising):
    """A two-dimensional float tensor stored as INT8 groups along its rows.

    Attributes:
        codes: uint8 (m, n).
        scale, offset: float32 (m, ceil(n / group_size)).
        group_size: elements of a row that share a scale and an offset.
        transposed: whether this is the (n, m) transpose of what is stored.
        label: the parameter's name in the model that :func:`quantize_` was given, for messages; None elsewhere.

    ``dtype`` is what it dequantises to; ``.to(dtype)`` changes that and nothing else.  ``shape`` is that of the float
    tensor that it stands for.
    """

    __module__ = "qgalore_compile.weights"  # the public path, by which files name it

    codes: Tensor
    scale: Tensor
    offset: Tensor
    group_size: int
    transposed: bool
    label: str | None
    _exported: Tensor | None

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor,
        group_size: int,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        requires_grad: bool = False,
    ) -> Int8Weight:
        """Wrap inner tensors as they are; :meth:`from_float` quantises."""
        m, n = codes.shape
        shape, strides = ((n, m), (1, n)) if transposed else ((m, n), (n, 1))  # a tangent's layout must be the same
        with torch.inference_mode(False):  # an inference tensor has no version counter for its views to share
            self: Int8Weight = Tensor._make_wrapper_subclass(
                cls, shape, strides=strides, dtype=dtype, device=codes.device, requires_grad=requires_grad
            )
        self.codes, self.scale, self.offset = codes, scale, offset
        self.group_size, self.transposed, self.label = group_size, transposed, None
        self._exported = None
        return self

    @classmethod
    def from_float(cls, value: Tensor, group_size: int = 256) -> Int8Weight:
        """Quantise ``value`` (m, n) to nearest; the result dequantises to value's dtype.

        Raises:
            ValueError: value is not two-dimensional, or holds NaN or Inf.
            TypeError: value is not floating point.
        """
        if value.dim() != 2:
            raise ValueError(
                f"an Int8Weight has two dimensions, got shape {tuple(value.shape)}; reshape it, or leave it in float"
            )
        if not has_int8_form(value):
            raise ValueError(f"a weight of shape {tuple(value.shape)} {NO_INT8_FORM}")
        return cls(*formats.quantize_int8(value.detach(), group_size), dtype=value.dtype)

    # -- what tracing and serialisation need --------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype, bool]]:
        return ["codes", "scale", "offset"], (self.group_size, self.dtype, self.transposed)

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: dict[str, Tensor],
        context: tuple[int, torch.dtype, bool],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> Int8Weight:
        group_size, dtype, transposed = context
        return cls(inner["codes"], inner["scale"], inner["offset"], group_size, dtype, transposed)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on beside the inner tensors' metadata; AOTAutograd's cache asks for it."""
        return f"Int8Weight({self.group_size},{self.dtype},{self.transposed},{tuple(self.shape)},{self.requires_grad})"

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        label = f"{self.label!r}, " if self.label else ""
        return f"Int8Weight({label}shape={tuple(self.shape)}, group_size={self.group_size}, dtype={self.dtype}{grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if not self.is_leaf:
            raise RuntimeError(f"{self!r} is no leaf of the graph of gradients: deepcopy weight.detach() instead")
        with torch.no_grad():
            new = _like(self, torch.clone)
        new.requires_grad_(self.requires_grad)
        memo[id(self)] = new
        own = {name: value for name, value in vars(self).items() if name not in _OWN}
        vars(new).update(copy.deepcopy(own, memo))
        if self.grad is not None:
            new.grad = copy.deepcopy(self.grad, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        attributes = {name: value for name, value in vars(self).items() if name not in _OWN or name == "label"}
        inner = (self.codes, self.scale, self.offset)
        return _rebuilt, (inner, self.group_size, self.dtype, self.transposed, self.requires_grad, attributes)

    # -- what a user calls ----------------------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float tensor that this stands for, detached, in ``dtype`` (its own by default)."""
        return _dequantize_op(self.detach(), dtype or self.dtype)  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # writeable in the stubs only
        """Bytes of storage: codes, scales and offsets."""
        return self.codes.nbytes + self.scale.nbytes + self.offset.nbytes

    @property
    def data(self) -> Int8Weight:
        """The same storage, detached.  Assigning a tensor to it quantises that tensor into the storage."""
        return self.detach()  # type: ignore[return-value]  # dispatch returns an Int8Weight

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            self.detach().copy_(value)

    def value(self) -> Tensor:
        """The floats that this stands for, as a plain tensor, below autograd."""
        return _float(self)

    def storage(self) -> Any:
        """Refused, in the way in which a tensor without storage says it: libraries go on without one."""
        raise NotImplementedError(f"{self!r} has no storage of floats; weight.codes, .scale and .offset have storages")

    def data_ptr(self) -> int:
        """Address of the floats that a detached weight stands for, in memory that lives as long as this object: for
        reading, as a file format does that knows plain tensors only.  What is written there is lost.

        A parameter has none, since it would keep the float copy that INT8 spares.
        """
        if isinstance(self, nn.Parameter):
            raise NotImplementedError(
                f"{self!r} has no floats in memory. To save a model in a format of plain tensors pass "
                "model.state_dict(); to tell weights apart use weight.codes.data_ptr()"
            )
        value = _float(self).contiguous()
        if self._exported is None:
            self._exported = value
        return self._exported.copy_(value).data_ptr()

    def share_memory_(self) -> Int8Weight:
        """Refused: the wrapper has no storage of its own, and PyTorch would crash on it."""
        raise NotImplementedError(
            f"{self!r} cannot move into shared memory; share weight.codes, weight.scale and weight.offset instead"
        )

    def _use_count(self) -> int:
        """PyTorch's own count; ``torch.utils.swap_tensors`` asks for it, and is refused what would end INT8 storage."""
        refuse_swap(self)
        return super()._use_count()  # type: ignore[no-any-return, misc]

    # -- dispatch -----------------------------------------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        return fall_back(func, args, kwargs or {}) if handler is None else handler(*args, **(kwargs or {}))


skip_frames_of(Int8Weight.__torch_dispatch__)

NO_INT8_FORM = "holds NaN or Inf, or spans more than float32 does, and has no INT8 form; repair it first"


def has_int8_form(value: Tensor) -> bool:
    """Whether a float tensor can be quantised: max - min is a finite float32; of a meta tensor or a fake one, yes."""
    if value.is_meta or is_fake(value) or value.numel() == 0 or isinstance(value, Int8Weight):
        return True
    low, high = value.detach().aminmax()
    return bool(torch.isfinite(high.to(torch.float32) - low.to(torch.float32)))


def _float(weight: Int8Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The dequantised values as a plain tensor, below autograd."""
    value = formats.dequantize_int8(
        weight.codes, weight.scale, weight.offset, weight.group_size, dtype=dtype or weight.dtype
    )
    return value.t() if weight.transposed else value


def _like(
    weight: Int8Weight,
    change: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
    transposed: bool | None = None,
) -> Int8Weight:
    """The same weight over changed inner tensors, with another dtype or orientation where one is given."""
    inner = (change(weight.codes), change(weight.scale), change(weight.offset))
    orientation = weight.transposed if transposed is None else transposed
    result = Int8Weight(*inner, weight.group_size, dtype or weight.dtype, orientation)
    result.label = weight.label
    return result


# -- the operations that keep INT8 or write it ------------------------------------------------------------------------


def _assign(weight: Int8Weight, codes: Tensor, scale: Tensor, offset: Tensor) -> Int8Weight:
    weight.codes.copy_(codes)
    weight.scale.copy_(scale)
    weight.offset.copy_(offset)
    return weight


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Int8Weight):
        assert isinstance(source, Int8Weight)
        return target.copy_(_float(source, target.dtype), non_blocking)
    if target.shape != source.shape:
        raise ValueError(
            f"cannot copy a tensor of shape {tuple(source.shape)} into {target!r}; the shapes must be equal"
        )
    if isinstance(source, Int8Weight):
        if (source.group_size, source.transposed) == (target.group_size, target.transposed):
            return _assign(target, source.codes, source.scale, source.offset)
        source = _float(source, torch.float32)
    source = source.to(target.device)
    stored = (target.codes, target.scale, target.offset)
    value = source.t() if target.transposed else source
    return _assign(target, *requantised(value, *stored, target.group_size, target.label))


def _to_copy(
    weight: Int8Weight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **kwargs: Any
) -> Tensor:
    dtype = dtype or weight.dtype
    if not dtype.is_floating_point:
        return _float(weight).to(dtype=dtype, device=device)
    non_blocking = kwargs.get("non_blocking", False)

    def moved(inner: Tensor) -> Tensor:
        return inner.clone() if device is None else inner.to(device, non_blocking=non_blocking, copy=True)

    return _like(weight, moved, dtype)


def _transpose(weight: Int8Weight) -> Int8Weight:
    return _like(weight, _same, transposed=not weight.transposed)


def _view(weight: Int8Weight, shape: Sequence[int]) -> Tensor:
    """A view of the same shape, which autograd takes of every parameter that a module moves, is INT8 still."""
    if tuple(shape) != tuple(weight.shape):
        return fall_back(aten.view.default, (weight, shape), {})  # type: ignore[no-any-return]
    return _like(weight, _same)


def _empty_like(
    weight: Int8Weight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **kwargs: Any
) -> Tensor:
    """INT8 where a device is given, which is how ``Module.to_empty`` asks; zeros, since rubbish may be NaN."""
    if device is None or not (dtype or weight.dtype).is_floating_point:
        return torch.empty_like(weight.value(), dtype=dtype, device=device, **kwargs)
    return _like(weight, lambda inner: torch.zeros_like(inner, device=device), dtype)


def _same(inner: Tensor) -> Tensor:
    return inner


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda weight: _like(weight, _same),
    aten.alias.default: lambda weight: _like(weight, _same),
    aten.clone.default: lambda weight, **_: _like(weight, torch.clone),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.empty_like.default: _empty_like,
    aten.view.default: _view,
    aten.t.default: _transpose,
    aten.transpose.int: lambda weight, dim0, dim1: _transpose(weight) if (dim0 + dim1) % 2 else _like(weight, _same),
    aten.permute.default: lambda weight, dims: _transpose(weight) if dims[0] % 2 else _like(weight, _same),
}


def _write_back(weight: Int8Weight, value: Tensor, noise: Tensor | None, ok: Tensor) -> None:
    if weight.transposed:
        raise ValueError("write back into the weight itself, not into its transpose")
    q = formats.quantize_int8(value, weight.group_size, noise=noise)
    _assign(
        weight,
        torch.where(ok, q.codes, weight.codes),
        torch.where(ok, q.scale, weight.scale),
        torch.where(ok, q.offset, weight.offset),
    )


def _needs_int8(weight: Tensor, *_: Any) -> Any:
    raise TypeError(f"an Int8Weight is needed here, got a {type(weight).__name__} of dtype {weight.dtype}")


# Both are one node to Dynamo; below, the dispatch above turns them into arithmetic and copies on codes, scale and
# offset, which is what compiler passes see.
_dequantize_op = define("int8_dequantize(Tensor weight, ScalarType dtype) -> Tensor", _needs_int8, None)
_write_back_op = define(
    "int8_write_back_(Tensor(a!) weight, Tensor value, Tensor? noise, Tensor ok) -> ()", _needs_int8, None
)
_HANDLERS[_dequantize_op] = _float
_HANDLERS[_write_back_op] = _write_back


def _rebuilt(
    inner: tuple[Tensor, Tensor, Tensor],
    group_size: int,
    dtype: torch.dtype,
    transposed: bool,
    requires_grad: bool,
    attributes: dict[str, Any],
) -> Int8Weight:
    """What pickle calls; the parts have been through ``map_location`` like every other tensor of a file."""
    weight = Int8Weight(*inner, group_size, dtype, transposed, requires_grad)
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


_rebuilt.__module__ = Int8Weight.__module__


def write_back_(weight: Int8Weight, value: Tensor, noise: Tensor | None, ok: Tensor) -> None:
    """Quantise ``value`` into ``weight``, or leave the weight as it is.

    Args:
        weight: (m, n), changed in place.
        value: float (m, n), the new weight.
        noise: int32 (m, n), 16 random bits an element, for stochastic rounding; None rounds to nearest.
        ok: 0-d bool; where False the weight keeps its codes, scales and offsets.
    """
    _write_back_op(weight, value, noise, ok)


torch.serialization.add_safe_globals([Int8Weight, _rebuilt])
