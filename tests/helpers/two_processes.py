"""What each of two processes does in ``test_collectives.py``: a module that a spawned process can import."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from int8 import INNER
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

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

SHARDS: dict[str, Any] = {
    "fully_shard": lambda net: fsdp.fully_shard(net),
    "fully_shard of a mesh of one": lambda net: fsdp.fully_shard(net, mesh=alone()),
    "FullyShardedDataParallel": lambda net: fsdp.FullyShardedDataParallel(net, device_id=torch.device("cpu")),
    "FullyShardedDataParallel, parameters as they were": lambda net: fsdp.FullyShardedDataParallel(
        net, device_id=torch.device("cpu"), use_orig_params=True
    ),
    "tensor parallel": lambda net: parallelize_module(net, mesh(), {"0": ColwiseParallel()}),
    "tensor parallel by rows": lambda net: parallelize_module(net, mesh(), {"0": RowwiseParallel()}),
    "a DTensor's shard": lambda net: distribute_tensor(net[0].weight.detach(), mesh(), [Shard(0)]),
}

LISTS: dict[str, Any] = {
    "scatter": lambda w: dist.scatter(torch.zeros(8, 13), [w, w] if dist.get_rank() == 0 else None),
    "scatter of views": lambda w: dist.scatter(torch.zeros(13), [w[0], w[1]] if dist.get_rank() == 0 else None),
    "all_gather into views": lambda w: dist.all_gather([w[0], w[1]], torch.ones(13)),
}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


def alone() -> DeviceMesh:
    """A mesh whose second dimension, the one that is returned, has this process alone."""
    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "one"))["one"]


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
    for name, call in SHARDS.items():
        with pytest.raises(NotImplementedError) as error:
            call(layers(rank))
        found[name] = str(error.value)
    for name, call in LISTS.items():
        if rank == 0 or name == "all_gather into views":
            with pytest.raises(NotImplementedError) as error:
                call(weight)
            found[name] = str(error.value)
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
    replicated = distribute_tensor(layers(rank)[0].weight.detach(), mesh(), [Replicate()])
    assert isinstance(replicated, DTensor)
    found["replicated"] = parts(replicated.to_local())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
