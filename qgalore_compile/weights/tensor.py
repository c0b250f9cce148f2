"""Weights that are stored in a format, with ordinary float gradients: ``QuantizedWeight``, ``Int8Weight`` among them.

The subclass takes part in PyTorch below autograd (``__torch_dispatch__``): every reading operation sees the
dequantised values, so ``F.linear`` and its backward dequantise on the fly and autograd's formulas stay PyTorch's own.
No float copy of the weight outlives the operation that asked for it: what autograd saves for backward is the
weight itself, or its transpose, which is a flag.

Writing is explicit.  ``copy_`` (hence ``load_state_dict``) quantises to nearest (``assigning.py`` has
the one exception), and :func:`write_back_` rounds stochastically for an optimizer.  Every other mutating operation
raises: a dequantising fallback would change a temporary and lose the result silently
(:mod:`qgalore_compile.weights.dequantising`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from qgalore_compile._torch import is_fake, skip_frames_of
from qgalore_compile.formats import Format, FormatError, Stored, encode
from qgalore_compile.formats.integers import Integers
from qgalore_compile.weights.callers import refuse_swap
from qgalore_compile.weights.dequantising import Dequantising, fall_back

aten = torch.ops.aten


HANDLERS: dict[Any, Callable[..., Any]] = {}
"""What operations do with a weight below autograd; ``operations.py`` fills it."""

_OWN = ("format", "size_stored", "transposed", "label", "_exported")


class QuantizedWeight(Dequantising):
    """A two-dimensional float tensor stored in a format, with groups along its rows.

    Attributes:
        format: how it is stored; each of its parts is an attribute: ``codes``, ``scale``, ….
        size_stored: (m, n), of what is stored.
        transposed: whether this is the (n, m) transpose of that.
        label: the parameter's name in the model that :func:`quantize_` was given, for messages; None elsewhere.

    ``dtype`` is what it dequantises to; ``.to(dtype)`` changes that and nothing else.  ``shape`` is that of the float
    tensor that it stands for.
    """

    __module__ = "qgalore_compile.weights"  # the public path, by which files name it

    format: Format
    size_stored: tuple[int, int]
    transposed: bool
    label: str | None
    _exported: Tensor | None

    @staticmethod
    def __new__(
        cls,
        parts: Sequence[Tensor],
        format: Format,
        size: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        requires_grad: bool = False,
    ) -> QuantizedWeight:
        """Wrap parts as they are; :meth:`from_float` quantises."""
        m, n = size
        shape, strides = ((n, m), (1, n)) if transposed else ((m, n), (n, 1))  # a tangent's layout must be the same
        with torch.inference_mode(False):  # an inference tensor has no version counter for its views to share
            self: QuantizedWeight = Tensor._make_wrapper_subclass(
                cls, shape, strides=strides, dtype=dtype, device=parts[0].device, requires_grad=requires_grad
            )
        for part, tensor in zip(format.parts, parts, strict=True):
            setattr(self, part.name, tensor)
        self.format, self.size_stored, self.transposed, self.label = format, size, transposed, None
        self._exported = None
        return self

    @staticmethod
    def wrapped(
        parts: Sequence[Tensor],
        format: Format,
        size: tuple[int, int],
        dtype: torch.dtype,
        transposed: bool = False,
        requires_grad: bool = False,
    ) -> QuantizedWeight:
        """Wrap parts in the class of their format."""
        own = Int8Weight if is_int8(format) else QuantizedWeight
        return QuantizedWeight.__new__(own, parts, format, size, dtype, transposed, requires_grad)

    @classmethod
    def from_float(cls, value: Tensor, format: Format | str | int = 256) -> QuantizedWeight:
        """Quantise ``value`` (m, n) to nearest; the result dequantises to value's dtype.

        Args:
            value: floating point.
            format: of storage, or its text; a number is that of INT8 elements in a group.

        Raises:
            ValueError: value is not two-dimensional, or holds NaN or Inf; no format of weights.
            TypeError: value is not floating point.
        """
        if value.dim() != 2:
            raise ValueError(
                f"an {cls.__name__} has two dimensions, got shape {tuple(value.shape)}; reshape it, or leave it "
                "in float"
            )
        if not has_int8_form(value):
            raise ValueError(f"a weight of shape {tuple(value.shape)} {NO_INT8_FORM}")
        own = weight_format(format)
        m, n = value.shape
        return cls.wrapped(encode(value.detach(), own), own, (m, n), value.dtype)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What it is stored in."""
        return tuple(getattr(self, part.name) for part in self.format.parts)

    @property
    def stored(self) -> Stored:
        """The same, beside the format."""
        return Stored(self.format, self.parts, self.size_stored)

    @property
    def storage_name(self) -> str:
        """The format, for messages."""
        return str(self.format)

    # -- what tracing and serialisation need --------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, tuple[int, int], torch.dtype, bool]]:
        names = [part.name for part in self.format.parts]
        return names, (self.format.text, self.size_stored, self.dtype, self.transposed)

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: dict[str, Tensor],
        context: tuple[str, tuple[int, int], torch.dtype, bool],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> QuantizedWeight:
        text, size, dtype, transposed = context
        form = Format.parse(text)
        return cls.wrapped([inner[part.name] for part in form.parts], form, size, dtype, transposed)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on beside the inner tensors' metadata; AOTAutograd's cache asks for it."""
        own = (self.format.text, self.dtype, self.transposed, tuple(self.shape), self.requires_grad)
        return f"{type(self).__name__}{own}"

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        label = f"{self.label!r}, " if self.label else ""
        how = f"group_size={self.format.width}" if is_int8(self.format) else f"format={self.format.text!r}"
        return f"{type(self).__name__}({label}shape={tuple(self.shape)}, {how}, dtype={self.dtype}{grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if not self.is_leaf:
            raise RuntimeError(f"{self!r} is no leaf of the graph of gradients: deepcopy weight.detach() instead")
        with torch.no_grad():
            new = like(self, torch.clone)
        new.requires_grad_(self.requires_grad)
        memo[id(self)] = new
        own = {name: value for name, value in vars(self).items() if name not in self._kept()}
        vars(new).update(copy.deepcopy(own, memo))
        if self.grad is not None:
            new.grad = copy.deepcopy(self.grad, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        kept = self._kept()
        attributes = {name: value for name, value in vars(self).items() if name not in kept or name == "label"}
        rest = (self.dtype, self.transposed, self.requires_grad, attributes)
        if is_int8(self.format):  # as files of before have it
            return _rebuilt, (self.parts, self.format.width, *rest)
        return _rebuilt_from_text, (self.parts, self.format.text, self.size_stored, *rest)

    def _kept(self) -> tuple[str, ...]:
        """Attributes that are the tensor, and no user's."""
        return (*_OWN, *(part.name for part in self.format.parts))

    # -- what a user calls ----------------------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float tensor that this stands for, detached, in ``dtype`` (its own by default)."""
        return torch.ops.qgalore.int8_dequantize(self.detach(), dtype or self.dtype)  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # writeable in the stubs only
        """Bytes of storage, all parts together."""
        return sum(part.nbytes for part in self.parts)

    @property
    def data(self) -> QuantizedWeight:
        """The same storage, detached.  Assigning a tensor to it quantises that tensor into the storage."""
        return self.detach()  # type: ignore[return-value]  # dispatch returns one of these

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            self.detach().copy_(value)

    def value(self) -> Tensor:
        """The floats that this stands for, as a plain tensor, below autograd."""
        return float_of(self)

    def storage(self) -> Any:
        """Refused, in the way in which a tensor without storage says it: libraries go on without one."""
        raise NotImplementedError(f"{self!r} has no storage of floats; {self._part_names()} have storages")

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
        value = float_of(self).contiguous()
        if self._exported is None:
            self._exported = value
        return self._exported.copy_(value).data_ptr()

    def _part_names(self) -> str:
        *names, last = (f"weight.{part.name}" for part in self.format.parts)
        return f"{', '.join(names)} and {last}" if names else last

    def share_memory_(self) -> QuantizedWeight:
        """Refused: the wrapper has no storage of its own, and PyTorch would crash on it."""
        raise NotImplementedError(f"{self!r} cannot move into shared memory; share {self._part_names()} instead")

    def _use_count(self) -> int:
        """PyTorch's own count; ``torch.utils.swap_tensors`` asks for it, and is refused what would end this storage."""
        refuse_swap(self)
        return super()._use_count()  # type: ignore[no-any-return, misc]

    # -- dispatch -----------------------------------------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func)
        return fall_back(func, args, kwargs or {}) if handler is None else handler(*args, **(kwargs or {}))


