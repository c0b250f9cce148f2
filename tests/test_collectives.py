"""Collectives on INT8 weights, between two processes over gloo: a broadcast is right, the rest is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from int8 import INNER
from torch import Tensor, nn

import qgalore_compile as qg


def layers(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(13, 8), nn.Linear(8, 5))
    qg.quantize_(net, group_size=5)
    return net


def parts(weight: Any) -> list[Tensor]:
    return [getattr(weight, part).clone() for part in INNER]


COLLECTIVES: dict[str, Any] = {
    "all_reduce": lambda w: dist.all_reduce(w),
    "reduce": lambda w: dist.reduce(w, 0),
    "all_gather": lambda w: dist.all_gather([torch.zeros(8, 13), torch.zeros(8, 13)], w),
    "all_gather_into_tensor": lambda w: dist.all_gather_into_tensor(torch.zeros(16, 13), w),
    "reduce_scatter": lambda w: dist.reduce_scatter(w, [torch.zeros(8, 13)] * 2),
    "gather": lambda w: dist.gather(w, [torch.zeros(8, 13)] * 2 if dist.get_rank() == 0 else None),
    "scatter": lambda w: dist.scatter(w, [torch.zeros(8, 13)] * 2 if dist.get_rank() == 0 else None),
    "send": lambda w: dist.send(w, 1 - dist.get_rank()),
    "recv": lambda w: dist.recv(w, 1 - dist.get_rank()),
    "broadcast of a view": lambda w: dist.broadcast(w[0], 0),
    "functional all_reduce": lambda w: torch.distributed._functional_collectives.all_reduce(w, "sum", dist.group.WORLD),
}


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    weight = layers(rank)[0].weight.detach()
    before = parts(weight)
    for name, call in COLLECTIVES.items():
        with pytest.raises(NotImplementedError) as error:
            call(weight)
        found[name] = str(error.value)
    found["kept"] = all(map(torch.equal, before, parts(weight)))
    dist.broadcast(weight, 1)
    found["broadcast"] = parts(weight)
    own = layers(rank)[0].weight.detach()
    dist.broadcast(own, 0, async_op=True).wait()
    found["async"] = parts(own)
    gathered = [layers(rank)[0].weight.detach() for _ in range(2)]
    dist.all_gather(gathered, torch.full((8, 13), float(rank + 1)))
    found["gathered"] = [each.dequantize() for each in gathered]
    wrapped = nn.parallel.DistributedDataParallel(layers(rank))
    x = torch.ones(3, 13) * (rank + 1)
    wrapped(x).square().sum().backward()
    found["ddp"] = [
        (p.dequantize() if isinstance(p, qg.Int8Weight) else p.detach()).clone() for p in wrapped.parameters()
    ]
    found["gradients"] = [p.grad.clone() for p in wrapped.parameters()]
    found["int8"] = [type(p).__name__ for p in wrapped.parameters()]
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

    replicated = distribute_tensor(layers(rank)[0].weight.detach(), init_device_mesh("cpu", (2,)), [Replicate()])
    assert isinstance(replicated, DTensor)
    found["replicated"] = parts(replicated.to_local())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


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
