"""Signals while the command is still importing: a word and a status, and no traceback out of torch."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qgalore_compile import _startup


@pytest.mark.parametrize(
    ("arguments", "original", "expected"),
    [
        (["/usr/bin/qgalore", "train"], ["python", "/usr/bin/qgalore", "train"], True),
        (["qgalore.exe"], ["qgalore.exe"], True),
        (["-m", "train"], ["python", "-m", "qgalore_compile.cli", "train"], True),
        (["train.py", "qgalore"], ["python", "train.py", "qgalore"], False),
        (["-c"], ["python", "-c", "import qgalore_compile"], False),
        ([], [], False),
    ],
)
def test_only_the_command_is_taken_for_the_command(arguments: list[str], original: list[str], expected: bool) -> None:
    assert _startup.is_command(arguments, original) == expected


def test_a_program_that_imports_the_package_keeps_its_handlers() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN


SCRIPT = """
import importlib.util, signal, sys, time
spec = importlib.util.spec_from_file_location("startup", {file!r})
startup = importlib.util.module_from_spec(spec)
{before}
sys.argv[0] = "qgalore"
spec.loader.exec_module(startup)  # the file alone: the package would bring torch along
print("ready", flush=True)
time.sleep(60)
"""


def started(before: str = "") -> subprocess.Popen[str]:
    code = SCRIPT.format(file=_startup.__file__, before=before)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_while_importing_is_a_word_and_a_status(name: str, status: int) -> None:
    process = started()
    process.send_signal(signal.Signals[name])
    _, said = process.communicate()
    assert (process.returncode, said) == (status, "stopped\n")


def test_an_ignored_signal_stays_ignored() -> None:
    process = started("signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143


def test_it_comes_before_all_that_takes_long() -> None:
    lines = Path(_startup.__file__).with_name("__init__.py").read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports[0] == "from qgalore_compile import _startup as _startup"
