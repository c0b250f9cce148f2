"""The file that a run goes on from: one format, verified whole before anything in it is believed.

It is what ``torch.save`` writes, a zip archive of stored records, and ``torch.load`` reads it.  The archive's comment,
which stands at its very end, holds the format's number and the SHA-256 of every byte before it, so that a flipped bit
anywhere, a missing or an added byte is found before a single record is read: the checksums in a zip archive cover
neither its headers nor, where ``torch.load`` maps it, are they looked at.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qgalore_compile.files import kind_of, replacing
from qgalore_compile.words import first_line

FORMAT = 2
"""1 had no digest, and a second moment that rounded to 0."""

_COMMENT = "qgalore-compile checkpoint {format} sha256={digest}"
_ANY_COMMENT = re.compile(rb"qgalore-compile checkpoint (\d+) ")
_TAIL = 2 + len(_COMMENT.format(format=FORMAT, digest="0" * 64))  # the comment's length, two bytes, and the comment
_NO_COMMENT = b"\0\0"
_KEYS = {"step", "val_loss", "config", "corpus", "model", "optimizer", "scheduler"}
_LARGEST_PICKLE = 1 << 26


class _Digested:
    """What ``torch.save`` writes goes into a file, and into a digest on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.last = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.last = (self.last + bytes(data[-2:]))[-2:]
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that ``path`` holds either the old checkpoint or the whole new one, whenever the process dies.

    Args:
        path: the file; its folder exists.
        state: of types that ``torch.load(weights_only=True)`` accepts.

    Raises:
        OSError: it cannot be written; names the file.  What was there before is there still, and nothing beside it.
    """
    with replacing(path) as file:
        digested = _Digested(file)
        try:
            torch.save(state, digested)  # type: ignore[arg-type]  # asks for no more than ``write`` and ``flush``
        except RuntimeError as error:  # its writer notices that bytes are missing, and hides why
            raise digested.error or error from None
        if digested.last != _NO_COMMENT:
            raise RuntimeError("torch.save no longer ends in an archive without a comment")
        file.seek(-len(_NO_COMMENT), os.SEEK_CUR)
        file.write(_tail(digested.digest.hexdigest()))


def _tail(digest: str) -> bytes:
    comment = _COMMENT.format(format=FORMAT, digest=digest).encode()
    return len(comment).to_bytes(2, "little") + comment


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A `Run.state_dict` read from ``path``, tensors memory-mapped on the CPU.

    Raises:
        ValueError: no file there, one that is damaged, of another version, or no checkpoint of this program.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(
            f"nothing to resume: {path} does not exist; drop --resume, or name the run's folder with --out"
        ) from None
    if not stat.S_ISREG(mode):
        raise _unreadable(path, f"it is {kind_of(mode)}")
    with path.open("rb") as file:
        verified = os.fstat(file.fileno())
        _verify(path, file, verified.st_size)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whole, and yet not to be read: written by another release of torch, say
        raise _unreadable(path, f"torch {torch.__version__}: {first_line(error)}") from error
    now = path.stat()
    if (now.st_ino, now.st_size, now.st_mtime_ns) != (verified.st_ino, verified.st_size, verified.st_mtime_ns):
        raise _unreadable(path, "another process changed it while it was read")
    problem = _form(state)
    if problem is not None:
        raise ValueError(f"{path} is no checkpoint of `qgalore train`: {problem}; choose another --out")
    return state  # type: ignore[no-any-return]


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is no checkpoint that can be read: {why}; put a copy in its place, delete it, or choose another --out"
    )


def _verify(path: Path, file: BinaryIO, size: int) -> None:
    """Raise ValueError unless ``file`` is, byte for byte, one that :func:`save_checkpoint` wrote."""
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    found = re.search(rb"sha256=([0-9a-f]{64})$", tail)
    if found is None or tail != _tail(found[1].decode()):
        raise _foreign(path, file, size)
    digest, left = hashlib.sha256(), size - _TAIL
    file.seek(0)
    while left and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    digest.update(_NO_COMMENT)
    if digest.hexdigest() != found[1].decode():
        raise _unreadable(path, "it is damaged, for its bytes are not those that were written")


def _foreign(path: Path, file: BinaryIO, size: int) -> ValueError:
    """What a file is that does not end as a checkpoint does: older, newer, cut short, or something else."""
    if size == 0:
        return _unreadable(path, "it is empty")
    file.seek(max(0, size - (1 << 16)))
    comment = _ANY_COMMENT.search(file.read(1 << 16))
    if comment is not None and int(comment[1]) != FORMAT:
        return ValueError(
            f"{path} says that it is of format {int(comment[1])}, and this version of qgalore-compile reads format "
            f"{FORMAT}; go on with the version that wrote it, or choose another --out"
        )
    if comment is not None:
        return _unreadable(path, "it is damaged at its end")
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        return _unreadable(path, "its bytes are those of another kind of file")
    pickled = _pickled(path)
    if pickled is None:
        return _unreadable(path, "it is damaged or cut short")
    if all(key.encode() in pickled for key in ("config", "corpus", "scheduler")):
        return ValueError(
            f"{path} has no digest: an earlier version of qgalore-compile wrote it (format 1), whose optimizer's state "
            "this one cannot use, or its end is missing; go on with the version that wrote it, or choose another --out"
        )
    return ValueError(f"{path} is no checkpoint of `qgalore train`, but another file of torch's; choose another --out")


def _pickled(path: Path) -> bytes | None:
    """The pickle in an archive of torch's, as bytes: nothing is unpickled.  None where there is no such archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                stored = info.compress_type == zipfile.ZIP_STORED and info.file_size <= _LARGEST_PICKLE
                if stored and info.filename.endswith("data.pkl"):
                    return archive.read(info)
    except Exception:  # of a damaged directory zipfile raises whatever its bytes lead it to
        return None
    return None


def _form(state: object) -> str | None:
    """Why ``state`` is no state of a run; None if it has the form of one."""
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}"
    if missing := sorted(_KEYS - state.keys()):
        return f"it has no {', '.join(missing)}"
    if not _is_count(state["step"]):
        return f"its step is {state['step']!r}"
    if not isinstance(state["val_loss"], float):
        return f"its val_loss is {state['val_loss']!r}"
    if not isinstance(state["corpus"], str):
        return "it does not say which text it was trained on"
    config = state["config"]
    if not isinstance(config, dict) or not _is_count(config.get("steps")):
        return "it has no settings"
    for part in ("model", "optimizer", "scheduler"):
        if not isinstance(state[part], dict):
            return f"its {part} is a {type(state[part]).__name__}"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < math.inf
