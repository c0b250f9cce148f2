"""The first attack of `run_attacks.py`: one damaged copy of a checkpoint after another is loaded into a live run."""

from __future__ import annotations

import io
import itertools
import random
import sys
import tarfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from run_attacks_runs import command, config_of, digest, without_config

from qgalore_compile.training.checkpoint_file import load_checkpoint, save_checkpoint
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.pretrain import pretrain
from qgalore_compile.training.run import Run

Trial = Callable[[bytes, random.Random], bytes]
FAILURES = (
    "LOADED WRONG",
    "TRACEBACK",
    "MODEL CHANGED after an error",
    "REFUSED WITHOUT THE FILE'S NAME",
    "COMMAND ENDED OTHERWISE",
    "FILES CHANGED after an error",
    "WHOLE FILE DOES NOT RESUME",
)


# -- damage ----------------------------------------------------------------------------------------------------------


def _ranges(whole: bytes) -> dict[str, list[tuple[int, int]]]:
    """Where tensors, pickles and headers of the archive are."""
    found: dict[str, list[tuple[int, int]]] = {"tensor": [], "pickle": [], "header": []}
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        end = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            start = info.header_offset
            names = int.from_bytes(whole[start + 26 : start + 28], "little")
            extra = int.from_bytes(whole[start + 28 : start + 30], "little")
            content = start + 30 + names + extra
            found["header"].append((start, start + 30 + names))
            end = content + info.file_size
            if info.file_size:
                kind = "tensor" if "/data/" in info.filename else "pickle"
                found[kind].append((content, end))
        found["header"].append((end, len(whole)))
    return found


def _flip(kind: str) -> Trial:
    def trial(whole: bytes, draw: random.Random) -> bytes:
        first, last = draw.choice(_ranges(whole)[kind])
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            damaged[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
        return bytes(damaged)

    return trial


def _truncated(whole: bytes, draw: random.Random) -> bytes:
    return whole[: draw.choice((draw.randrange(len(whole)), len(whole) - draw.randrange(1, 200)))]


def _swapped(whole: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(whole)
    one, other = draw.randrange(len(whole)), draw.randrange(len(whole))
    length = draw.choice((1, 4, 512))
    a, b = damaged[one : one + length], damaged[other : other + length]
    damaged[other : other + len(a)], damaged[one : one + len(b)] = a, b
    return bytes(damaged)


def _zeroed(whole: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(whole)), draw.choice((1, 64, 4096))
    return whole[:start] + bytes(len(whole[start : start + length])) + whole[start + length :]


def _appended(whole: bytes, draw: random.Random) -> bytes:
    return whole + draw.choice((b"\0", b"\n", draw.randbytes(draw.randrange(1, 5000)), whole))


def _duplicated(whole: bytes, draw: random.Random) -> bytes:
    file = io.BytesIO(whole)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore")
        name = draw.choice(archive.namelist())
        content = archive.read(name)
        archive.writestr(name, draw.choice((content, bytes(len(content)))))
    return file.getvalue()


def _rezipped(whole: bytes, draw: random.Random) -> bytes:
    file = io.BytesIO()
    compression = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(file, "w", compression) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
        other.comment = draw.choice((b"", archive.comment))
    return file.getvalue()


def _foreign(whole: bytes, draw: random.Random) -> bytes:
    file = io.BytesIO()
    kind = draw.randrange(7)
    if kind == 0:
        return draw.randbytes(draw.randrange(3000))
    if kind == 1:
        return b'{"step": 3}\n' * draw.randrange(100)
    if kind == 2:
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, file)
    elif kind == 3:  # before torch wrote archives
        torch.save({"step": 3, "config": {}, "model": {}}, file, _use_new_zipfile_serialization=False)
    elif kind == 4:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("data.pkl"))
    elif kind == 5:  # this run's own state as an earlier version wrote it
        torch.save(torch.load(io.BytesIO(whole), weights_only=True), file)
    else:
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("a/data.pkl", draw.randbytes(200))
    return file.getvalue()


CORRUPTIONS: dict[str, Trial] = {
    "bits flipped in tensors": _flip("tensor"),
    "bits flipped in pickles": _flip("pickle"),
    "bits flipped in zip headers": _flip("header"),
    "truncated": _truncated,
    "bytes swapped": _swapped,
    "ranges zeroed": _zeroed,
    "bytes appended": _appended,
    "entries duplicated": _duplicated,
    "archives packed anew": _rezipped,
    "foreign files": _foreign,
}
OTHERS = "other models' and other values"


