"""Text as bytes: the corpus, its split, its batches, and the bigram model that a trained model has to beat.

A token is a byte (vocabulary 256), so that no tokenizer has to be found or downloaded. The default corpus is the source
of the Python standard library: some ten megabytes of real text that every machine which can run this has.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from torch import Tensor

from qgalore_compile.files import kind_of
from qgalore_compile.rng import philox4x32

VALIDATION_SHARE = 0.1
"""Part of the files (of the bytes, for a single file) that goes to validation."""

# Not the library's source: its tests (much of them data), what was installed into it, and pydoc's topics, one generated
# file of 750 kB.
_STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"})

# Fourth counter word of Philox for batches; stochastic rounding counts parameters there, from 0.
_BATCH_STREAM = 0xFFFFFFFF


@dataclass(frozen=True)
class Corpus:
    """Raw bytes, split.

    Attributes:
        source: what it was read from, for people.
        train, validation: uint8, 1-D: the files of each part in the order of their names, one after the other.
        train_files, validation_files: how many files each part holds; a single file counts in both.
    """

    source: str
    train: Tensor
    validation: Tensor
    train_files: int
    validation_files: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both parts, for telling whether a resumed run reads what it read before."""
        digest = hashlib.sha256(self.train.numpy().data)
        digest.update(b"|")
        digest.update(self.validation.numpy().data)
        return digest.hexdigest()


def load_corpus(data: str | Path | None = None) -> Corpus:
    """Read a corpus and split it.

    A folder is split by file: a file goes to validation when the hash of its path inside the folder says so, and so
    stays on its side when other files come or go. A single file is split by place: the last tenth is validation.

    Args:
        data: a text file; a folder, whose files are read at any depth except hidden ones and binary ones (a NUL byte
            in the first 8 kB, git's rule); None for the source of the Python standard library.

    Raises:
        ValueError: nothing there, not readable, or no text in it; says what was given and what to do.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = (
            [name for name in _files(root, skipped=_STDLIB_SKIPPED) if name.endswith(".py")] if root.is_dir() else []
        )
        if not names:
            raise ValueError(
                f"no Python sources of the standard library in {root}; give your own text: --data FILE or FOLDER"
            )
        return _split_by_file(f"Python standard library, {root}", root, names)
    if not str(data):
        raise ValueError("--data '' names no file or folder; give a text file or a folder of text files")
    path = Path(data)
    if path.is_dir():
        return _split_by_file(str(path), path, [name for name in _files(path) if not _is_binary(path / name)])
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder; give a text file or a folder of text files")
    if not path.is_file():  # reading a device need not end, and a pipe cannot be read again when the run goes on
        raise ValueError(
            f"--data {path} is {kind_of(path.stat().st_mode)}; give a text file or a folder of text files: what a pipe "
            "brings, save to a file first"
        )
    return _split_by_place(str(path), _read(path))


def _files(root: Path, skipped: frozenset[str] = frozenset()) -> list[str]:
    """Sorted paths of the files under `root`, relative to it, with slashes; nothing hidden, no `__pycache__`."""
    names = []
    for folder, subfolders, files in os.walk(root, onerror=_unreadable):
        subfolders[:] = [s for s in subfolders if not s.startswith((".", "__pycache__")) and s not in skipped]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(names)


def _unreadable(error: OSError) -> NoReturn:
    raise ValueError(
        f"cannot read {error.filename}: {error.strerror}; --data takes a text file or a folder that you may read"
    ) from error


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            there, memory = os.fstat(file.fileno()).st_size, psutil.virtual_memory().total
            if size < 0 and there > memory:
                raise ValueError(
                    f"{path} has {there / 1e9:,.0f} GB, and this machine {memory / 1e9:,.0f} GB of memory, into which "
                    "a corpus is read; give a part of it"
                )
            return file.read(size)
    except OSError as error:
        _unreadable(error)


def _is_binary(path: Path) -> bool:
    return b"\0" in _read(path, 8192)


def _digest(name: str) -> float:
    """A number in [0, 1) that depends on the name alone (unlike `hash`, which differs from process to process)."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2.0**64


