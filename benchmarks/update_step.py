"""Time of one weight's whole update, beside its two GEMMs and beside other optimizers.

    .venv/bin/python benchmarks/update_step.py --rounds 21

Sides, all in one process and interleaved; a round is one call of each, and ratios are taken within a round:

- "gemms": the two products of the sandwich in bfloat16 by the library, operands decoded beforehand, nothing else;
- "qgalore": `QGaLoreAdamW.step` on an INT8 weight with a bfloat16 gradient, compiled by this backend: down-projection,
  norm, refresh op (not due), Adam on 8-bit moments, up-projection, write-back;
- "inductor": the same, compiled by plain Inductor; this side and the next ones at 2048×2048 alone;
- "baseline": the published arithmetic (`baseline_update.py`), compiled by plain Inductor;
- "galore-torch", "bitsandbytes", "torchao": AdamW of GaLore's package, AdamW8bit of the other two, which project
  nothing; all three write float weights back, float32 here and bfloat16 on a GPU (`gpu.py`).  Those that are not
  installed are left out and said so.

Before anything is timed, one step of "qgalore" is compared with eager from an equal state, and its memory is counted:
what is allocated while it runs, and the blocks that are kept from call to call, beyond R (in both types), N and the
block of rows that the write-back works on.  A second table is of 8-bit Adam on 16 M elements that are not projected,
beside copying its bytes.  Writes `results/update-step.json`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from types import FunctionType
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from baseline_update import Baseline
from common import RESULTS, cell, interleaved, machine, ratios, seconds_of, spread, write_result
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile
from train_step import set_due

import qgalore_compile as qg
from qgalore_compile.kernels.cpp import gemm as gemm_cpu

SHAPES = ((512, 1376, 128), (2048, 2048, 512), (4096, 4096, 1024), (4096, 11008, 1024))
TARGETS = {(512, 1376): 2.0, (2048, 2048): 1.25, (4096, 4096): 1.1, (4096, 11008): 1.1}
OTHERS_AT = (2048, 2048)  # galore-torch's first step of a larger weight is an SVD of minutes
NEVER = 10**9
_NUMBERS = count()


def projected(
    m: int, n: int, rank: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[qg.QGaLoreAdamW, Any]:
    """(optimizer, INT8 weight with a gradient of that dtype), its subspace found and not due again."""
    torch.manual_seed(0)
    weight = nn.Parameter(qg.Int8Weight.from_float((torch.randn(m, n) * 0.02).to(device, dtype), 256))
    group = {"params": [weight], "rank": rank, "update_proj_gap": NEVER, "refresh": "randomized"}
    opt = qg.QGaLoreAdamW([group], lr=1e-3)
    weight.grad = (torch.randn(m, n) * 0.01).to(device, dtype)
    set_due([opt.state[weight]["schedule"]], True)
    opt.step()
    return opt, weight


def compiled(step: Callable[[], Any], backend: str) -> Callable[[], Any]:
    """A step compiled from an empty cache and run once."""

    def update() -> None:
        step()

    # Dynamo keeps what it compiles by code and its name: one of its own, or sides would recompile one another.
    own = update.__code__.replace(co_name=f"update_{next(_NUMBERS)}")
    function = FunctionType(own, update.__globals__, closure=update.__closure__)
    run = torch.compile(function, backend=backend, fullgraph=True)
    with fresh_cache():
        run()
    return run


def check(m: int, n: int, rank: int) -> dict[str, float]:
    """How far one compiled step is from eager: the share of codes that differ, and by how much at most."""
    sides = [projected(m, n, rank) for _ in range(2)]
    sides[0][0].step()
    compiled(sides[1][0].step, "qgalore")
    (one, other) = (weight.codes.int() for _, weight in sides)
    difference = (one - other).abs()
    found = {"share": float((difference > 0).float().mean()), "most": float(difference.max())}
    if found["share"] > 2e-2 or found["most"] > 1:  # bfloat16 products differ by their blocks
        raise RuntimeError(f"the compiled update of {m}x{n} is not the eager one: {found}")
    return found


def sides_of(m: int, n: int, rank: int, wanted: list[str], device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """The sides' steps, compiled and ready."""
    torch._dynamo.reset()  # what was compiled for other shapes
    sides: dict[str, Callable[[], Any]] = {}
    opt, weight = projected(m, n, rank, device)
    grad, right = weight.grad, m >= n
    shape = (rank, n) if right else (m, rank)
    p = torch.randn(shape).to(device, torch.bfloat16)
    low = torch.randn((m, rank) if right else (rank, n)).to(device, torch.bfloat16)

    def gemms() -> None:
        if right:
            torch.mm(grad, p.t())
            torch.mm(low, p)
        else:
            torch.mm(p.t(), grad)
            torch.mm(p, low)

    sides["gemms"] = gemms
    sides["qgalore"] = compiled(opt.step, "qgalore")
    if "inductor" in wanted:
        sides["inductor"] = compiled(projected(m, n, rank, device)[0].step, "inductor")
    if "baseline" in wanted and n % 256 == 0:
        baseline = Baseline((torch.randn(m, n) * 0.02).to(device), p.float(), rank, 1e-3)
        sides["baseline"] = compiled(lambda: baseline.step(grad), "inductor")
    for name in ("galore-torch", "bitsandbytes", "torchao"):
        if name in wanted:
            try:
                sides[name] = _others(name, m, n, rank, device)
            except ImportError as missing:
                print(f"{name} is left out: {missing}")
    return sides


