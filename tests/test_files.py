"""A folder's lock, and what stands in the way of files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qgalore_compile import files
from qgalore_compile.files import LOCK, lock_folder, refuse_other_than_file, remove_left_behind, replacing


def test_a_locked_folder_is_refused_to_a_second_one_which_names_the_first(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        message = rf"{re.escape(str(tmp_path))} is in use: process {os.getpid()} on \S+, since .* choose another --out"
        with pytest.raises(ValueError, match=message), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_the_lock_file_of_a_process_that_died_does_not_block(tmp_path: Path) -> None:
    # the file alone: the package would bring torch along
    code = f"""
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
lock = files.lock_folder(Path({str(tmp_path)!r}))
lock.__enter__()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    dead = json.loads((tmp_path / LOCK).read_text())["pid"]
    assert dead != os.getpid()
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"pid": "x"}'])
def test_a_lock_file_that_says_nothing_still_locks(tmp_path: Path, content: bytes) -> None:
    with lock_folder(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(ValueError, match="is in use: another process is running there"), lock_folder(tmp_path):
            pass


def test_a_folder_that_was_made_and_stays_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_folder(tmp_path / "a" / "b"):
        raise KeyError
    assert os.listdir(tmp_path) == []
    with lock_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_is_no_link_and_no_pipe(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / LOCK, tmp_path / "other"
    other.write_text("mine")
    {"link": lambda: path.symlink_to(other), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises((ValueError, OSError), match=re.escape(str(path))), lock_folder(tmp_path):
        pass
    assert other.read_text() == "mine"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    writing = replacing(tmp_path / "checkpoint.pt")
    writing.__enter__().write(b"half")
    ours = set(os.listdir(tmp_path))
    for name in (".hidden", "checkpoint.pt.tmp", ".x.partial", "notes.partial"):
        (tmp_path / name).touch()
    assert len(ours) == 1
    remove_left_behind(tmp_path)
    assert set(os.listdir(tmp_path)) == {".hidden", "checkpoint.pt.tmp", ".x.partial", "notes.partial"}


def test_what_no_file_can_replace_is_refused(tmp_path: Path) -> None:
    for name, make in (("folder", Path.mkdir), ("pipe", os.mkfifo)):
        make(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is a .*, where a file belongs; move it away"):
            refuse_other_than_file(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("link", "nothing"):
        refuse_other_than_file(tmp_path / name)
