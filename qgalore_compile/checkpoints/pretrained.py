"""``load_pretrained``: a float checkpoint, streamed into a quantised model one tensor at a time."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qgalore_compile.exports.tensors import unwrapped
from qgalore_compile.formats import Format
from qgalore_compile.weights.conversion import quantize_
from qgalore_compile.weights.filling import blocks, empty, fill_
from qgalore_compile.weights.initialization import initialize_buffers
from qgalore_compile.weights.places import Places
from qgalore_compile.weights.targets import Targets, select_linears
from qgalore_compile.weights.tensor import NO_INT8_FORM, QuantizedWeight, has_int8_form
from qgalore_compile.words import listed

_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file: which, under which name, and what it looks like."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load_pretrained(
    model: nn.Module | type[Any],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    group_size: int = 256,
    targets: Targets | None = None,
    format: Format | str | None = None,
) -> Any:
    """Load safetensors into a model whose linear weights are quantised as they come: the float model never exists.

    ::

        model = qg.load_pretrained(AutoModelForCausalLM, "SmolLM2-135M")

    What is there at any time is the quantised model and some float rows; of a format with double quantisation, which
    keeps a weight's rows together, a float weight.  The weights are those that loading in float and
    :func:`~qgalore_compile.quantize_` would give, bit for bit.

    Args:
        model: a class of transformers, of which a model is built from the folder's config without memory; or a model,
            changed in place, on the meta device or not, quantised already or not.
        folder: with ``model.safetensors``, or shards and ``model.safetensors.index.json``; or one file.
        dtype: of floats, and what quantised weights dequantise to, of a model that is built here; default: the
            config's.
        device: where what is on the meta device goes.
        group_size, targets, format: as for :func:`~qgalore_compile.quantize_`, of a model that is not quantised yet.

    Returns:
        The model, in training mode as a new one is.

    Raises:
        ValueError: the file lacks a weight of the model or has one that the model lacks, or one of another shape; a
            file is missing or damaged; a weight holds NaN or Inf; nothing gives values to a buffer.  Names and shapes
            are looked at before anything is loaded.
        TypeError: ``model`` is neither a model nor a class with a config.
    """
    source = Path(folder)
    found = _entries(source)
    built = _build(model, source, dtype, found) if isinstance(model, type) else model
    _check_asked(model, built, dtype)
    bare = unwrapped(built)
    quantised = any(isinstance(each, QuantizedWeight) for each in bare.parameters())
    if quantised and (group_size != 256 or targets is not None or format is not None):
        raise ValueError("the model is quantised already: leave group_size, targets and format out")
    tensors = _tensors(bare)
    pairs = _matched(bare, tensors, found)
    chosen = set() if quantised else {f"{name}.weight" for name, _ in select_linears(bare, targets)}
    _check_finite(tensors, pairs, chosen)
    with Places(bare).restored_on_error():
        if not quantised:
            quantize_(bare, group_size=group_size, targets=targets, format=format)
        _load_all(bare, pairs, device)
        if any(buffer.is_meta for buffer in bare.buffers()):
            initialize_buffers(bare, device)
    return built


def _check_asked(given: object, built: object, dtype: torch.dtype | None) -> None:
    if not isinstance(built, nn.Module):
        raise TypeError(f"load_pretrained takes a model or a class of transformers, not {type(given).__name__}")
    if given is built and dtype is not None:
        raise ValueError("dtype is for a model that is built here; convert yours: model.to(dtype)")


# -- what there is -----------------------------------------------------------------------------------------------------


def _entries(source: Path) -> dict[str, _Entry]:
    """The tensors of a folder, or of one file, by name."""
    return {entry.name: entry for path in _files(source) for entry in _entries_of(path)}


def _entries_of(path: Path) -> list[_Entry]:
    try:
        with safe_open(path, "pt") as file:
            looks = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return [_Entry(path, name, tuple(look.get_shape()), str(look.get_dtype())) for name, look in looks.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    index, single = source / _INDEX, source / "model.safetensors"
    if single.is_file():  # first, as transformers: an index beside it was left behind by an earlier, sharded one
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of shards: {error!r}") from error
        if missing := [name for name in names if not (source / name).is_file()]:
            raise ValueError(f"{index} names {listed(missing)}, which {'are' if len(missing) > 1 else 'is'} "
                             "not there; fetch all shards")  # fmt: skip
        return [source / name for name in names]
    others = sorted(each.name for each in source.glob("*.bin")) if source.is_dir() else []
    hint = f"; {', '.join(others[:2])} is pickled: save it anew with safetensors" if others else ""
    raise ValueError(f"{source} holds neither model.safetensors nor {_INDEX}{hint}")


def _build(kind: type[Any], source: Path, dtype: torch.dtype | None, found: dict[str, _Entry]) -> Any:
    """A model of a class of transformers from the folder's config, on the meta device."""
    make = getattr(kind, "from_config", None) or getattr(kind, "_from_config", None)
    if make is None:
        raise TypeError(f"load_pretrained: {kind.__name__} has no from_config; build the model on the meta device and "
                        "hand it over")  # fmt: skip
    from transformers import AutoConfig, GenerationConfig  # the class is of transformers, so that is there

    folder = source if source.is_dir() else source.parent
    config = (getattr(kind, "config_class", None) or AutoConfig).from_pretrained(folder)
    if (quantisation := getattr(config, "quantization_config", None)) is not None:
        raise ValueError(f"{source} is quantised already ({_method(quantisation)}); load the float checkpoint")
    of_file = next((_FLOATS[entry.dtype] for entry in found.values() if entry.dtype in _FLOATS), None)
    own = dtype or getattr(config, "dtype", None) or of_file or torch.get_default_dtype()
    with torch.device("meta"):
        model = make(config, dtype=own)
    _keep_in_float32(model, own)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _keep_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """What an architecture says of itself, as T5 of the products that overflow in float16."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = {*strict, *((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ())}
    if dtype in (torch.float16, torch.bfloat16) and kept:
        for name, module in model.named_modules():
            if kept & set(name.split(".")):
                module.float()


def _method(quantisation: Any) -> str:
    held = quantisation if isinstance(quantisation, dict) else vars(quantisation)
    return str(held.get("quant_method", "an unknown method"))


# -- what belongs where ------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of theirs."""
    persistent = model.state_dict(keep_vars=True)
    return {name: value for name, value in persistent.items() if isinstance(value, Tensor)}