def _others(name: str, m: int, n: int, rank: int, device: str) -> Callable[[], Any]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # on CPUs not all of them take bfloat16
    weight = nn.Parameter((torch.randn(m, n) * 0.02).to(device, dtype))
    weight.grad = (torch.randn(m, n) * 0.01).to(device, dtype)
    if name == "galore-torch":
        import galore_torch

        group = {"params": [weight], "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
        optimizer: Any = galore_torch.GaLoreAdamW([group], lr=1e-3)
    elif name == "bitsandbytes":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=1e-3)
    else:
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit([weight], lr=1e-3)
    step: Callable[[], Any] = optimizer.step
    step()
    return step


def extra_bytes(m: int, n: int, rank: int) -> dict[str, float]:
    """Bytes that an update takes beside weight, states and gradient, in a thread that has run no other."""
    found: dict[str, float] = {}

    def measure() -> None:
        opt, _ = projected(m, n, rank)
        step = compiled(opt.step, "qgalore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        live = most = 0
        assert profiler.profiler is not None  # the block has run
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        blocks = {use: held.nbytes for use, held in vars(gemm_cpu._held).items()}
        low = max(m, n) * rank
        extra = most + sum(blocks.values()) - blocks["product"] - (2 + 4 + 2) * low
        found.update(allocated=most, extra=extra, per_thread=extra / torch.get_num_threads(), **blocks)

    thread = threading.Thread(target=measure)  # its blocks are its own
    thread.start()
    thread.join()
    return found


def unprojected(elements: int = 1 << 24) -> dict[str, Callable[[], Any]]:
    """8-bit Adam on elements that are not projected, and copying as many bytes."""
    weight = nn.Parameter(torch.randn(elements // 512, 512).bfloat16())
    opt = qg.QGaLoreAdamW([weight], lr=1e-3)
    weight.grad = torch.randn_like(weight)
    step = compiled(opt.step, "qgalore")
    # an element: 2 bytes of gradient, 2 of weight and 2 of codes to read, 2 of weight and 2 of codes to write; the
    # gradient is read once more for its norm.  A copy reads as many bytes as it writes.
    half = torch.empty(elements * 6, dtype=torch.uint8), torch.empty(elements * 6, dtype=torch.uint8)

    def copy() -> None:
        half[0].copy_(half[1])

    return {"copy": copy, "qgalore": step}


def timed(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each side in each round."""

    def measure(step: Callable[[], Any], _: int) -> float:
        return 1e3 * seconds_of(step)

    return interleaved({name: partial(measure, step) for name, step in sides.items()}, rounds)


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 21,
    sides: Annotated[str, typer.Option(help="Other sides, by comma; of the second shape alone.")] = "",
    shapes: Annotated[int, typer.Option(help="How many of the shapes, smallest first.")] = len(SHAPES),
) -> None:
    wanted = sides.split(",")
    report: dict[str, Any] = {}
    table = Table("weight, rank", "side", "ms: median (p10-p90)", "÷ gemms", "÷ qgalore")
    for m, n, rank in SHAPES[:shapes]:
        deviation = check(m, n, rank)
        times = timed(sides_of(m, n, rank, wanted if (m, n) == OTHERS_AT else []), rounds)
        entry: dict[str, Any] = {"target": TARGETS[m, n], "deviation": deviation, "sides": {}}
        entry["bytes"] = extra_bytes(m, n, rank)
        print(f"{m}x{n}: {entry['bytes']['per_thread'] / 2**20:.2f} MiB a thread beyond R, N and the block of rows")
        for name, values in times.items():
            row = {"ms": spread(values)}
            for other in ("gemms", "qgalore"):
                row[f"to_{other}"] = spread(ratios(values, times[other]))
            entry["sides"][name] = row
            table.add_row(f"{m}×{n}, {rank}", name, *(cell(part, ".2f") for part in row.values()))
        report[f"{m}x{n}"] = entry
    times = timed(unprojected(), rounds)
    ratio = spread(ratios(times["qgalore"], times["copy"]))
    milliseconds = {name: spread(values) for name, values in times.items()}
    report["unprojected"] = {"elements": 1 << 24, "ms": milliseconds, "to_copy": ratio}
    Console().print(table)
    median = milliseconds["qgalore"]["median"]
    print(f"8-bit Adam, 16 M bf16 elements: {median:.1f} ms, {ratio['median']:.2f} × copying 12 bytes an element")
    result = {"rounds": rounds, "machine": machine(), "shapes": report}
    write_result(RESULTS / "update-step.json", result)


if __name__ == "__main__":
    typer.run(main)
