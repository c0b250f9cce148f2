"""LLaMA-7B trained for real on little memory: peak resident memory, loss and time of its steps.

    .venv/bin/python benchmarks/headline_7b.py --rule apollo --rank 1          # APOLLO-mini
    .venv/bin/python benchmarks/headline_7b.py --moments 4bit --steps 5
    .venv/bin/python benchmarks/headline_7b.py --layers 2                      # tries the script

All 6.7 × 10⁹ parameters are trained from random values on the text that `qgalore train` reads, with the authors'
vocabulary of 32,000 although bytes use 256 of it.  The model never exists in float: it is made on the meta device and
drawn weight by weight.  Every block is recomputed in the backward (`torch.utils.checkpoint`).

Memory is the operating system's: the process's resident peak (VmHWM), 10⁹ bytes a GB, from its first import to its
last step, compilation included.  By stage, the peak is that since the stage's begin.  Writes
`results/headline-<layers>-<rule>-<moments>-<seq>.json` after each step, so that what ran is told of a run that ends
early.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from common import (
    RESULTS,
    Batch,
    Layers,
    Out,
    Seq,
    command,
    forget_peak,
    machine,
    process_bytes,
    training_step,
    write_result,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qgalore_compile as qg
from qgalore_compile.training.data import load_corpus, training_batch
from qgalore_compile.training.llama import Block, Llama, find_preset
from qgalore_compile.weights import select_linears

VOCABULARY = 32_000


class Memory:
    """The process's peaks, by stage."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.highest = 0.0

    def stage(self, name: str) -> dict[str, float]:
        """End a stage: GB held now, and at most since the stage before."""
        held, peak = (process_bytes(name) / 1e9 for name in ("VmRSS", "VmHWM"))
        self.highest = max(self.highest, peak)
        self.stages[name] = {"held_gb": round(held, 3), "peak_gb": round(peak, 3)}
        forget_peak()
        return self.stages[name]


class Recomputed(Block):
    """A block that keeps its input alone for the backward."""

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return checkpoint(super().forward, x_BTD, cos_TK, sin_TK, use_reentrant=False)  # type: ignore[no-any-return]


def make_model(preset: str, layers: int | None, seq: int, ends: str) -> Llama:
    """The preset's model in INT8, its embedding and head in ``ends``; never in float."""
    shape = replace(find_preset(preset).model, vocab_size=VOCABULARY)
    shape = replace(shape, max_seq_len=seq, num_layers=layers or shape.num_layers)
    with torch.device("meta"):
        model = Llama(shape)
    qg.quantize_(model)
    if ends == "int8":
        qg.quantize_(model, targets=["lm_head"])
    torch.manual_seed(0)
    qg.initialize_(model, init=model.initialize)
    for block in model.layers:
        block.__class__ = Recomputed
    return model


def state_bytes(model: Llama, opt: torch.optim.Optimizer) -> dict[str, float]:
    """GB of weights with their scales, and of the optimizer's states by name."""
    found = {"weights": sum(parameter.nbytes for parameter in model.parameters()) / 1e9}
    for state in opt.state.values():
        for name, tensor in state.items():
            found[name] = found.get(name, 0) + tensor.nbytes / 1e9
    return {name: round(gb, 3) for name, gb in found.items()}


def main(
    preset: Annotated[str, typer.Option(help="Model and rank.")] = "7b",
    layers: Layers = None,
    rule: Annotated[str, typer.Option(help="Rule of the projected weights.")] = "galore",
    rank: Annotated[int | None, typer.Option(help="In place of the preset's.")] = None,
    moments: Annotated[str, typer.Option(help="8bit or 4bit.")] = "8bit",
    ends: Annotated[str, typer.Option(help="Embedding and head: float32, or int8 (the head alone).")] = "float32",
    lr: Annotated[float, typer.Option(help="Of the blocks.")] = 0.002,
    plain_lr: Annotated[float, typer.Option(help="Of embedding, head and norms.")] = 0.001,
    steps: Annotated[int, typer.Option(min=1)] = 5,
    batch: Batch = 1,
    seq: Seq = 256,
    out: Out = RESULTS,
) -> None:
    """Steps of the model, and what they took."""
    memory, known = Memory(), find_preset(preset)
    memory.stage("imports")
    started = time.perf_counter()
    model = make_model(preset, layers, seq, ends)
    print("model", memory.stage("model"), f"{time.perf_counter() - started:.1f} s", flush=True)
    groups = qg.param_groups(
        model, rank=rank or known.rank, rule=rule, plain={"lr": plain_lr}, update_proj_gap=known.update_proj_gap
    )
    opt = qg.QGaLoreAdamW(groups, lr=lr, moments=moments, nonfinite="skip_parameter")
    print("optimizer", memory.stage("optimizer"), flush=True)

    compiled = torch.compile(training_step(model, opt), backend="qgalore", fullgraph=True)
    qg.on_progress(lambda event: print(f"  {event.seconds:6.1f} s  {event.stage} {event.name}", flush=True))
    corpus = load_corpus()
    result: dict[str, Any] = {
        "command": command(),
        "machine": machine(),
        "parameters": sum(each.numel() for each in model.parameters()),
        "projected": len(select_linears(model)),
        "steps": [],
    }
    name = f"headline-{layers or known.model.num_layers}-{rule}-{moments}-{seq}"
    for index in range(steps):
        tokens, targets = training_batch(corpus.train, seed=0, step=index, batch=batch, seq=seq)
        before = time.perf_counter()
        loss = float(compiled(tokens, targets))
        seconds = time.perf_counter() - before
        peak = memory.stage(f"step {index + 1}")
        refreshed = sum(record.last == index for record in opt.schedule())
        result["steps"].append({"loss": loss, "seconds": round(seconds, 2), "refreshed": refreshed, **peak})
        result |= {"state_gb": state_bytes(model, opt), "stages": memory.stages, "peak_gb": round(memory.highest, 3)}
        write_result(out / f"{name}.json", result, indent=1)
        print(f"step {index + 1}: loss {loss:.4f}, {refreshed} refreshed, {seconds:.1f} s", peak, flush=True)
    print(result["state_gb"], f"peak {memory.highest:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