skip_frames_of(QuantizedWeight.__torch_dispatch__)


class Int8Weight(QuantizedWeight):
    """A two-dimensional float tensor stored as INT8 groups along its rows: Q-GaLore's weight.

    Attributes:
        codes: uint8 (m, n).
        scale, offset: float32 (m, ceil(n / group_size)).
    """

    __module__ = "qgalore_compile.weights"

    codes: Tensor
    scale: Tensor
    offset: Tensor

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
        parts, form = (codes, scale, offset), Format.parse(f"int8/{group_size}")
        self = QuantizedWeight.__new__(cls, parts, form, (m, n), dtype, transposed, requires_grad)
        assert isinstance(self, Int8Weight)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What files of before 0.2 restore attributes by."""
        vars(self).update({name: value for name, value in state.items() if name != "group_size"})
        self.format = Format.parse(f"int8/{state['group_size']}")
        self.size_stored = (self.codes.shape[0], self.codes.shape[1])

    @property
    def group_size(self) -> int:
        """Elements of a row that share a scale and an offset."""
        assert isinstance(self.format, Integers)
        return self.format.width

    @property
    def storage_name(self) -> str:
        """As messages call it."""
        return "INT8"


def is_int8(form: Format) -> TypeGuard[Integers]:
    """Whether a format is Q-GaLore's own of weights, which ``Int8Weight`` is the class of."""
    return isinstance(form, Integers) and form.inline and not form.planar


