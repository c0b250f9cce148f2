"""``export``: what is asked for, refused in words or planned whole before anything is written."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgalore_compile.exports import quantised
from qgalore_compile.exports.calibration import Batch, second_moments
from qgalore_compile.exports.low_rank import check_rank, eora, lorc
from qgalore_compile.exports.safetensors_file import (
    Source,
    bytes_of,
    shards,
    write_shards,
)
from qgalore_compile.exports.tensors import as_dtype, identity, tensors_of, unwrapped
from qgalore_compile.formats import Format
from qgalore_compile.formats.base import dtype_of
from qgalore_compile.weights import Targets, select_linears
from qgalore_compile.weights.targets import obstacle
from qgalore_compile.weights.tensor import NO_INT8_FORM, has_int8_form
from qgalore_compile.words import listed

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPENSATIONS = ("lorc", "eora")
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Quantisation:
    """How the chosen weights are stored; ``moments``: of their inputs, by their identity, for EoRA."""

    format: str
    compensation: str | None
    rank: int | None
    dtype: torch.dtype
    moments: dict[object, Tensor]

    def stored(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of one weight, by their names in the file."""
        value = as_dtype(weight, torch.float32)
        parts = quantised.encode(self.format, value)
        if self.compensation is not None and self.rank is not None:
            error = value - quantised.decode(self.format, parts, tuple(value.shape))
            if self.compensation == "lorc":
                low = lorc(error, self.rank)
            else:
                low = eora(error, self.moments.pop(identity(weight)), self.rank)  # asked for once: then it may go
            parts |= {"left": low.left.to(self.dtype), "right": low.right.to(self.dtype)}
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    def described(self, weights: Mapping[str, Tensor], tied: dict[str, str]) -> dict[str, str]:
        """What the file says of itself."""
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        dtype = str(self.dtype).removeprefix("torch.")
        return quantised.Description(self.format, self.compensation, self.rank, dtype, shapes, tied).metadata()

    def looks(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The same on the meta device."""
        m, n = weight.shape
        form = Format.parse(self.format)
        parts = {part.name: torch.empty(form.shape_of(part, (m, n)), dtype=dtype_of(part), device="meta")
                 for part in form.parts}  # fmt: skip
        if self.rank is not None:
            parts["left"] = torch.empty(m, self.rank, dtype=self.dtype, device="meta")
            parts["right"] = torch.empty(self.rank, n, dtype=self.dtype, device="meta")
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "bfloat16",
    bits: int | None = None,
    group_size: int = 128,
    format: str | Format | None = None,
    targets: Targets | None = None,
    compensation: str | None = None,
    rank: int | None = None,
    calibration: Iterable[Batch] | None = None,
    max_shard_size: int | str = "5GB",
) -> list[Path]:
    """Write a model's weights as safetensors, under the names of its ``state_dict``; returns the files' paths.

    INT8 weights are decoded one at a time, tied weights stored once, under the first of their names.  The configs of a
    transformers model are written too, so that ``from_pretrained`` loads the folder.  With ``bits=4`` linear layers'
    weights are stored as codes, in ``quantised.safetensors``, which :func:`~qgalore_compile.exports.load_quantised`
    reads, and ``compensation`` adds a product for what they lose: "lorc" the nearest one to the error (arXiv
    2303.08302), "eora" the one with the least error of the layers' results on ``calibration`` (arXiv 2410.21271).

    Args:
        model: not changed. What ``torch.compile`` or DistributedDataParallel has wrapped is looked through.
        path: a folder, made where it is missing, or one file, if it ends in ``.safetensors``: then without configs.
        dtype: of floats, "float32", "bfloat16" or "float16"; of 4-bit files all floats but scales and offsets.
        bits: None for floats, or 4.
        group_size: elements of a row that share a scale and an offset, with ``bits``.
        format: in place of bits, any format of weights or its text, "nf4/64+double" (``docs/formats.md``).
        targets: the layers with codes, as for :func:`qg.quantize_`: by default the linear layers of the blocks.
        compensation: None, "lorc" or "eora"; needs bits or format, and rank.
        rank: of the products, at most the smaller side of every layer.
        calibration: for "eora", batches on the model's device: tensors, tuples of arguments or dicts of named ones.
        max_shard_size: of a file in a folder, bytes or a text ("5GB", "500MiB"); a larger weight has its own.

    Raises:
        ValueError: what cannot be done; said before anything is written.
        OSError: a file cannot be written; those before it are removed again.
    """
    floats = _dtype(dtype)
    text = _format(bits, group_size, format)
    _check_asked(text, targets, compensation, rank, calibration)
    limit = bytes_of(max_shard_size)
    model = unwrapped(model)
    tensors, tied = tensors_of(model, floats)
    chosen = {} if text is None else _chosen(model, targets, rank)
    beside = {} if Path(path).suffix == _SUFFIX else _configs(model, floats)
    folder, single = _place(Path(path), beside)
    metadata, plan = {"format": "pt", **tied}, None
    if text is not None:
        layers = [layer for sharing in chosen.values() for layer in sharing]
        moments = {} if calibration is None else second_moments(model, layers, calibration)
        plan = _Quantisation(text, compensation, rank, floats, moments)
        metadata = {"format": "pt"} | plan.described({n: t for n, t in tensors.items() if identity(t) in chosen}, tied)
    sources = [_source(name, t, floats, plan if identity(t) in chosen else None) for name, t in tensors.items()]
    stem = "model" if plan is None else quantised.STEM
    files = {single: sources} if single is not None else shards(stem, sources, limit)
    with torch.no_grad():
        return write_shards(folder, stem, files, metadata, beside)


# -- refused before anything is written --------------------------------------------------------------------------------


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = FLOATS.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(FLOATS)}")
    return found


def _format(bits: int | None, group_size: int, format: str | Format | None) -> str | None:
    """The text of the weights' format; None for floats."""
    if bits not in (None, 4):
        raise ValueError(f"bits={bits!r}: must be 4, or None for floats; other formats by format=")
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size={group_size!r}: must be an integer of at least 1")
    if format is None:
        return None if bits is None else f"int4/{group_size}+planar"
    if bits is not None:
        raise ValueError(f"bits={bits!r} and format={str(format)!r}: give one of them")
    form = Format.parse(format)
    if form.grouped is None or form.grouped.axis != "rows":
        raise ValueError(f"format={str(form)!r} is none of weights, which have groups in rows; for floats use dtype=")
    return str(form)


def _check_asked(
    form: str | None,
    targets: Targets | None,
    compensation: str | None,
    rank: int | None,
    calibration: Iterable[Batch] | None,
) -> None:
    if compensation not in (None, *COMPENSATIONS):
        raise ValueError(f"compensation={compensation!r}: must be None, {' or '.join(map(repr, COMPENSATIONS))}")
    if form is None:
        for name, value in (("compensation", compensation), ("targets", targets)):
            if value is not None:
                raise ValueError(f"{name}={value!r} is for codes, and floats have none; add bits=4, or drop it")
    if compensation is None and rank is not None:
        raise ValueError(f"rank={rank!r} is a compensation's; choose compensation='lorc' or 'eora', or drop it")
    if compensation is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"compensation={compensation!r} needs a rank, an integer of at least 1, got rank={rank!r}")
    if compensation == "eora" and calibration is None:
        raise ValueError(
            "compensation='eora' weighs the error by what the layers are given, so it needs calibration=, batches that "
            "the model takes; 'lorc' needs none"
        )
    if compensation != "eora" and calibration is not None:
        raise ValueError("calibration is for compensation='eora'; nothing else here looks at text")


