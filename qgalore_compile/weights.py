"""``Int8Weight``: a parameter stored as INT8 groups, whose gradient is an ordinary float tensor.

The subclass takes part in PyTorch below autograd (``__torch_dispatch__``): every reading operation sees the
dequantised values, so ``F.linear`` and its backward dequantise on the fly and autograd's formulas stay PyTorch's own.
No float copy of the weight outlives the operation that asked for it: what autograd saves for backward is the INT8
weight itself, or its transpose, which is a flag.

Writing is explicit.  ``copy_`` (hence ``load_state_dict``) quantises to nearest, and :func:`write_back_` rounds
stochastically for an optimizer.  Every other mutating operation raises: a dequantising fallback would change a
temporary and lose the result silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgalore_compile import formats
from qgalore_compile._ops import define
from qgalore_compile._torch import disabled_torch_function, is_fake, tree_map_only

aten = torch.ops.aten

Targets = str | re.Pattern[str] | Iterable[str] | Callable[[str, nn.Linear], bool]
"""What :func:`quantize_` turns into INT8: name endings, a regular expression, or ``predicate(name, linear)``."""

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a LLaMA block: those that Q-GaLore keeps in INT8 and projects."""


class Int8Weight(Tensor):
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

    codes: Tensor
    scale: Tensor
    offset: Tensor
    group_size: int
    transposed: bool
    label: str | None

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
        shape = codes.shape[::-1] if transposed else codes.shape
        with torch.inference_mode(False):  # an inference tensor has no version counter for its views to share
            self: Int8Weight = Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=codes.device, requires_grad=requires_grad
            )
        self.codes, self.scale, self.offset = codes, scale, offset
        self.group_size, self.transposed, self.label = group_size, transposed, None
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
        if not _has_int8_form(value):
            raise ValueError(f"a weight of shape {tuple(value.shape)} {_NO_INT8_FORM}")
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

    def share_memory_(self) -> Int8Weight:
        """Refused: the wrapper has no storage of its own, and PyTorch would crash on it."""
        raise NotImplementedError(
            f"{self!r} cannot move into shared memory; share weight.codes, weight.scale and weight.offset instead"
        )

    # -- dispatch -----------------------------------------------------------------------------------------------

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():  # composite operations arrive whole there
            return func.decompose(*args, **kwargs)
        _refuse_what_would_be_lost(func, args, kwargs)
        args, kwargs = tree_map_only(Int8Weight, _float, (args, kwargs))
        return func(*args, **kwargs)


_NO_INT8_FORM = "holds NaN or Inf, or spans more than float32 does, and has no INT8 form; repair it first"


def _has_int8_form(value: Tensor) -> bool:
    """Whether max - min is a finite float32; a meta tensor or a fake one holds no values to ask."""
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


