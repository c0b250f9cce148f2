"""What is written is what the safetensors library reads, in shards too, and no more than one source is in memory."""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qgalore_compile import files
from qgalore_compile.exports.safetensors_file import (
    DTYPES,
    Source,
    bytes_of,
    shards,
    write_file,
    write_shards,
)


def source(*tensors: tuple[str, Tensor], made: Callable[[], None] = lambda: None) -> Source:
    def make() -> dict[str, Tensor]:
        made()
        return dict(tensors)

    return Source({name: tensor.to("meta") for name, tensor in tensors}, make)


def of_every_dtype() -> dict[str, Tensor]:
    return {str(dtype): (torch.arange(7) % 2).to(dtype) for dtype in DTYPES}


def test_the_library_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = of_every_dtype() | {
        "0-d": torch.tensor(2.5), "empty": torch.zeros(3, 0), "not contiguous": torch.randn(5, 3).mT,
        "ünïcode \"name\"": torch.ones(1), "odd bytes": torch.arange(3, dtype=torch.uint8),
    }  # fmt: skip
    write_file(tmp_path / "a.safetensors", [source(each) for each in tensors.items()], {"format": "pt", "x": "y"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "x": "y"}


def test_the_bytes_are_those_that_the_library_writes(tmp_path: Path) -> None:
    dtypes = (
        torch.uint8,
        torch.bfloat16,
        torch.float32,
        torch.int64,
    )  # of one size the library has an order of its own
    tensors = {f"{index}.{dtype}": torch.ones(index, dtype=dtype) for index in (5, 1, 3) for dtype in dtypes}
    write_file(tmp_path / "ours", [source(each) for each in tensors.items()], {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    assert data(ours) == data(theirs)
    assert header(ours) == header(theirs)


def header(file: bytes) -> dict[str, object]:
    return json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])  # type: ignore[no-any-return]


def data(file: bytes) -> bytes:
    return file[8 + int.from_bytes(file[:8], "little") :]


def test_every_tensor_begins_at_a_multiple_of_its_elements(tmp_path: Path) -> None:
    sources = [
        source((f"{i}.codes", torch.ones(3, dtype=torch.uint8)), (f"{i}.scale", torch.ones(1))) for i in range(4)
    ]
    write_file(tmp_path / "a", sources, {})
    entries = header((tmp_path / "a").read_bytes())
    for name in entries.keys() - {"__metadata__"}:
        begin = entries[name]["data_offsets"][0]  # type: ignore[index]
        assert begin % (4 if name.endswith("scale") else 1) == 0
    assert int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") % 8 == 0


def test_one_source_is_let_go_before_the_next_is_made(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def source_of(name: str) -> Source:
        def make() -> dict[str, Tensor]:
            assert not any(ref() is not None for ref in alive)
            made = torch.ones(100)
            alive.append(weakref.ref(made))
            return {name: made}

        return Source({name: torch.empty(100, device="meta")}, make)

    write_file(tmp_path / "a", [source_of(str(index)) for index in range(5)], {})
    assert len(alive) == 5


def test_a_source_that_is_not_what_it_said_is_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    wrong = Source({"a": torch.empty(2, device="meta")}, lambda: {"a": torch.ones(3)})
    with pytest.raises(RuntimeError, match="a was to be"):
        write_file(tmp_path / "a", [wrong], {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_file(tmp_path / "a", [source(("x", torch.ones(5)))], {})
    assert raised.value.filename == str(tmp_path / "a")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a", b"old")]


def test_shards_hold_whole_sources_in_order_up_to_their_size(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 10, "c": 30, "d": 5, "e": 15, "f": 1}
    sources = [source((name, torch.full((size,), size, dtype=torch.uint8))) for name, size in sizes.items()]
    parts = shards("model", sources, 20)
    assert [[name for each in part for name in each.looks] for part in parts.values()] == [
        ["a", "b"],
        ["c"],
        ["d", "e"],
        ["f"],
    ]
    assert list(parts) == [f"model-0000{index}-of-00004.safetensors" for index in (1, 2, 3, 4)]
    written = write_shards(tmp_path, "model", parts, {"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert written == [tmp_path / name for name in [*parts, "model.safetensors.index.json"]]
    for name, size in sizes.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], torch.full((size,), size).byte())


def test_what_fits_is_one_file_without_an_index(tmp_path: Path) -> None:
    parts = shards("model", [source(("a", torch.ones(5)))], 20)
    write_shards(tmp_path, "model", parts, {})
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_sizes_are_read_as_people_write_them() -> None:
    assert [bytes_of(size) for size in (7, "7", "5GB", "500MiB", "1.5 KB", "2TB", "3B")] == [
        7, 7, 5 * 10**9, 500 * 2**20, 1500, 2 * 10**12, 3,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5 gigabytes", "5gb", "0.1", "5iB", True])
def test_other_sizes_are_refused(size: int | str) -> None:
    with pytest.raises(ValueError, match="must be a number of bytes, or a text"):
        bytes_of(size)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_was_written_goes_again_with_the_folders_made_for_it(failing: int, tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    (tmp_path / "model.safetensors.index.json").write_text("another's")
    sources = [source((str(at), torch.ones(5)), made=fail if at == failing else lambda: None) for at in range(3)]
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "x" / "y", "model", shards("model", sources, 20), {}, {"config.json": "{}"})
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "model", {"a.safetensors": sources}, {})
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors.index.json"]