def _matched(model: nn.Module, tensors: dict[str, Tensor], found: dict[str, _Entry]) -> dict[str, _Entry]:
    """For each tensor of the model its entry; ValueError, in words, where they do not fit."""
    renamed = _renamed(model, tensors, found)
    ignored = [re.compile(each) for each in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    more = [name for name in renamed if name not in tensors and not any(each.search(name) for each in ignored)]
    given = {id(tensors[name]) for name in renamed if name in tensors}
    missing = [name for name, tensor in tensors.items() if name not in renamed and id(tensor) not in given]
    other = [
        f"{name} is {entry.shape} and {tuple(tensors[name].shape)} in the model"
        for name, entry in renamed.items()
        if name in tensors and entry.shape != tuple(tensors[name].shape)
    ]
    kinds = [
        f"{name} is {entry.dtype} and {str(tensors[name].dtype).removeprefix('torch.')} in the model"
        for name, entry in renamed.items()
        if name in tensors and tensors[name].is_floating_point() != (entry.dtype in _FLOATS)
    ]
    problems = [f"{what} {listed(names)}"
                for what, names in (("it lacks", missing), ("the model lacks", more), ("", other), ("", kinds))
                if names]  # fmt: skip
    if problems:
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: " + "; ".join(map(str.strip, problems)))
    pairs = {name: entry for name, entry in renamed.items() if name in tensors}
    _check_tied(model, tensors, pairs)
    return pairs


def _check_tied(model: nn.Module, tensors: dict[str, Tensor], pairs: dict[str, _Entry]) -> None:
    """Raise ValueError where names that are one tensor in the model have different values in the file."""
    first: dict[int, str] = {}
    for name, entry in pairs.items():
        other = first.setdefault(id(tensors[name]), name)
        if other != name and not all(
            torch.equal(_read(entry, rows), _read(pairs[other], rows)) for rows in blocks(tensors[name])
        ):
            raise ValueError(
                f"{other} and {name} have different values in the checkpoint, and are one tensor in "
                f"{type(model).__name__}: build the model untied (tie_word_embeddings=False in the config)"
            )


def _renamed(model: nn.Module, tensors: dict[str, Tensor], found: dict[str, _Entry]) -> dict[str, _Entry]:
    """Entries under the model's names: of a base model loaded from a whole one's file, or the other way round."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix == "." or any(name in tensors for name in found):
        return found
    shorter = {name.removeprefix(prefix): entry for name, entry in found.items() if name.startswith(prefix)}
    if any(name in tensors for name in shorter):
        return shorter
    longer = {prefix + name: entry for name, entry in found.items()}
    return longer if any(name in tensors for name in longer) else found


def _load_all(model: nn.Module, pairs: dict[str, _Entry], device: torch.device | str) -> None:
    """Fill every tensor, tied ones once.  Memory for all of them comes first: between tensors that come and go, small
    parts of weights would keep a tenth of the process's memory from use."""
    tensors, places = _tensors(model), Places(model)
    stored: dict[int, Tensor] = {}
    for name in pairs:
        old = tensors[name]
        if id(old) not in stored:
            stored[id(old)] = empty(old.detach(), device) if old.is_meta else old.detach()
    filled: set[int] = set()
    for name, entry in pairs.items():
        old = tensors[name]
        if id(old) not in filled:
            filled.add(id(old))
            for rows in blocks(stored[id(old)]):
                fill_(stored[id(old)], rows, _read(entry, rows), name)
            if old.is_meta:
                places.give(places.first[id(old)], stored[id(old)])
    places.share()


def _read(entry: _Entry, rows: slice) -> Tensor:
    """Some rows of a tensor.  The file is opened for each: the pages of an open one count as this process's memory."""
    try:
        with safe_open(entry.file, "pt") as file:
            whole: Tensor = file.get_tensor(entry.name) if rows == slice(None) else file.get_slice(entry.name)[rows]
            return whole
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{entry.file} cannot be read: {error}") from error


def _check_finite(tensors: dict[str, Tensor], pairs: dict[str, _Entry], chosen: set[str]) -> None:
    """Raise ValueError where a weight that is to be quantised, or is, cannot be, before anything has changed."""
    for name, entry in pairs.items():
        tensor = tensors[name]
        if name not in chosen and not isinstance(tensor, QuantizedWeight):
            continue
        for rows in blocks(tensor):
            if not has_int8_form(_read(entry, rows).to(tensor.dtype)):
                raise ValueError(f"{name} of shape {entry.shape} {NO_INT8_FORM}")