def weight_format(given: Format | str | int) -> Format:
    """A format of weights; ValueError for one that a trained weight cannot be kept in."""
    form = Format.parse(f"int8/{given}" if isinstance(given, int) else given)
    rows = form.grouped
    # the dynamic maps, of moments, have no -1: a weight at that end would drift
    in_rows = rows is not None and rows.axis == rows.default_axis == "rows" and rows.rounds
    if not (in_rows and form.trains):
        raise FormatError(
            f"{form} is no format of weights: those have groups in rows, and are written with stochastic rounding, "
            "such as 'int8/256', 'e4m3', 'nf4/64' or 'int4/128'; for bfloat16 use model.bfloat16()"
        )
    return form


def bad_weight_format(value: Any) -> str | None:
    """What is wrong with the text of a weights' format, for a table of settings; None for one that can be."""
    try:
        weight_format(value)
    except FormatError as error:
        return f"is no format of weights: {error}"
    return None


NO_INT8_FORM = "holds NaN or Inf, or spans more than float32 does, and has no INT8 form; repair it first"


def has_int8_form(value: Tensor) -> bool:
    """Whether a float tensor can be quantised: max - min is a finite float32; of a meta tensor or a fake one, yes."""
    if value.is_meta or is_fake(value) or value.numel() == 0 or isinstance(value, QuantizedWeight):
        return True
    low, high = value.detach().aminmax()
    return bool(torch.isfinite(high.to(torch.float32) - low.to(torch.float32)))


def float_of(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dequantised values as a plain tensor, below autograd."""
    value = weight.stored.load(dtype or weight.dtype)
    return value.t() if weight.transposed else value


def like(
    weight: QuantizedWeight,
    change: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
    transposed: bool | None = None,
) -> QuantizedWeight:
    """The same weight over changed inner tensors, with another dtype or orientation where one is given."""
    orientation = weight.transposed if transposed is None else transposed
    parts = [change(part) for part in weight.parts]
    own = (parts, weight.format, weight.size_stored, dtype or weight.dtype, orientation)
    result = QuantizedWeight.__new__(type(weight), *own)
    result.label = weight.label
    return result


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


def _rebuilt_from_text(
    parts: Sequence[Tensor],
    format: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    transposed: bool,
    requires_grad: bool,
    attributes: dict[str, Any],
) -> QuantizedWeight:
    """Likewise, of every other format."""
    weight = QuantizedWeight(parts, Format.parse(format), size, dtype, transposed, requires_grad)
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


_rebuilt.__module__ = _rebuilt_from_text.__module__ = Int8Weight.__module__


torch.serialization.add_safe_globals([Int8Weight, QuantizedWeight, _rebuilt, _rebuilt_from_text])