def _split_by_file(source: str, root: Path, names: list[str]) -> Corpus:
    texts = {name: _read(root / name) for name in names}
    names = [name for name in names if texts[name]]  # an empty __init__.py is no text to validate on
    if not names:
        raise ValueError(
            f"{source}: no text in it (empty, hidden and binary files do not count); give a folder with text files"
        )
    if len(names) == 1:
        return _split_by_place(f"{source}, {names[0]}", texts[names[0]])
    ranked = sorted(names, key=_digest)
    # At least one file on either side, however few there are and wherever their hashes fall.
    count = sum(_digest(name) < VALIDATION_SHARE for name in names)
    held_out = set(ranked[: min(max(count, 1), len(names) - 1)])
    train = [name for name in names if name not in held_out]
    validation = [name for name in names if name in held_out]
    return Corpus(source, _join(texts, train), _join(texts, validation), len(train), len(validation))


def _split_by_place(source: str, text: bytes) -> Corpus:
    cut = len(text) - int(len(text) * VALIDATION_SHARE)
    if cut == len(text):
        raise ValueError(f"{source}: {len(text)} bytes are too few to train and validate on; give a longer text")
    return Corpus(source, _bytes(text[:cut]), _bytes(text[cut:]), 1, 1)


def _join(texts: dict[str, bytes], names: list[str]) -> Tensor:
    return _bytes(b"".join(texts[name] for name in names))


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def check_lengths(corpus: Corpus, seq: int) -> None:
    """ValueError unless both parts hold a sequence of `seq` tokens and the one that follows it."""
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= seq:
            raise ValueError(
                f"{corpus.source}: the {part} part has {len(tokens)} bytes, one sequence needs {seq + 1}; "
                f"give more text with --data, or a smaller --seq (at most {max(1, len(tokens) - 1)} here)"
            )


def _windows(tokens: Tensor, starts: Tensor, seq: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (len(starts), seq) int64 each: targets are the inputs moved on by one."""
    window = tokens[starts[:, None] + torch.arange(seq + 1)].long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def training_batch(tokens: Tensor, *, seed: int, step: int, batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """The batch of one step: windows at places that depend on (seed, step) alone, so that a resumed run reads on.

    Window i of a step is the same for every `batch` above i: two micro-batches of 8 hold what one batch of 16 does.

    Args:
        tokens: uint8, 1-D, longer than `seq`.
        seed, step: 64 and 32 bits, not negative.

    Returns:
        Inputs and targets, (batch, seq) int64 each.
    """
    index = torch.arange(batch)
    low, high, _, _ = philox4x32((index, 0, step, _BATCH_STREAM), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    starts = ((high >> 1) << 32 | low) % (len(tokens) - seq)  # 63 random bits: the bias of the remainder is below 1e-9
    return _windows(tokens, starts, seq)


def validation_batches(tokens: Tensor, *, batch: int, seq: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fixed batches: `count` windows evenly spread over the tokens, fewer where they would overlap.

    Yields:
        Inputs and targets, (≤ batch, seq) int64 each.
    """
    places = len(tokens) - seq  # possible starts
    count = max(1, min(count, places // seq))
    starts = torch.arange(count) * places // count
    for some in starts.split(batch):
        yield _windows(tokens, some, seq)


def bigram_loss(train: Tensor, validation: Tensor) -> float:
    """Mean loss, in nats per byte, of a bigram model: how well the last byte alone predicts the next one.

    P(b | a) = (count(a, b) + α) / (count(a) + 256 α), counted over all of `train`; the mean is over all pairs of
    `validation`. α is 1 (add-one), 0.1 or 0.01, whichever does best on `validation`: the benefit of the doubt is the
    baseline's.

    Args:
        train, validation: uint8, 1-D, at least two bytes each.
    """
    counts = _pair_counts(train)
    pairs = _pair_counts(validation)
    losses = []
    for alpha in (1.0, 0.1, 0.01):
        log_p = torch.log((counts + alpha) / (counts.sum(1, keepdim=True) + 256 * alpha))
        losses.append(-(pairs * log_p).sum().item() / pairs.sum().item())
    return min(losses)


def _pair_counts(tokens: Tensor, chunk: int = 1 << 24) -> Tensor:
    """How often byte b follows byte a: (256, 256) fp64. In chunks: as int64, a corpus is eight times its size."""
    counts = torch.zeros(256 * 256, dtype=torch.float64)
    for first in range(0, len(tokens) - 1, chunk):
        piece = tokens[first : first + chunk + 1].long()
        counts += torch.bincount(piece[:-1] * 256 + piece[1:], minlength=256 * 256)
    return counts.view(256, 256)
