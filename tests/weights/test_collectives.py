"""Collectives on INT8 weights, between two processes over gloo: a broadcast is right, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from two_processes import COLLECTIVES, LISTS, SHARDS, layers, parts, work

import qgalore_compile as qg


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", COLLECTIVES)
def test_every_other_collective_is_refused_in_words_before_anything_is_sent(
    processes: list[dict[str, Any]], name: str
) -> None:
    for found in processes:
        assert "collective" in found[name]
        assert "torch.distributed.broadcast" in found[name]
        assert found["kept"]


@pytest.mark.parametrize("name", SHARDS)
def test_what_would_shard_a_weight_is_refused_and_named(processes: list[dict[str, Any]], name: str) -> None:
    for found in processes:
        assert "would cut Int8Weight('0.weight'" in found[name]
        assert "DistributedDataParallel" in found[name]
        assert "qgalore_compile.dequantize_(model)" in found[name]


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_c10d_takes_past_the_dispatch_is_refused_in_place_of_crashing(
    processes: list[dict[str, Any]], name: str
) -> None:
    assert f"the collective {name.split()[0]} is not supported with " in processes[0][name]
    assert "torch.distributed.broadcast" in processes[0][name]


@pytest.mark.parametrize(("name", "source"), [("broadcast", 1), ("async", 0), ("replicated", 0)])
def test_a_broadcast_gives_every_process_the_codes_of_one(
    processes: list[dict[str, Any]], name: str, source: int
) -> None:
    expected = parts(layers(source)[0].weight)
    for found in processes:
        assert all(map(torch.equal, found[name], expected))


def test_what_c10d_itself_copies_into_a_weight_arrives(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert all(
            torch.equal(each, torch.full((8, 13), value))
            for each, value in zip(found["gathered"], (1.0, 2.0), strict=True)
        )


def test_distributed_data_parallel_starts_from_the_first_process_and_averages_gradients(
    processes: list[dict[str, Any]],
) -> None:
    first, second = processes
    assert first["int8"] == second["int8"] == ["Int8Weight", "Parameter"] * 2
    for own, ours, theirs in zip(layers(0).parameters(), first["ddp"], second["ddp"], strict=True):
        torch.testing.assert_close(ours, own.dequantize() if isinstance(own, qg.Int8Weight) else own.detach())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # flattened floats, quantised once more
    for ours, theirs in zip(first["gradients"], second["gradients"], strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()
