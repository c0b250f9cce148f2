"""Tensors without float storage that every reading operation sees as floats, and views of them that refuse writes.

Below autograd (``__torch_dispatch__``) an operation gets the dequantised values.  Three kinds of operation must not:
one that writes, for it would change a temporary; one that returns a view, for what is written into the view later would
be lost, so the view is a :class:`DequantisedView`, which refuses that; and a collective, whose schema tells neither
(``collectives.py``).  In a traced graph a view is refused outright: nothing there could refuse a write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qgalore_compile._torch import disabled_torch_function, is_fake, skip_frames_of, tree_leaves, tree_map_only
from qgalore_compile.weights.callers import refuse_lists, refuse_removal, refuse_shards
from qgalore_compile.weights.collectives import collective, is_collective

REMEDY = (
    "to assign values use weight.copy_(float_tensor), which quantises; to train it use qgalore_compile.QGaLoreAdamW, "
    "which writes it back with stochastic rounding; for an average, a merge or another optimizer keep floats: "
    "qgalore_compile.dequantize_(model), on a copy.deepcopy of the model where the INT8 one goes on"
)


class Dequantising(Tensor):
    """Base of :class:`~qgalore_compile.Int8Weight` and of views of one."""

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    def value(self) -> Tensor:
        """The floats that this stands for, as a plain tensor, below autograd."""
        raise NotImplementedError

    def is_complex(self) -> bool:
        """No; c10d asks this of every tensor in a list before it takes the list to where there are no floats.

        Raises:
            NotImplementedError: it is c10d that asks, and it would read the floats or write into a view.
        """
        refuse_lists(self, writable=not isinstance(self, DequantisedView))
        return False

    def numpy(self, *, force: bool = False) -> Any:
        """The floats as an array of NumPy, in memory of its own."""
        if self.requires_grad and not force:
            raise RuntimeError("numpy() was called on a tensor that requires grad; use tensor.detach().numpy()")
        return self.detach().value().cpu().numpy()  # type: ignore[attr-defined]  # dispatch returns one of these

    def __dlpack__(self, **_: Any) -> Any:
        """Refused: the protocol hands out memory, and there is none of floats."""
        raise BufferError(f"{self!r} has no floats in memory to hand out by DLPack; take weight.dequantize()")

    def apply_(self, _: Any) -> Any:
        """Refused: PyTorch would write to floats that are not there."""
        raise NotImplementedError(f"apply_ would change {self!r} in place, which INT8 storage cannot do; {REMEDY}")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return fall_back(func, args, kwargs or {})


class DequantisedView(Dequantising):
    """What slicing, reshaping and other views of an INT8 weight return outside compiled code: floats to be read.

    Attributes:
        floats: plain tensor with the values.
        of: the weight, in words.
    """

    floats: Tensor
    of: str

    @staticmethod
    def __new__(cls, floats: Tensor, of: str) -> DequantisedView:
        """Wrap ``floats``, of any shape."""
        with torch.inference_mode(False):  # an inference tensor has no version counter for its views to share
            self: DequantisedView = Tensor._make_wrapper_subclass(
                cls, floats.shape, strides=floats.stride(), dtype=floats.dtype, device=floats.device
            )
        self.floats, self.of = floats, of
        return self

    def value(self) -> Tensor:
        """The values."""
        return self.floats

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"a view of {self.of}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.floats.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.floats.clone().__reduce_ex__(protocol)


def fall_back(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on floats.

    Raises:
        NotImplementedError: it would write into one of them, or it is a collective that has no meaning for INT8.
    """
    if is_collective(func):
        return collective(func, args, kwargs)
    if torch.is_inference_mode_enabled() and func._can_decompose():  # composite operations arrive whole there
        return func.decompose(*args, **kwargs)
    viewed = _refuse_writes(func, args, kwargs)
    if viewed is not None:
        refuse_shards(viewed)
    refuse_removal(lambda: next(each for each in tree_leaves((args, kwargs)) if isinstance(each, Dequantising)))
    args, kwargs = tree_map_only(Dequantising, lambda each: each.value(), (args, kwargs))
    result = func(*args, **kwargs)
    if viewed is None:
        return result
    of = viewed.of if isinstance(viewed, DequantisedView) else repr(viewed)
    wrap: Callable[[Tensor], Tensor] = lambda each: DequantisedView(each, of)  # noqa: E731
    return [wrap(each) for each in result] if isinstance(result, (list, tuple)) else wrap(result)


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dequantising | None:
    """Raise where a change would land in a temporary; return what ``func`` makes views of, None if of nothing."""
    viewed = None
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(item, Dequantising):
                continue
            if argument.alias_info.is_write and isinstance(item, DequantisedView):
                raise NotImplementedError(
                    f"{func} would change {item!r}, and the change would be lost, for that weight's storage is INT8; "
                    f"a whole weight is written at once: {REMEDY}"
                )
            if argument.alias_info.is_write:
                raise NotImplementedError(
                    f"{func} would change {item!r} in place, which INT8 storage cannot do; {REMEDY}"
                )
            if func not in _READ_ONLY_VIEWS:
                viewed = item
    if viewed is not None and is_fake(viewed.value()):
        raise NotImplementedError(
            f"{func} would be a view of {viewed!r} in compiled code, and what is written into it would be lost, for "
            "its storage is INT8. Read from weight.dequantize() instead, and write whole weights with weight.copy_()"
        )
    return viewed


# matmul expands a weight that it does not fold; writing into an expanded tensor is an error in PyTorch already
_READ_ONLY_VIEWS = {torch.ops.aten.expand.default}

skip_frames_of(Dequantising.__torch_dispatch__)
