"""Nested Python values as JSON and named tensors, and back: what a checkpoint holds, without pickle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgalore_compile.exports.safetensors_file import DTYPES
from qgalore_compile.formats import Format
from qgalore_compile.weights.targets import foreign
from qgalore_compile.weights.tensor import QuantizedWeight

NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""Floats that JSON has no word for."""


class _Apart:
    """Takes values apart; tensors that are the same memory become one."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[object, str] = {}

    def value(self, value: Any, at: str) -> Any:
        """A value as JSON; ``at``: its name, for tensors and messages."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (int, float, np.integer, np.floating, np.bool_)) and type(value) is not np.longdouble:
            return _number(value)
        if isinstance(value, Tensor):
            return self._tensor(value, at)
        for kind, (name, parts) in _KINDS.items():
            if type(value) is kind:
                return {name: self.value(parts(value), at)}
        if isinstance(value, (list, Mapping)):
            return self._collection(value, at)
        if callable(state_dict := getattr(value, "state_dict", None)):
            return self.value(state_dict(), at)
        raise TypeError(
            f"{at} is of type {type(value).__name__}, which has no place in a checkpoint: give numbers, texts, "
            "tensors, arrays, lists, tuples, dicts, or an object with a state_dict"
        )

    def _collection(self, value: list[Any] | Mapping[Any, Any], at: str) -> Any:
        if isinstance(value, list):
            return [self.value(each, f"{at}/{index}") for index, each in enumerate(value)]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self.value(each, f"{at}/{key}") for key, each in value.items()}
        pairs = [[self.value(key, at), self.value(each, f"{at}/{key}")] for key, each in value.items()]
        return {"$dict": pairs}

    def _tensor(self, value: Tensor, at: str) -> dict[str, Any]:
        if isinstance(value, QuantizedWeight):
            names = [f"{at}/{part.name}" for part in value.format.parts]
            own = [self._plain(part, name) for part, name in zip(value.parts, names, strict=True)]
            size, dtype = list(value.size_stored), str(value.dtype).removeprefix("torch.")
            return {"$quantized": [value.format.text, size, dtype, value.transposed, own]}
        return {"$tensor": self._plain(value, at)}

    def _plain(self, value: Tensor, at: str) -> str:
        why = foreign(value)
        if why is None and (value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES):
            why = f"a tensor of layout {value.layout} and dtype {value.dtype} has no form in safetensors"
        if why is None and value.is_meta:
            why = "it is on the meta device and has no values"
        if why is not None:
            raise TypeError(f"{at}: {why}")
        value = value.detach().resolve_conj().resolve_neg()
        while at in self.tensors:  # {"a/b": …} beside {"a": {"b": …}}
            at += "'"
        same = (value.data_ptr(), value.dtype, value.device, tuple(value.shape), value.stride())
        name = self._known.setdefault(same if value.numel() else at, at)
        self.tensors.setdefault(name, value)
        return name


def taken_apart(values: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Values as JSON, and the tensors in them by name.

    Args:
        values: numbers, texts, None, tensors (quantised weights too), NumPy arrays, lists, tuples, dicts, counters,
            sets, bytes, dtypes, devices, nested; an object with a ``state_dict`` stands for that.

    Raises:
        TypeError: anything else; names where it is.
    """
    apart = _Apart()
    return {key: apart.value(value, key) for key, value in values.items()}, apart.tensors


def put_together(found: Any, tensors: Callable[[str], Tensor]) -> Any:
    """The values that :func:`taken_apart` took apart.

    Args:
        found: JSON.
        tensors: a tensor by its name.

    Raises:
        ValueError: no JSON of that kind.
    """
    if isinstance(found, list):
        return [put_together(each, tensors) for each in found]
    if not isinstance(found, dict):
        return found
    if len(found) != 1 or not next(iter(found)).startswith("$"):
        return {key: put_together(each, tensors) for key, each in found.items()}
    ((name, held),) = found.items()
    if name == "$tensor":
        return tensors(held)
    if name == "$quantized":
        text, size, dtype, transposed, own = held
        parts = [tensors(each) for each in own]
        return QuantizedWeight.wrapped(parts, Format.parse(text), tuple(size), getattr(torch, dtype), transposed)
    if name not in _BACK:
        raise ValueError(f"{name!r} is not known; it was written by a later version")
    return _BACK[name](put_together(held, tensors))


def _number(value: Any) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    plain = float(plain) if isinstance(plain, float) else int(plain) if not isinstance(plain, bool) else plain
    if isinstance(plain, float) and not math.isfinite(plain):
        return {"$number": str(plain)}
    return plain


def _pairs(value: Mapping[Any, Any]) -> list[list[Any]]:
    return [[key, each] for key, each in value.items()]


def _dict(pairs: Iterable[Any]) -> dict[Any, Any]:
    return {key: each for key, each in pairs}  # noqa: C416  # lists, not tuples


_KINDS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    tuple: ("$tuple", list),
    torch.Size: ("$tuple", list),
    set: ("$set", lambda value: sorted(value, key=repr)),
    Counter: ("$counter", _pairs),
    bytes: ("$bytes", bytes.hex),
    np.ndarray: ("$array", torch.from_numpy),
    torch.dtype: ("$dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("$device", str),
}
"""By type: its name, and what it is made of."""

_BACK: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$counter": lambda pairs: Counter(_dict(pairs)),
    "$dict": _dict,
    "$bytes": bytes.fromhex,
    "$array": lambda tensor: tensor.numpy(),
    "$dtype": lambda name: getattr(torch, name),
    "$device": torch.device,
    "$number": NUMBERS.__getitem__,
}
