"""The record of a compilation, kept beside Inductor's cache: as it was written, or absent; and no part of the step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Interpreted, data, small, step_of
from torch import Tensor

from qgalore_compile import files
from qgalore_compile.backend import compilation
from qgalore_compile.backend.compilation import Compilation
from qgalore_compile.passes import PassManager
from qgalore_compile.passes.context import PassRecord


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(compilation, "_folder", lambda: tmp_path / "qgalore")
    return tmp_path / "qgalore"


def ran() -> PassManager:
    """A manager that has run one pass over a graph."""
    manager = PassManager([])
    manager.records = [PassRecord("update", "exact")]
    manager.records[0].ops = {"aten.mm": -1}
    manager.context.program = {"live_bytes": {"before": 1.5, "after": float("nan")}}
    return manager


def written(folder: Path) -> Path:
    record = Compilation()
    compilation.finish(record, ran(), "key")
    assert record.recorded
    return folder / "key.json"


def read() -> Compilation:
    record = Compilation()
    compilation.finish(record, PassManager([]), "key")
    assert record.from_cache
    return record


def test_a_record_is_read_as_it_was_written(folder: Path) -> None:
    written(folder)
    record = read()
    assert record.recorded
    assert record.passes[0]["name"] == "update"
    assert record.passes[0]["ops"] == {"aten.mm": -1}
    assert record.program["live_bytes"]["before"] == 1.5
    assert os.listdir(folder) == ["key.json"]


def change(**values: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({**json.loads(text), **values}).encode()


def without(key: str) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key}).encode()


DAMAGE: list[Callable[[bytes], bytes]] = [
    *(without(key) for key in ("version", "sha256", "layers", "passes", "program", "graph")),
    *(
        change(**{key: value})
        for key in ("layers", "passes", "program", "graph", "sha256", "version")
        for value in (None, 3, "text", [3], {"a": 1}, [{}])
    ),
    lambda text: b"",
    lambda text: text[:-1],
    lambda text: text + b"x",
    lambda text: b"\xff\xfe" + text,
    lambda text: b"[]",
    lambda text: b"null",
    lambda text: b"3",
    lambda text: b"{}",
    lambda text: b"[" * 200_000,
    lambda text: b"9" * 10_000,
    lambda text: text.replace(b"update", b"updatf"),
    lambda text: bytes(len(text)),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=map(str, range(len(DAMAGE))))
def test_a_damaged_one_counts_as_absent(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = written(folder)
    path.write_bytes(damage(path.read_bytes()))
    record = read()
    assert not record.recorded
    assert (record.layers, record.passes, record.program, record.graph) == ([], [], {}, {})
    assert compilation.is_damaged("key")
    assert "holds no record of its passes" in str(compilation_report(record))
    written(folder)  # and is written anew when passes run
    assert read().recorded


def compilation_report(record: Compilation) -> Any:
    import qgalore_compile as qg

    return qg.Report((record,), (), 0)


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/nowhere")], ids=["folder", "pipe", "link"]
)
def test_what_is_no_file_is_not_waited_for_and_does_not_break_the_step(
    folder: Path, make: Callable[[Path], None]
) -> None:
    folder.mkdir()
    make(folder / "key.json")
    assert not read().recorded
    assert compilation.is_damaged("key")
    record = Compilation()
    compilation.finish(record, ran(), "key")
    assert record.recorded  # of this process


def uuids(monkeypatch: pytest.MonkeyPatch, *steps: Callable[..., Any], **options: Any) -> list[str]:
    """What Inductor's cache tells each step's code by."""
    finish, found = compilation.finish, []

    def seen(record: Compilation, manager: PassManager, key: str) -> None:
        found.append(manager.uuid())
        finish(record, manager, key)

    monkeypatch.setattr(compilation, "finish", seen)
    for step in steps:
        torch._dynamo.reset()
        torch.compile(step, backend=Interpreted(**options), fullgraph=True)(data())
    return found


@pytest.mark.parametrize("strict", [True, False])
def test_strict_lets_the_passes_run_where_a_record_is_damaged(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    """What a cache holds would be refused: nothing could be said about its layers."""
    monkeypatch.setattr(compilation, "is_damaged", lambda key: True)
    first, second = uuids(monkeypatch, step_of(*small()), step_of(*small()), strict=strict)
    assert (first != second) == strict


def test_two_ways_to_write_a_step_share_no_code_since_they_share_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind AOTAutograd they are one graph: code from the cache would have the other one's record, and none here."""

    def other_of(model: Callable[..., Tensor], opt: torch.optim.Optimizer) -> Callable[..., Tensor]:
        def step(batch: Tensor) -> Tensor:
            loss = model(batch).float().square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return torch.zeros(()) + loss.detach()

        return step

    one, other, again = uuids(monkeypatch, step_of(*small()), other_of(*small()), step_of(*small()))
    assert one == again
    assert one != other


def test_no_record_is_no_damaged_one(folder: Path) -> None:
    assert not read().recorded
    assert not compilation.is_damaged("key")


@pytest.mark.parametrize(("program", "expected"), [({"rerolled": {"traced": 7, "copied": 3}}, True), ({}, False)])
def test_whether_layers_were_put_back_is_remembered(folder: Path, program: dict[str, Any], expected: bool) -> None:
    assert compilation.rerolled("key") is None
    manager = ran()
    manager.context.program.update(program)
    compilation.finish(Compilation(), manager, "key")
    assert compilation.rerolled("key") is expected


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_cache_that_is_full_or_read_only_costs_the_record_alone(
    folder: Path, error: OSError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    record = Compilation()
    compilation.finish(record, ran(), "key")
    assert record.recorded
    assert os.listdir(folder) == []
    assert f"the record of this compilation is not kept: [Errno {error.errno}]" in caplog.text


def test_a_file_in_the_place_of_the_folder_costs_the_record_alone(folder: Path) -> None:
    folder.write_text("no folder")
    record = Compilation()
    compilation.finish(record, ran(), "key")
    assert record.recorded
    assert not read().recorded


def test_what_has_no_json_costs_the_record_alone(folder: Path) -> None:
    manager = ran()
    manager.context.program = {"a set": {1}}
    record = Compilation()
    compilation.finish(record, manager, "key")
    assert record.recorded
    assert not folder.exists()
