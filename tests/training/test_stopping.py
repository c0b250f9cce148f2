"""Signals, and output that nobody takes."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest
from rich.console import Console
from rich.table import Table

from qgalore_compile.training.stopping import SIGNALS, Output, Stop, Stopped, at_once, handled


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_first_step_is_noted_and_told_and_handlers_are_put_back(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    stop, before = Stop(), {each: signal.getsignal(each) for each in SIGNALS}
    with stop.by_signals(lambda: True):
        os.kill(os.getpid(), number)
    assert stop.reason == number.name
    assert "stopping after this step" in capfd.readouterr().err
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_is_done_ends_at_once(number: signal.Signals) -> None:
    stop = Stop()
    with pytest.raises(KeyboardInterrupt) as raised, stop.by_signals(lambda: False):
        os.kill(os.getpid(), number)
    assert isinstance(raised.value, Stopped)
    assert raised.value.signal == number.name


def test_of_what_follows_only_ctrl_c_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Service managers send SIGTERM and SIGHUP one after the other, and some repeat them: the save goes on."""
    stop = Stop()
    with stop.by_signals(lambda: True):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.reason == "SIGTERM"
        assert capfd.readouterr().err.count("stopping") == 1
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop()
        with handled(at_once), stop.by_signals(lambda: True):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_than_the_main_one_sets_no_handlers() -> None:
    def run() -> None:
        with handled(at_once):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


# -- output ------------------------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A file of which nothing more is taken."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def write(self, text: str) -> int:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [(BrokenPipeError(32, "Broken pipe"), "SIGPIPE"), (OSError(28, "No space left on device"), "output")],
)
def test_output_that_is_lost_is_noted_and_told_once(
    error: OSError, reason: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, stop = Broken(error), Stop()
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich's answer to a broken pipe is for standard output
    output = Output(Console(file=file), stop)
    for _ in range(3):
        output.print("a line")
    assert (stop.reason, output.lost, file.calls) == (reason, True, 1)
    assert capfd.readouterr().err.count(f"the output cannot be written ({error.strerror}); stopping") == 1


def test_a_signal_that_came_before_stays_the_reason() -> None:
    stop = Stop()
    stop.reason = "SIGHUP"  # the terminal is gone, and cannot be written to
    Output(Console(file=Broken(OSError(5, "Input/output error"))), stop).print("a line")
    assert stop.reason == "SIGHUP"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_encoding_lacks_is_a_question_mark(encoding: str) -> None:
    raw = io.BytesIO()
    output = Output(Console(file=io.TextIOWrapper(raw, encoding=encoding, write_through=True), width=40), Stop())
    table = Table()
    table.add_row(output.encodable("–"))
    output.print("5 – 7 \udcff")
    output.print(table)
    assert "5 – 7 ?".encode(encoding, "replace") in raw.getvalue()