def _place(path: Path, beside: Iterable[str]) -> tuple[Path, str | None]:
    """The folder and, where one file is asked for, its name; ValueError where something is in the way."""
    if path.suffix == _SUFFIX:
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} exists; choose another path, or delete it")
        return path.parent, path.name
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a folder, or a path that ends in {_SUFFIX}")
    present = sorted(each.name for each in path.iterdir()) if path.exists() else []
    there = [name for name in present if name.endswith((_SUFFIX, f"{_SUFFIX}.index.json")) or name in beside]
    if there:
        raise ValueError(f"{path} already holds {listed(there)}; choose another folder, or empty it")
    return path, None


def _chosen(model: nn.Module, targets: Targets | None, rank: int | None) -> dict[object, list[tuple[str, nn.Linear]]]:
    """The layers whose weights get codes, with their names, by the weight's identity.  A layer that cannot have any is
    refused where it was named, and left in float otherwise."""
    chosen: dict[object, list[tuple[str, nn.Linear]]] = {}
    obstacles = []
    for name, linear in select_linears(model, targets):
        if (why := obstacle(linear)) is not None:
            obstacles.append(f"{name}: {why}")
            continue
        if not has_int8_form(linear.weight):
            raise ValueError(f"{name}.weight {NO_INT8_FORM.replace('INT8', '4-bit')}")
        if rank is not None:
            try:
                check_rank(linear.weight, rank)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        chosen.setdefault(identity(linear.weight), []).append((name, linear))
    if obstacles and (targets is not None or not chosen):
        raise ValueError(listed(obstacles, between="; "))
    return chosen


# -- what is written ---------------------------------------------------------------------------------------------------


def _source(name: str, tensor: Tensor, floats: torch.dtype, plan: _Quantisation | None) -> Source:
    if plan is not None:
        return Source(plan.looks(name, tensor), partial(plan.stored, name, tensor))
    dtype = floats if tensor.is_floating_point() else tensor.dtype
    look = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return Source({name: look}, lambda: {name: as_dtype(tensor, dtype)})


def _configs(model: nn.Module, dtype: torch.dtype) -> Mapping[str, str]:
    """Texts by file name, of a model whose ``config`` has transformers' ``save_pretrained``.

    That writes by itself, so it does in a folder of its own, and before anything else is written.  The copy says the
    dtype of the file, as the one that transformers' own ``model.save_pretrained`` makes does.
    """
    texts: dict[str, str] = {}
    for attribute in ("config", "generation_config"):
        own: Any = getattr(model, attribute, None)
        if not hasattr(own, "save_pretrained"):
            continue
        config = copy.deepcopy(own)
        if attribute == "config":
            config.dtype, config.architectures = dtype, [type(model).__name__]
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            texts |= {file.name: file.read_text(encoding="utf-8") for file in Path(folder).iterdir() if file.is_file()}
    return texts