# -- the attack ------------------------------------------------------------------------------------------------------


def _others(folder: Path) -> list[Path]:
    """Whole files that do not fit: of models of other shapes, and of this one with values that cannot be."""
    found = []
    for index, options in enumerate(
        (
            dict(rank=4),
            dict(tied=True),
            dict(optimizer="adamw"),
            dict(dtype="bfloat16"),
            dict(vocab_size=300),
            dict(optimizer="galore"),
        )
    ):
        config = config_of(folder, f"other{index}", steps=1, **options)
        pretrain(config, console=Console(file=io.StringIO()))
        found.append(Path(config.out, "checkpoint.pt"))
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda s: s["optimizer"]["state"][0]["schedule"].fill_(-1),
        lambda s: s["optimizer"]["state"][0]["projector_scale"].fill_(torch.nan),
        lambda s: s["optimizer"]["param_groups"][0].update(betas=(2.0, 0.0)),
        lambda s: s["model"].pop("norm.weight"),
        lambda s: s["scheduler"].update(last_epoch=7),
        lambda s: s.update(step="three"),
    ]
    for index, change in enumerate(changes):
        saved = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
        change(saved)
        found.append(folder / f"changed{index}.pt")
        save_checkpoint(found[-1], saved)
    return found


def corruptions(folder: Path, count: int, seed: int = 0, *, command_every: int = 20) -> Counter[str]:
    """Load `count` damaged files; what came of them, by name, and each kind's number."""
    config = config_of(folder, "run", steps=3)
    pretrain(config, console=Console(file=io.StringIO()))
    path = Path(config.out, "checkpoint.pt")
    whole = path.read_bytes()
    others = [other.read_bytes() for other in _others(folder)]
    run = Run(replace(config, steps=9), load_corpus(config.data))
    run.advance()
    before, right = digest(run.state_dict()), digest(without_config(torch.load(path, weights_only=True)))
    found: Counter[str] = Counter()
    draw = random.Random(seed)
    kinds = [*CORRUPTIONS, OTHERS]
    for trial in itertools.count():
        if found["tried"] == count:
            break
        kind = kinds[trial % len(kinds)]
        damaged = draw.choice(others) if kind == OTHERS else CORRUPTIONS[kind](whole, draw)
        if damaged == whole:
            continue
        found[kind] += 1
        found["tried"] += 1
        path.write_bytes(damaged)
        try:
            saved = load_checkpoint(path)
            if draw.random() < 0.5:  # what fits by its settings is looked at all the same
                config.check_resumable(saved["config"], str(path))
            run.load_state_dict(saved)
        except (ValueError, OSError) as error:
            found["refused in words"] += 1
            if digest(run.state_dict()) != before:
                found["MODEL CHANGED after an error"] += 1
            if kind != OTHERS and str(path) not in str(error):
                found["REFUSED WITHOUT THE FILE'S NAME"] += 1
        except BaseException:
            found["TRACEBACK"] += 1
            traceback.print_exc()
        else:
            same = digest(without_config(run.state_dict())) == right
            found["loaded, and as it was saved" if same else "LOADED WRONG"] += 1
            print(f"loaded: {kind}", file=sys.stderr)
            run = Run(replace(config, steps=9), load_corpus(config.data))
            run.advance()
        if trial % command_every == 0 and kind != OTHERS:  # another model's would be gone on with
            found.update(_by_command(config, damaged))
    path.write_bytes(whole)
    resumed = pretrain(replace(config, steps=4, resume=True), console=Console(file=io.StringIO()))
    found["WHOLE FILE DOES NOT RESUME"] += resumed.steps != 4
    return +found


def _by_command(config: TrainConfig, damaged: bytes) -> Counter[str]:
    """`qgalore train --resume` says one line that names the file, ends with 2, and leaves every file alone."""
    files = {path.name: path.read_bytes() for path in Path(config.out).iterdir()}
    options = f"--resume --out {config.out} --steps 9 --preset nano --rank {config.rank} --optimizer {config.optimizer}"
    status, said = command(options.split())
    found = Counter({"tried by command": 1})
    lines = said.strip().splitlines()
    if status != 2 or len(lines) != 1 or "checkpoint.pt" not in lines[0]:
        found["COMMAND ENDED OTHERWISE"] += 1
        print(status, said, file=sys.stderr)
    if {path.name: path.read_bytes() for path in Path(config.out).iterdir()} != files:
        found["FILES CHANGED after an error"] += 1
    return found
