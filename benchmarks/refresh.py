"""Time of one refresh through the op, and the gradient's energy that its subspace holds, by method.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/refresh.py --rounds 7

Time: the refresh op on a weight of 4096 × 11008, rank 1024, given the factors of 2,048 tokens as a compiled step gives
them, everything included: products, decompositions, similarity, INT4 encoding, the new R; with and without rotated
8-bit moments.  All sides in one process, interleaved.  "svd" takes minutes at this size and is timed at the smallest
shape alone.  Beside the seconds stand those of a core: with OMP_NUM_THREADS=1 they tell the work also where other
processes take part of the machine.

Energy: ‖Pᵀ G‖² of the float32 subspace over the exact SVD's, of gradients from a real run: preset `tiny`, eager, on the
default corpus; at some steps each projected weight's gradient is kept, and "power" starts from the gradient kept
before, whose exact subspace went through INT4.  At the preset's rank, a quarter and a sixteenth of it.

Writes `results/refresh.json` and `results/refresh.csv`; `--name` puts another name in the place of "refresh".
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import torch
import typer
from common import RESULTS, Rounds, cell, interleaved, machine, spread, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qgalore_compile.formats import Format
from qgalore_compile.subspace.cost import described
from qgalore_compile.subspace.finder import leading_subspace
from qgalore_compile.subspace.moments import MomentFormats
from qgalore_compile.subspace.projection import project, projector_shape, side_of
from qgalore_compile.subspace.refresh import Moments, refresh_
from qgalore_compile.subspace.scheduler import Rule, Schedule
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus, training_batch
from qgalore_compile.training.run import make_model, make_optimizer

SHAPES = ((512, 1376, 128, 1024), (2048, 2048, 512, 2048), (4096, 11008, 1024, 2048))
RULE = Rule(official=False, threshold=math.inf, gamma=1.0, max_gap=None)
INT4 = Format.parse("int4/256+planar")
SVD_ELEMENTS = 1 << 20


class Side(NamedTuple):
    method: str
    iterations: int = 2
    rotated: bool = False

    @property
    def title(self) -> str:
        q = f", q = {self.iterations}" if self.method == "randomized" else ""
        return f"{self.method}{q}{', moments rotated' if self.rotated else ''}"


SIDES = (Side("svd"), Side("randomized", 1), Side("randomized", 2), Side("power"), Side("power", rotated=True))


class Parameter:
    """One weight's refresh op and all that it changes, due whenever it is called."""

    def __init__(self, m: int, n: int, rank: int, tokens: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape, self.rank = (m, n), rank
        # a spectrum that falls as i^-1/2
        spectrum = torch.arange(1, tokens + 1) ** -0.5
        self.factors = [(torch.randn(tokens, m) * spectrum[:, None]).to(dtype), torch.randn(tokens, n).to(dtype)]
        self.side = side_of(self.shape)
        low = (m, rank) if self.side == "right" else (rank, n)
        self.low = torch.zeros(low)
        self.stored = INT4.encode(torch.zeros(projector_shape(self.shape, rank)))
        self.schedule = Schedule.first(1, 5).to_tensor()
        moments = torch.randn(low) * 0.01
        self.moments = MomentFormats.parse("8bit").encode(moments, moments.square() * 2)

    def refresh(self, side: Side) -> None:
        rotated = Moments(self.moments, torch.tensor(10.0), "rotate", torch.tensor([0.9, 0.999], dtype=torch.float64))
        refresh_(
            self.low,
            self.stored,
            self.schedule,
            self.factors,
            shape=self.shape,
            rank=self.rank,
            form=INT4,
            method=side.method,
            rule=RULE,
            seed=0,
            param=0,
            power_iterations=side.iterations,
            moments=rotated if side.rotated else None,
        )


def timed(sides: dict[Side, Callable[[], None]], rounds: int) -> dict[Side, list[tuple[float, float]]]:
    """(seconds, seconds of a core) of each side in each round, one round discarded."""

    def measure(call: Callable[[], None], _: int) -> tuple[float, float]:
        start, cores = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - start, time.process_time() - cores

    return interleaved({side: partial(measure, call) for side, call in sides.items()}, rounds, warm_up=1)


# -- energy -----------------------------------------------------------------------------------------------------------


def gradients(steps: int, keep_every: int) -> dict[str, list[tuple[int, Tensor]]]:
    """(step, gradient) of each projected weight of a run of `tiny`, by name."""
    config = TrainConfig.from_preset("tiny", backend="eager", steps=steps, refresh="randomized")
    corpus = load_corpus(None)
    model = make_model(config)
    optimizer: Any = make_optimizer(model, config)
    projected = {id(p) for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    kept: dict[str, list[tuple[int, Tensor]]] = {}
    for step in range(steps):
        inputs, targets = training_batch(corpus.train, seed=0, step=step, batch=config.batch, seq=config.seq)
        model(inputs, targets).backward()
        if (step + 1) % keep_every == 0:
            for name, p in model.named_parameters():
                if id(p) in projected and p.grad is not None:
                    kept.setdefault(name, []).append((step + 1, p.grad.float().clone()))
        optimizer.step()
        optimizer.zero_grad()
    return kept


def energies(grad: Tensor, before: Tensor, rank: int) -> dict[str, float]:
    """Each method's share of the energy that the exact subspace holds, and that one's share of the whole."""
    side = side_of(grad.shape)
    columns = projector_shape(grad.shape, rank)[1]

    def energy(projector: Tensor) -> float:
        return float(project(grad.double(), projector.double(), side).square().sum())

    exact = energy(leading_subspace([grad], rank, side, method="svd"))
    found = {"svd, of the gradient": exact / float(grad.double().square().sum())}
    for q in (1, 2):
        found[f"randomized, q = {q}"] = energy(
            leading_subspace([grad], rank, side, method="randomized", power_iterations=q)
        )
    old = INT4.decode(INT4.encode(leading_subspace([before], rank, side, method="svd")), columns)
    found["power"] = energy(leading_subspace([grad], rank, side, method="power", low=project(grad, old, side)))
    orthonormal = torch.linalg.qr(old if side == "left" else old.t())[0]
    found["the old projector"] = energy(orthonormal if side == "left" else orthonormal.t())
    return {name: value if name.startswith("svd") else value / exact for name, value in found.items()}


def main(
    rounds: Rounds = 7,
    dtype: Annotated[str, typer.Option(help="Of the factors.")] = "bfloat16",
    shapes: Annotated[int, typer.Option(help="How many of the shapes, smallest first.")] = len(SHAPES),
    steps: Annotated[int, typer.Option(help="Steps of the run that gradients come from; 0 for none.")] = 60,
    keep_every: Annotated[int, typer.Option(help="Steps between two gradients.")] = 20,
    name: Annotated[str, typer.Option(help="Of the files of results.")] = "refresh",
) -> None:
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"rounds": rounds, "load_before": os.getloadavg(), "time": {}, "energy": {}}
    table = Table("weight, rank, tokens", "method", "s a refresh: median (p10-p90)", "s of a core")
    for m, n, rank, tokens in SHAPES[:shapes]:
        parameter = Parameter(m, n, rank, tokens, getattr(torch, dtype))
        parameter.refresh(Side("randomized"))
        sides = {
            side: partial(parameter.refresh, side) for side in SIDES if side.method != "svd" or m * n <= SVD_ELEMENTS
        }
        for side, values in timed(sides, rounds).items():
            seconds, cores = (spread(list(each)) for each in zip(*values, strict=True))
            weight = f"{m}×{n}, {rank}, {tokens}"
            operations = described(side.method, m, n, rank, side.iterations, 1)
            found = {"seconds": seconds, "core_seconds": cores, "operations": operations}
            result["time"].setdefault(weight, {})[side.title] = found
            table.add_row(weight, side.title, cell(seconds, ".2f"), cell(cores, ".2f"))
            rows.append({"what": "seconds", "weight": weight, "method": side.title, **seconds})
            rows.append({"what": "core seconds", "weight": weight, "method": side.title, **cores})
    result["load_after"] = os.getloadavg()
    if shapes:
        Console(width=120).print(table)
    if steps:
        most = TrainConfig.from_preset("tiny").rank
        measured: dict[tuple[int, str], list[float]] = {}
        for parameter_name, kept in gradients(steps, keep_every).items():
            for (_, before), (step, grad) in pairwise(kept):
                for rank in (most, most // 4, most // 16):  # at the preset's the subspace holds nearly all
                    shares = energies(grad, before, rank)
                    result["energy"][f"{parameter_name}, step {step}, rank {rank}"] = shares
                    for method, share in shares.items():
                        measured.setdefault((rank, method), []).append(share)
        table = Table("rank", "subspace", "energy, of the exact one's: median (p10-p90)", "least")
        for (rank, method), values in sorted(measured.items(), key=lambda item: -item[0][0]):
            share = spread(values)
            table.add_row(str(rank), method, cell(share, ".4f"), f"{share['min']:.4f}")
            rows.append({"what": "energy", "weight": f"tiny, rank {rank}", "method": method, **share})
        Console(width=120).print(table)
    result |= {
        "factors": dtype,
        "command": f"benchmarks/refresh.py --rounds {rounds} --dtype {dtype} --steps {steps} --keep-every {keep_every}",
        "machine": machine(),
    }
    write_result(RESULTS / f"{name}.json", result)
    with RESULTS.joinpath(f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
