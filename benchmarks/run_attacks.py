"""Attacks on the files of `qgalore train`: damaged checkpoints, killed processes, two runs in one folder.

    python benchmarks/run_attacks.py --corruptions 2000 --kills 40

Runs of two tiny blocks, eager, so that each takes seconds. Prints what was tried and what came of it, and exits with 1
if anything was loaded wrong, ended in a traceback, changed a model after an error, lost a line or resumed inexactly.

- Corruptions: one damaged copy of a checkpoint after another is loaded into a live run, whose whole state is compared
  before and after; every twentieth is tried with the command, too, which must say a line and leave every file alone.
- Kills: SIGKILL and SIGTERM at random times of a run, a quarter of them while the metrics are being rewritten; then the
  run is continued to its end and compared with one that nothing disturbed, metrics and state, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
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

from qgalore_compile import cli
from qgalore_compile.checkpoint_file import load_checkpoint, save_checkpoint
from qgalore_compile.data import load_corpus
from qgalore_compile.llama import PRESETS, LlamaConfig, Preset
from qgalore_compile.pretrain import pretrain
from qgalore_compile.telemetry import read_metrics
from qgalore_compile.train_config import TrainConfig
from qgalore_compile.training import Run

STEPS, EVERY = 60, 4
FAILURES = {
    "kills": ("LINES LOST", "METRICS DIFFER", "STATE DIFFERS", "DOES NOT GO ON", "ANOTHER STATUS", "LEFT BEHIND"),
    "two runs in one folder": ("SECOND RUN NOT REFUSED", "FIRST RUN DISTURBED"),
    "corruptions": (
        "LOADED WRONG", "TRACEBACK", "MODEL CHANGED after an error", "REFUSED WITHOUT THE FILE'S NAME",
        "COMMAND ENDED OTHERWISE", "FILES CHANGED after an error", "WHOLE FILE DOES NOT RESUME",
    ),
}  # fmt: skip
Trial = Callable[[bytes, random.Random], bytes]

PRESETS["nano"] = Preset(LlamaConfig(32, 56, 2, 2, max_seq_len=64), 8, 0.02, 0.005, 4, steps=STEPS, batch=4, seq=16)


def config_of(folder: Path, name: str, **options: Any) -> TrainConfig:
    """A run `name` in `folder`, where its text is written if it is missing."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(b"one two three two one three three one two " * 200)
    defaults = dict(data=str(text), out=str(folder / name), backend="eager", eval_every=20, eval_tokens=256)
    return TrainConfig.from_preset("nano", **{**defaults, "checkpoint_every": EVERY, **options})


def digest(state: Any) -> str:
    """SHA-256 of every tensor, number and name in a nested state."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                sha.update(repr(key).encode())
                add(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        elif hasattr(value, "codes"):  # an INT8 weight
            for part in (value.codes, value.scale, value.offset):
                add(part)
        elif isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


# -- corruptions -----------------------------------------------------------------------------------------------------


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
    "bits flipped in tensors": _flip("tensor"), "bits flipped in pickles": _flip("pickle"),
    "bits flipped in zip headers": _flip("header"), "truncated": _truncated, "bytes swapped": _swapped,
    "ranges zeroed": _zeroed, "bytes appended": _appended, "entries duplicated": _duplicated,
    "archives packed anew": _rezipped, "foreign files": _foreign,
}  # fmt: skip
OTHERS = "other models' and other values"


def _others(folder: Path) -> list[Path]:
    """Whole files that do not fit: of models of other shapes, and of this one with values that cannot be."""
    found = []
    for index, options in enumerate((dict(rank=4), dict(tied=True), dict(optimizer="adamw"), dict(dtype="bfloat16"),
                                     dict(vocab_size=300), dict(optimizer="galore"))):  # fmt: skip
        config = config_of(folder, f"other{index}", steps=1, **options)
        pretrain(config, console=Console(file=io.StringIO()))
        found.append(Path(config.out, "checkpoint.pt"))
    for index, change in enumerate((
        lambda s: s["optimizer"]["state"][0]["schedule"].fill_(-1),
        lambda s: s["optimizer"]["state"][0]["projector_scale"].fill_(torch.nan),
        lambda s: s["optimizer"]["param_groups"][0].update(betas=(2.0, 0.0)),
        lambda s: s["model"].pop("norm.weight"),
        lambda s: s["scheduler"].update(last_epoch=7),
        lambda s: s.update(step="three"),
    )):  # fmt: skip
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
    before, right = digest(run.state_dict()), digest(_without_config(torch.load(path, weights_only=True)))
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
            same = digest(_without_config(run.state_dict())) == right
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


def _without_config(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "config"}


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


# -- kills -----------------------------------------------------------------------------------------------------------


def start(arguments: list[str], said: Path) -> int:
    """`qgalore train` in a child that has everything imported already; its process number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: none of torch's has started
        child = os.fork()
    if child:
        return child
    status = 70
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(each, "w", closefd=False)) for each in (1, 2))
        sys.argv = ["qgalore", "train", *arguments]
        cli.main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(child: int) -> int:
    """Wait for a child; its exit status, negative for a signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of `qgalore train`."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        status = ended(start(arguments, said))
        return status, said.read_text()


def arguments_of(config: TrainConfig, *, resume: bool = False) -> list[str]:
    if resume:
        return ["--resume", "--out", config.out]
    names = ("preset", "data", "out", "backend", "eval_every", "eval_tokens", "steps", "checkpoint_every")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]


_COMPARED = ("step", "loss", "lr", "grad_norm", "val_loss", "refreshed", "refreshes", "skipped_steps")


def outcome(config: TrainConfig) -> tuple[list[Any], str]:
    """What a run came to: its metrics but for times and memory, and the digest of its state."""
    records = read_metrics(Path(config.out, "metrics.jsonl"))
    state = _without_config(load_checkpoint(Path(config.out, "checkpoint.pt")))
    return [[record[key] for key in _COMPARED] for record in records], digest(state)


def kills(folder: Path, count: int, rewriting: int, seed: int = 0) -> Counter[str]:
    """Kill `count` runs, `rewriting` of them while metrics are rewritten, and continue each; what came of them."""
    draw, found = random.Random(seed), Counter[str]()
    whole = config_of(folder, "whole", steps=STEPS)
    started = time.perf_counter()
    status, said = command(arguments_of(whole))
    seconds = time.perf_counter() - started
    assert status in (0, 1), said
    reference = outcome(whole)
    print(f"an undisturbed run of {STEPS} steps takes {seconds:.1f} s", flush=True)
    half = config_of(folder, "half", steps=STEPS // 2)
    assert command(arguments_of(half))[0] in (0, 1)
    said_by = folder / "said"
    while found["killed"] < count:
        again = found["killed while metrics are rewritten"] < rewriting
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        config = config_of(folder, "killed", steps=STEPS)
        shutil.rmtree(config.out, ignore_errors=True)
        if again:
            number = signal.SIGKILL
            _with_long_lines(Path(half.out), Path(config.out))
            # the settings of the whole run, so that the rest of it is the same
            child = start([*arguments_of(config, resume=True), "--steps", str(STEPS)], said_by)
            if not _wait_for_rewriting(Path(config.out), child):
                found["came too late for the rewriting"] += 1
                ended(child)
                continue
            time.sleep(draw.random() * 0.02)
        else:
            child = start(arguments_of(config), said_by)
            # by steps, not by the clock alone: on a busy machine a run ends long before the time that one took
            _wait_for_lines(Path(config.out, "metrics.jsonl"), draw.randrange(STEPS), child)
            time.sleep(draw.random() * 2 * seconds / STEPS)
        os.kill(child, number)
        status = ended(child)
        partial = [name for name in os.listdir(config.out) if ".partial" in name] if Path(config.out).exists() else []
        if again and not any(name.startswith(".metrics") for name in partial):
            found["came too late for the rewriting"] += 1
            continue
        if status in (0, 1):
            found["came too late"] += 1
            continue
        found["killed"] += 1
        found[f"by {number.name}, status {status}"] += 1
        found["killed while metrics are rewritten"] += again
        found["killed while a file was half written"] += bool(partial)
        if number == signal.SIGTERM and status != 143:
            found["ANOTHER STATUS"] += 1
            print(said_by.read_text(), file=sys.stderr)
        found["LINES LOST"] += _lost_lines(config)
        has_checkpoint = Path(config.out, "checkpoint.pt").exists()
        found["before the first checkpoint"] += not has_checkpoint
        more = ["--steps", str(STEPS)] if has_checkpoint else []
        status, said = command([*arguments_of(config, resume=has_checkpoint), *more])
        if status not in (0, 1):
            found["DOES NOT GO ON"] += 1
            print(said, file=sys.stderr)
            continue
        metrics, state = outcome(config)
        expected = reference if not again else _of_two_halves(folder, half)
        found["METRICS DIFFER"] += metrics != expected[0]
        found["STATE DIFFERS"] += state != expected[1]
        found["resumed exactly"] += (metrics, state) == expected
        found["LEFT BEHIND"] += any(".partial" in name for name in os.listdir(config.out))
    return +found


def _with_long_lines(half: Path, folder: Path) -> None:
    """The run in `half`, its lines padded so that rewriting them takes a while."""
    shutil.copytree(half, folder)
    path = folder / "metrics.jsonl"
    padded = [json.dumps({**json.loads(line), "note": "x" * 2_000_000}) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{line}\n" for line in padded))


_halves: dict[Path, tuple[list[Any], str]] = {}


def _of_two_halves(folder: Path, half: TrainConfig) -> tuple[list[Any], str]:
    """What the half run comes to when it goes on undisturbed: its learning rate fell earlier than the whole one's."""
    if folder not in _halves:
        config = config_of(folder, "halves", steps=STEPS)
        shutil.copytree(half.out, config.out)
        assert command([*arguments_of(config, resume=True), "--steps", str(STEPS)])[0] in (0, 1)
        _halves[folder] = outcome(config)
    return _halves[folder]


def _wait_for_lines(path: Path, count: int, child: int) -> None:
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if not count or (path.exists() and path.read_bytes().count(b"\n") >= count):
            return
        time.sleep(0.001)


def _wait_for_rewriting(folder: Path, child: int) -> bool:
    """Whether the new metrics' file was seen before the child ended."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if any(name.startswith(".metrics") for name in os.listdir(folder)):
            return True
        time.sleep(0.0005)
    return False


def _lost_lines(config: TrainConfig) -> int:
    """Steps up to the checkpoint's of which no line tells, now that the process is dead."""
    path = Path(config.out, "checkpoint.pt")
    if not path.exists():
        return 0
    last = load_checkpoint(path)["step"]
    have = {record["step"] for record in read_metrics(Path(config.out, "metrics.jsonl"))}
    return len(set(range(1, last + 1)) - have)


def two_runs(folder: Path) -> Counter[str]:
    """A second run in the folder of one that is running, five times."""
    found: Counter[str] = Counter()
    config = config_of(folder, "one", steps=STEPS)
    child = start(arguments_of(config), folder / "first")
    while not Path(config.out, "checkpoint.pt").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGSTOP)  # so that it is there for as long as that takes
    for resume in (True, False) * 2 + (True,):
        status, said = command(arguments_of(config, resume=resume))
        right = status == 2 and f"is in use: process {child} on " in said
        found["second runs refused, naming the first" if right else "SECOND RUN NOT REFUSED"] += 1
    os.kill(child, signal.SIGCONT)
    found["FIRST RUN DISTURBED"] += ended(child) not in (0, 1) or len(outcome(config)[0]) != STEPS
    return +found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--corruptions", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        # children first: threads that training here starts would be missing in them
        attacks: list[tuple[str, Callable[[], Counter[str]]]] = [
            ("kills", lambda: kills(Path(folder), given.kills, given.kills // 4, given.seed)),
            ("two runs in one folder", lambda: two_runs(Path(folder))),
            ("corruptions", lambda: corruptions(Path(folder), given.corruptions, given.seed)),
        ]
        for name, attack in attacks:
            print(f"\n{name}", flush=True)
            found = attack()
            for what in [*(what for what in found if what not in FAILURES[name]), *FAILURES[name]]:
                print(f"  {found[what]:6,d}  {what}", flush=True)
            failed = failed or any(found[what] for what in FAILURES[name])
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
