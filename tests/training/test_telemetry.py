"""`metrics.jsonl`: no line is lost, and none is believed that is no record."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qgalore_compile.training import telemetry
from qgalore_compile.training.telemetry import MetricsLog, StepRecord, Turn, plot_curves, read_metrics

TURN = Turn("layers.0.q.weight", True, 4, None, None, 0.5)


def record(step: int) -> StepRecord:
    return StepRecord(step, 2.5, 0.01, 1.0, 1000.0, 2**30, 28, ("a", "b"), 0, 1, turns=(TURN,))


def line(step: int, /, **changes: Any) -> bytes:
    return json.dumps({**asdict(record(step)), **changes}).encode() + b"\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(map(line, range(1, 9))))
    return path


def steps(path: Path) -> list[int]:
    return [each["step"] for each in read_metrics(path)]


def test_a_resumed_run_keeps_the_lines_up_to_its_step_byte_for_byte(path: Path) -> None:
    path.write_bytes(line(1, note="mine") + line(2) + line(3) + line(4))
    told: list[str] = []
    with MetricsLog(path, 3, told.append) as log:
        log.write(record(4))
    assert path.read_bytes() == line(1, note="mine") + line(2) + line(3) + line(4)
    assert told == []


def test_lines_are_there_while_they_are_rewritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle, the process leaves the old file."""
    whole = path.read_bytes()

    def killed(*_: object) -> None:
        assert path.read_bytes() == whole
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path, 5)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_a_new_run_leaves_the_old_lines_until_it_has_one(path: Path) -> None:
    begun: list[list[int]] = []
    with MetricsLog(path, begin=lambda: begun.append(steps(path))) as log:
        assert steps(path) == list(range(1, 9))
        log.write(record(1))
        assert steps(path) == [1]
        log.write(record(2))
    assert begun == [list(range(1, 9))]


BAD = [
    (b"no json\n", "line 3 is no JSON"),
    (b"\xff\xfe{}\n", "line 3 is no JSON"),
    (b"\n", "line 3 is no JSON"),
    (b"[" * 100_000 + b"\n", "line 3 is no JSON"),
    (b"[1, 2]\n", "line 3 is no JSON object"),
    (b"null\n", "line 3 is no JSON object"),
    (b"{}\n", "line 3 has no 'step'"),
    (b'{"step": 3}\n', "line 3 has no 'loss'"),
    (line(3, step="3"), "line 3 has 'step': 3"),
    (line(3, step=True), "line 3 has 'step': True"),
    (line(3, step=0), "line 3 is of step 0"),
    (line(3, loss="low"), "line 3 has 'loss': low"),
    (line(3, refreshed=[7]), "line 3 has 'refreshed' that are no names"),
    (line(3, refreshed=None), "line 3 has 'refreshed': None"),
    (line(3, turns=[{"name": "x"}]), "line 3 has 'turns' that are none"),
    (line(3)[:40] + line(4), "line 3 is no JSON"),
    (line(2), "line 3 is of step 2, and comes after step 2"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[f"{index} {message}" for index, (_, message) in enumerate(BAD)])
def test_a_bad_line_is_told_and_dropped(path: Path, bad: bytes, message: str) -> None:
    path.write_bytes(line(1) + line(2) + bad + line(5) + line(6))
    told: list[str] = []
    with MetricsLog(path, 5, told.append):
        assert path.read_bytes() == line(1) + line(2) + line(5)
    assert told == [
        f"{path}: {message}; dropped",
        f"{path}: no line tells of 2 of the 5 steps before the checkpoint",
    ]


def test_a_line_without_its_end_is_told_where_it_is_needed(path: Path) -> None:
    path.write_bytes(line(1) + line(2)[:-1])
    told: list[str] = []
    with MetricsLog(path, 2, told.append):
        assert path.read_bytes() == line(1)
    assert told[0].endswith("line 2 ends in the middle; dropped")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    with MetricsLog(tmp_path / "metrics.jsonl", 2, told.append) as log:
        log.write(record(3))
    assert told == [f"{tmp_path}/metrics.jsonl: no line tells of 2 of the 2 steps before the checkpoint"]
    assert steps(tmp_path / "metrics.jsonl") == [3]


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_whole_lines(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) <= 100:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:100])

    with MetricsLog(path, 8) as log:
        monkeypatch.setattr(telemetry.os, "write", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            log.write(record(9))
        monkeypatch.undo()
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"".join(map(line, range(1, 9)))


def test_pictures_are_drawn_of_the_lines_that_are_records(path: Path, tmp_path: Path) -> None:
    path.write_bytes(line(1) + b"".join(bad for bad, _ in BAD) + line(9))
    plot_curves(path, tmp_path / "curves.png", title="a damaged file", bigram=2.0)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
