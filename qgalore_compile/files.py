"""Files that are whole or not there, and a folder that one process has for itself.

A file is written under a name of its own beside its place, synced, and moved into the place: whenever the process dies,
or the disk is full, what stands there is the old file or the new one.  The name is random and the file must not exist,
so that no link that someone laid there is followed; a link in the place itself is replaced, not written through.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

LOCK = "run.lock"
_LEFT_BEHIND = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` at the end of the block, file and folder synced.

    Where the block raises, or writing fails, the new file is removed and ``path`` is as it was.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with _naming(path):
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with _naming(path), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        with _naming(path):
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError names the file that was to be written, not the partial one, or none as those of ``write`` do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def sync_folder(folder: Path) -> None:
    """Make what was moved into ``folder`` last through a power failure, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


def remove_left_behind(folder: Path) -> None:
    """Remove the partial files of processes that were killed; for who has the folder's lock."""
    for path in folder.iterdir():
        if _LEFT_BEHIND.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def refuse_other_than_file(path: Path) -> None:
    """ValueError where ``path`` is something that no file can take the place of, or that must not be read as one."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        with suppress(OSError):
            mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise ValueError(f"{path} is {kind_of(mode)}, where a file belongs; move it away, or choose another --out")


def kind_of(mode: int) -> str:
    """What an entry of a folder is, by its ``st_mode``, in words."""
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFLNK: "a link to nothing",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "no file")


# -- the lock --------------------------------------------------------------------------------------------------------


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Have ``folder`` alone, which is made where it is missing and removed again where nothing came into it.

    By ``flock`` on the file ``run.lock`` in it: the kernel frees it with the process, however that ends, so that a lock
    file that a dead process left says nothing.

    Raises:
        ValueError: another process has it; the message names that process.
        OSError: the folder cannot be made or written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        descriptor = _acquire(path, folder)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)
    finally:
        for each in made:
            with suppress(OSError):  # not empty: then it stays, and so do those above it
                each.rmdir()


def _acquire(path: Path, folder: Path) -> int:
    while True:
        refuse_other_than_file(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(descriptor, path):  # else its last owner removed it between the two calls
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_own_name()).encode())
                return descriptor
        except BlockingIOError:
            holder = _holder(path)
            os.close(descriptor)
            raise ValueError(
                f"{folder} is in use: {holder} is running there; wait for it or stop it, or choose another --out"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    own = os.fstat(descriptor)
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _own_name() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(path: Path) -> str:
    """Who says in the lock file that it has the lock; it may be about to write that."""
    for _ in range(20):
        with suppress(OSError, ValueError, KeyError, TypeError):
            named = json.loads(path.read_bytes())
            return f"process {int(named['pid'])} on {named['host']}, since {named['since']},"
        time.sleep(0.05)
    return "another process"
