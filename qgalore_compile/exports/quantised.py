"""A file of quantised weights: names, description, and the way back to floats.

A weight ``W`` (m × n) stands in it as the parts of its format: for 4 bits ``W.codes`` (uint8, m × ceil(n / 2), two a
byte, planar: a row's first half in low nibbles), ``W.scale`` and ``W.offset`` (float32, m × groups), of which the value
is codes · scale + offset by group.  With
compensation the product of ``W.left`` (m × r) and ``W.right`` (r × n) is added.  Everything else is stored as in a file
of floats.  What was done is JSON in the header's metadata, under the key ``qgalore_compile``: :class:`Description`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgalore_compile.exports.safetensors_file import index_name
from qgalore_compile.formats import Format

STEM = "quantised"
"""Of the files' names; transformers looks for another, and so does not take codes for weights."""
KEY = "qgalore_compile"
VERSION = 1


@dataclass(frozen=True)
class Description:
    """What a file of quantised weights is.

    Attributes:
        format: text of the weights' format (``docs/formats.md``), "int4/128+planar" for 4 bits in groups of 128.
        compensation, rank: "lorc" or "eora", and the rank of the products that are added; None without.
        dtype: of everything that has no codes, "bfloat16", say.
        weights: shape by name of each weight that has codes.
        tied: name of a tensor that is not stored to the name of the one that it is.
        version: of this form of description.
    """

    format: str
    compensation: str | None
    rank: int | None
    dtype: str
    weights: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    version: int = VERSION

    def metadata(self) -> dict[str, str]:
        """As a safetensors header holds it."""
        return {KEY: json.dumps(asdict(self))}


def encode(form: str, value: Tensor) -> dict[str, Tensor]:
    """What ``value`` (m, n) is stored as, by part's name, in the format that ``form`` names; FormatError for none."""
    own = Format.parse(form)
    return dict(zip((part.name for part in own.parts), own.encode(value), strict=True))


def decode(form: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor of ``shape`` that :func:`encode` made ``parts`` of, to the nearest codes."""
    own = Format.parse(form)
    return own.decode([parts[part.name] for part in own.parts], shape)


# -- the way back ------------------------------------------------------------------------------------------------------


def load_quantised(path: str | Path, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights that ``qg.export`` wrote with ``bits``, as a ``state_dict`` of floats under the model's names.

    Args:
        path: the folder, or the one safetensors file.
        dtype: of the weights that have codes and of other floats; None for the file's own.  Decoded and compensated
            in float32.

    Returns:
        Name to tensor on the CPU; tied names have the same tensor.  For a float model: INT8 weights that they are
        loaded into would quantise them again.

    Raises:
        ValueError: no such file there, or one of another kind or a later version.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as opened:
        try:
            files = [opened.enter_context(safe_open(file, framework="pt")) for file in _files(Path(path))]
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
        described = _description(Path(path), files[0].metadata() or {})
        own = dtype or getattr(torch, described.dtype)
        holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # it is no mapping
        state: dict[str, Tensor] = {}
        for name, shape in described.weights.items():
            found = {part: holders.pop(f"{name}.{part}").get_tensor(f"{name}.{part}") for part in _parts(described)}
            value = decode(described.format, found, tuple(shape))
            if described.compensation is not None:
                value += found["left"].float() @ found["right"].float()
            state[name] = value.to(own)
        for name, file in holders.items():
            value = file.get_tensor(name)
            state[name] = value.to(own) if value.is_floating_point() else value
    return state | {name: state[kept] for name, kept in described.tied.items()}


def _parts(described: Description) -> list[str]:
    stored = [part.name for part in Format.parse(described.format).parts]
    return [*stored, *(("left", "right") if described.compensation is not None else ())]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (index := path / index_name(STEM)).is_file():
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [path / name for name in sorted(set(places.values()))]
    if not (path / f"{STEM}.safetensors").is_file():
        raise ValueError(f"{path} holds no {STEM}.safetensors; name what qg.export(model, path, bits=4) wrote")
    return [path / f"{STEM}.safetensors"]


def _description(path: Path, metadata: Mapping[str, str]) -> Description:
    if KEY not in metadata:
        raise ValueError(f"{path} has no quantised weights of qg.export; read a file of floats with safetensors")
    described: dict[str, Any] = json.loads(metadata[KEY])
    if described["version"] != VERSION:
        raise ValueError(
            f"{path} is of version {described['version']}, and this version of qgalore-compile reads {VERSION}"
        )
    return Description(**described)