def _refuse_what_would_be_lost(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where a result or a change would land in a temporary: mutating operations, and views to be written to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(item, Int8Weight):
                continue
            if argument.alias_info.is_write:
                raise NotImplementedError(
                    f"{func} would change {item!r} in place, which INT8 storage cannot do. To assign values use "
                    "weight.copy_(float_tensor), which quantises; to train it use qgalore_compile.QGaLoreAdamW, "
                    "which writes it back with stochastic rounding"
                )
            if func not in _READ_ONLY_VIEWS:
                raise NotImplementedError(
                    f"{func} would be a view of {item!r}, and what is written into it would be lost, for its storage "
                    "is INT8. Read from weight.dequantize() instead, and write whole weights with weight.copy_()"
                )


# matmul expands a weight that it does not fold; writing into an expanded tensor is an error in PyTorch already
_READ_ONLY_VIEWS = {aten.expand.default}


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
    value = source.to(device=target.device, dtype=torch.float32)
    q = formats.quantize_int8(value.t() if target.transposed else value, target.group_size)
    return _assign(target, q.codes, q.scale, q.offset)


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


def _view(weight: Int8Weight, shape: Sequence[int]) -> Int8Weight:
    """A view of the same shape, which autograd takes of every parameter that a module moves; no other one exists."""
    if tuple(shape) != tuple(weight.shape):
        _refuse_what_would_be_lost(aten.view.default, (weight, shape), {})
    return _like(weight, _same)


def _same(inner: Tensor) -> Tensor:
    return inner


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda weight: _like(weight, _same),
    aten.alias.default: lambda weight: _like(weight, _same),
    aten.clone.default: lambda weight, **_: _like(weight, torch.clone),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
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


def write_back_(weight: Int8Weight, value: Tensor, noise: Tensor | None, ok: Tensor) -> None:
    """Quantise ``value`` into ``weight``, or leave the weight as it is.

    Args:
        weight: (m, n), changed in place.
        value: float (m, n), the new weight.
        noise: int32 (m, n), 16 random bits an element, for stochastic rounding; None rounds to nearest.
        ok: 0-d bool; where False the weight keeps its codes, scales and offsets.
    """
    _write_back_op(weight, value, noise, ok)


torch.serialization.add_safe_globals([Int8Weight])


# -- turning a model's weights into INT8 ------------------------------------------------------------------------------


def select_linears(model: nn.Module, targets: Targets | None = None) -> list[tuple[str, nn.Linear]]:
    """The linear layers that ``targets`` names, in the model's order.

    Args:
        model: any module.
        targets: None for the linear layers of the blocks: those inside an ``nn.ModuleList`` or ``nn.Sequential``,
            so not the head; a name, or several, matched against the last parts of a layer's dotted name; a compiled
            regular expression, searched in the whole name; or ``predicate(name, linear) -> bool``.

    Raises:
        ValueError: no layer matches, or one of the names matches none.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if targets is None:
        chosen = [(name, linear) for name, linear in linears if _in_a_block(model, name)]
    elif callable(targets):
        chosen = [(name, linear) for name, linear in linears if targets(name, linear)]
    elif isinstance(targets, re.Pattern):
        chosen = [(name, linear) for name, linear in linears if targets.search(name)]
    else:
        names = [targets] if isinstance(targets, str) else list(targets)
        for wanted in names:
            if not any(_ends_with(name, wanted) for name, _ in linears):
                raise ValueError(_no_match(f"{wanted!r} names none", linears))
        chosen = [(name, linear) for name, linear in linears if any(_ends_with(name, wanted) for wanted in names)]
    if not chosen:
        raise ValueError(_no_match(f"targets={targets!r} select none", linears))
    return chosen


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _in_a_block(model: nn.Module, name: str) -> bool:
    """Whether a ModuleList or Sequential *below* the model holds it; a model that is one itself has blocks only."""
    parts = name.split(".")
    ancestors = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return any(isinstance(ancestor, (nn.ModuleList, nn.Sequential)) for ancestor in ancestors)


def _no_match(what: str, linears: list[tuple[str, nn.Linear]]) -> str:
    have = ", ".join(name for name, _ in linears[:12]) + (", …" if len(linears) > 12 else "")
    return f"{what} of the model's linear layers ({have or 'it has no nn.Linear'}); pass targets= with names that exist"


def quantize_(model: nn.Module, *, group_size: int = 256, targets: Targets | None = None) -> nn.Module:
    """Turn matching ``nn.Linear`` weights into :class:`Int8Weight` parameters, in place.

    Args:
        model: changed in place, one weight at a time, so that no second copy of the model is needed.
        group_size: elements of a row that share a scale and an offset.
        targets: as for :func:`select_linears`.

    Returns:
        The model.

    Raises:
        ValueError: nothing matches; a weight holds NaN or Inf; a matching weight is shared with a module that is no
            matching linear layer (a tied embedding).  The model is then as it was.
    """
    chosen = select_linears(model, targets)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    names = {name for name, _ in chosen}
    for name, linear in chosen:
        others = [owner for owner in owners[id(linear.weight)] if owner not in names]
        if others:
            raise ValueError(
                f"{name}.weight of shape {tuple(linear.weight.shape)} is shared with {', '.join(others)}; "
                "leave it out of targets, or untie it"
            )
        if not _has_int8_form(linear.weight):
            raise ValueError(f"{name}.weight of shape {tuple(linear.weight.shape)} {_NO_INT8_FORM}")
    converted: dict[int, nn.Parameter] = {}  # layers may share one weight: they share it afterwards too
    for name, linear in chosen:
        old = linear.weight
        if isinstance(old, Int8Weight):
            continue
        if id(old) not in converted:
            quantised = Int8Weight.from_float(old, group_size)
            quantised.label = f"{name}.weight"
            converted[id(old)] = nn.Parameter(quantised, requires_grad=old.requires_grad)
        linear.weight = converted[id(old)]
    return model
