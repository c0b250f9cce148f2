"""The tensors of a model that a file is to hold: each once, under the names of its ``state_dict``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qgalore_compile.exports.safetensors_file import DTYPES
from qgalore_compile.weights import Int8Weight
from qgalore_compile.weights.targets import foreign


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile``, DataParallel and DistributedDataParallel make of it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def tensors_of(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, and for each further name of one the name that it has there.

    Args:
        model: one that :func:`unwrapped` returned.
        dtype: that floats are to be stored in.

    Raises:
        ValueError: an entry of the state_dict cannot be stored, or there is none.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        name = key.replace("_orig_mod.", "")  # of a compiled part of the model
        if why := _unstorable(value, dtype):
            raise ValueError(f"{name}: {why}")
        kept = first.setdefault(identity(value), name)
        if kept == name:
            tensors[name] = value
        else:
            tied[name] = kept
    if not tensors:
        raise ValueError("the model has no weights: there is nothing to export")
    return tensors, tied


def identity(tensor: Tensor) -> object:
    """Equal for tensors that have the same elements in the same memory: tied weights."""
    if isinstance(tensor, Int8Weight):
        return "INT8", tensor.device, tensor.codes.data_ptr(), tuple(tensor.shape)
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.dtype, tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The values as an ordinary tensor; an INT8 weight is decoded straight into ``dtype``, not by way of its own."""
    return tensor.dequantize(dtype) if isinstance(tensor, Int8Weight) else tensor.detach().to(dtype)


def _unstorable(value: object, dtype: torch.dtype) -> str | None:
    """Why an entry of a state_dict cannot be in the file; None if it can."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} is no tensor, and safetensors holds nothing else"
    if isinstance(value, nn.parameter.UninitializedParameter):
        return "it is not initialised yet; run the model once first"
    if (why := foreign(value)) is not None:
        return why
    if value.is_meta:
        return "it is on the meta device and has no values; load the model first"
    if value.layout != torch.strided or value.is_quantized:
        return f"a tensor of layout {value.layout}, dtype {value.dtype} has no form in safetensors"
    if not value.is_floating_point():
        return None if value.dtype in DTYPES else f"dtype {value.dtype} has no form in safetensors"
    limit = torch.finfo(dtype).max
    if torch.finfo(value.dtype).max / 2 > limit and value.numel():  # bfloat16 and float32 end at nearly the same number
        low, high = (float(end) for end in as_dtype(value, value.dtype).aminmax())
        if limit < max(-low, high) < float("inf"):
            return f"it holds {max(-low, high):.3g}, and {str(dtype).removeprefix('torch.')} ends at {limit:.3g}"
    return None
