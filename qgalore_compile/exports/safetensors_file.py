"""Safetensors written one weight at a time, in one file or in shards with the index that transformers reads.

``safetensors.torch.save_file`` takes all tensors at once, so a quantised model would have to be decoded whole.  The
format needs no more than shapes and dtypes in advance: eight bytes with the header's length, the header (JSON), and the
tensors, each at its place (https://huggingface.co/docs/safetensors).  Places are in falling order of the dtype's size,
as the library has them, so that each is aligned; the order of writing is free, so that what is computed together, the
parts of one weight, is written together and let go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qgalore_compile.files import replacing

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
}  # fmt: skip
"""The dtypes that a file may hold, as its header names them."""

_UNITS = {"": 1, "B": 1} | {
    prefix + ending: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for ending, base in (("B", 1000), ("iB", 1024))
}


@dataclass(frozen=True)
class Source:
    """Tensors that are made together: those that one weight is stored as.

    Attributes:
        looks: name to a tensor on the meta device, of the shape and dtype that is written.
        make: the tensors themselves, by the same names, on any device.
    """

    looks: Mapping[str, Tensor]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(look.nbytes for look in self.looks.values())


def write_file(path: Path, sources: Iterable[Source], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all; no more than one source's tensors exist at a time.

    Args:
        path: replaced, if it exists; its folder must.
        sources: their names all differ.
        metadata: texts by name, kept in the header.

    Raises:
        OSError: it cannot be written; names the file.
    """
    sources = list(sources)
    header, offsets, end = _layout({name: look for source in sources for name, look in source.looks.items()}, metadata)
    with replacing(path) as file:
        file.write(header)
        for source in sources:
            made = source.make()
            for name, look in source.looks.items():
                value = made[name]
                if (value.shape, value.dtype) != (look.shape, look.dtype):
                    raise RuntimeError(f"{name} was to be {look.shape} {look.dtype}, is {value.shape} {value.dtype}")
                file.seek(len(header) + offsets[name])
                file.write(bytes_in(value))
            del made, value
        file.truncate(len(header) + end)


def _layout(looks: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header with the length before it, where each tensor begins behind it, and where the last one ends."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name in sorted(looks, key=lambda name: (-looks[name].element_size(), name)):
        look, begin = looks[name], end
        end += look.nbytes
        offsets[name] = begin
        entries[name] = {"dtype": DTYPES[look.dtype], "shape": list(look.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def bytes_in(value: Tensor) -> memoryview:
    """A tensor's elements as a safetensors file holds them.

    Args:
        value: of any shape and dtype, on any device.

    Returns:
        ``value.nbytes`` bytes, row by row, in the machine's order, which is the file's: safetensors are little-endian,
        and so is all hardware that torch runs on today.  Of a contiguous tensor on the CPU its own memory.
    """
    flat = value.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


# -- shards ------------------------------------------------------------------------------------------------------------


def bytes_of(size: int | str) -> int:
    """A size as a number of bytes: 5000, "5GB" (10⁹), "5GiB" (2³⁰).

    Raises:
        ValueError: it is none, or below 1.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)", str(size).strip())
    if found is None or found[2] not in _UNITS or (count := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise ValueError(f'max_shard_size={size!r}: must be a number of bytes, or a text as "5GB" or "500MiB"')
    return count


def shards(stem: str, sources: Iterable[Source], size: int) -> dict[str, list[Source]]:
    """Files by name, each with sources of at most ``size`` bytes, or with one larger one: ``stem.safetensors`` alone,
    or ``stem-00001-of-00002.safetensors`` and so on."""
    parts: list[list[Source]] = [[]]
    filled = 0
    for source in sources:
        if parts[-1] and filled + source.nbytes > size:
            parts.append([])
            filled = 0
        parts[-1].append(source)
        filled += source.nbytes
    if len(parts) == 1:
        return {f"{stem}.safetensors": parts[0]}
    return {f"{stem}-{at:05d}-of-{len(parts):05d}.safetensors": part for at, part in enumerate(parts, start=1)}


def write_shards(
    folder: Path,
    stem: str,
    files: Mapping[str, Sequence[Source]],
    metadata: Mapping[str, str],
    beside: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write the files that :func:`shards` gave and, of several, their index; then the texts ``beside``, by name.

    All are there in the end or, where an exception comes between, none is, nor the folder if it was not there before.

    Returns:
        The paths, in the order of writing.
    """
    texts = dict(beside or {})
    if len(files) > 1:
        total = sum(source.nbytes for sources in files.values() for source in sources)
        places = {name: file for file, sources in files.items() for source in sources for name in source.looks}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        texts = {index_name(stem): json.dumps(index, indent=2) + "\n"} | texts
    names = [*files, *texts]
    with _withdrawn_on_error(folder, names):
        for name, sources in files.items():
            write_file(folder / name, sources, metadata)
        for name, text in texts.items():
            with replacing(folder / name) as file:
                file.write(text.encode())
    return [folder / name for name in names]


def index_name(stem: str) -> str:
    """The file that says which shard holds which tensor."""
    return f"{stem}.safetensors.index.json"


@contextmanager
def _withdrawn_on_error(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Make ``folder`` where it is missing; where the block raises, remove the files ``names`` from it, which were not
    there before, and what was made of the folder."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for name in names:
            with suppress(OSError):
                (folder / name).unlink()
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise
