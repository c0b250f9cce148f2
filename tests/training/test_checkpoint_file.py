"""The checkpoint's file: whole or refused in words, and never half written."""

from __future__ import annotations

import math
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qgalore_compile import files
from qgalore_compile.training import checkpoint_file
from qgalore_compile.training.checkpoint_file import load_checkpoint, save_checkpoint

STATE: dict[str, Any] = {
    "step": 3,
    "val_loss": math.inf,
    "config": {"steps": 5},
    "corpus": "0f",
    "model": {"weight": torch.arange(3000, dtype=torch.float32)},
    "optimizer": {},
    "scheduler": {},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    return path


def refused(path: Path, message: str) -> None:
    """Refused with the file's name, and the file is as it was."""
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before


def test_what_was_saved_is_loaded_and_torch_and_zip_tools_read_it_too(path: Path) -> None:
    for state in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
        assert {**state, "model": None} == {**STATE, "model": None}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"qgalore-compile checkpoint 2 sha256=")


def test_a_bit_that_flips_anywhere_is_found(path: Path) -> None:
    """Every 97th byte: headers, pickle, tensors, directory; and every byte of the end, where the digest stands."""
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), *range(len(whole) - 140, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        refused(
            path, "is no checkpoint that can be read|says that it is of format|has no digest.*or its end is missing"
        )


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:100],
        lambda whole: whole + b"\0",
        lambda whole: whole + whole,
        lambda whole: b"\0" + whole,
        lambda whole: whole[: len(whole) // 2] + bytes(4096) + whole[len(whole) // 2 + 4096 :],
        lambda whole: bytes(len(whole)),
        lambda whole: b"",
        lambda whole: b"no checkpoint",
        lambda whole: b"PK\x03\x04 half a zip file",
        lambda whole: whole[-130:],
    ],
    ids=[
        "cut by one",
        "half",
        "a header",
        "a byte more",
        "twice",
        "moved",
        "zeros inside",
        "zeros",
        "empty",
        "text",
        "zip",
        "the end alone",
    ],
)
def test_a_file_that_lacks_or_has_more_than_was_written_is_refused(
    path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path.write_bytes(damage(path.read_bytes()))
    refused(path, "is no checkpoint that can be read: .*put a copy in its place, delete it, or choose another --out")


def test_a_record_that_stands_twice_is_found(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0]
        content = archive.read(name)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, content)
    refused(path, "it is damaged")


def test_records_that_a_tool_has_compressed_are_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
        packed.comment = archive.comment
    refused(other, "it is damaged")


def test_a_file_of_an_earlier_version_is_called_that(path: Path) -> None:
    torch.save(STATE, path)
    refused(path, r"earlier version of qgalore-compile wrote it \(format 1\).*go on with the version that wrote it")


def test_a_file_of_a_later_version_is_called_that(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"checkpoint 2 ", b"checkpoint 7 "))
    refused(path, "says that it is of format 7, and this version of qgalore-compile reads format 2")


@pytest.mark.parametrize("state", [{"state_dict": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"])
def test_another_file_of_torch_s_is_called_that(path: Path, state: object) -> None:
    torch.save(state, path)
    refused(path, "is no checkpoint of `qgalore train`, but another file of torch's")


def test_a_pickle_is_not_run(path: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({**STATE, "model": Trap()}, path)
    refused(path, "format 1")
    save_checkpoint(path, {**STATE, "model": Trap()})
    refused(path, "is no checkpoint that can be read: torch .*Weights only")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "seven"}, "its step is 'seven'"),
        ({"step": -1}, "its step is -1"),
        ({"step": True}, "its step is True"),
        ({"val_loss": None}, "its val_loss is None"),
        ({"corpus": 7}, "it does not say which text"),
        ({"config": {}}, "it has no settings"),
        ({"config": {"steps": "many"}}, "it has no settings"),
        ({"model": []}, "its model is a list"),
        ({"optimizer": torch.zeros(2)}, "its optimizer is a Tensor"),
    ],
    ids=str,
)
def test_a_state_that_is_none_of_a_run_is_refused(path: Path, change: dict[str, Any], message: str) -> None:
    save_checkpoint(path, {**STATE, **change})
    refused(path, f"is no checkpoint of `qgalore train`: {message}")


def test_a_state_that_lacks_a_part_is_refused(path: Path) -> None:
    save_checkpoint(path, {key: value for key, value in STATE.items() if key not in ("model", "corpus")})
    refused(path, "is no checkpoint of `qgalore train`: it has no corpus, model")


def test_a_folder_or_a_pipe_in_the_place_is_named_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint that can be read: it is a named pipe"):
        load_checkpoint(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        load_checkpoint(path)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_nothing_else_and_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer turns the error into another one, which does not say why."""

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 5000

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    was = path.read_bytes()
    whole = checkpoint_file._Digested.__init__
    monkeypatch.setattr(checkpoint_file._Digested, "__init__", lambda self, file: whole(self, Full(file)))
    with pytest.raises(OSError, match="No space left on device") as error:
        save_checkpoint(path, STATE)
    assert error.value.filename == str(path)
    assert error.value.errno == 28
    assert path.read_bytes() == was
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_what_another_process_is_writing_beside_it_does_not_matter(path: Path) -> None:
    """Two writers of one name would mix their bytes."""
    names: list[str] = []
    with files.replacing(path) as one, files.replacing(path) as other:
        names = sorted(os.listdir(path.parent))
        one.write(b"one")
        other.write(b"other")
    assert len(names) == 3
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_a_link_is_replaced_and_not_written_through(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "of somebody else"
    other.write_text("mine")
    path.unlink()
    path.symlink_to(other)
    (tmp_path / "checkpoint.pt.tmp").symlink_to(other)
    save_checkpoint(path, STATE)
    assert other.read_text() == "mine"
    assert not path.is_symlink()
    assert load_checkpoint(path)["step"] == 3


def test_its_permissions_are_those_of_any_new_file(path: Path) -> None:
    plain = path.with_name("plain")
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_file_and_folder_are_synced_before_and_after_the_move(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure may leave a file of zeros under the name, or none."""
    done: list[str] = []
    sync, move = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def moved(*names: Any) -> None:
        done.append("move")
        move(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    save_checkpoint(path, STATE)
    assert done == ["file", "move", "folder"]
