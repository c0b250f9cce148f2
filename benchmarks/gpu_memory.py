"""Does a preset train within so much of a GPU's memory?

    .venv/bin/python benchmarks/gpu_memory.py --preset 7b --limit-gib 15

PyTorch's allocator is held to the limit from the start, so that drawing the weights, quantising them, compiling,
refreshing and training all have to do with it; more raises `torch.OutOfMemoryError`, and the exit status is 1.  The
CUDA context comes on top (about half a GiB: a limit of 15 stands for a card of 16).  Text, step and schedule are those
of `qgalore train`, with the preset's learning rate and weights in bfloat16; the vocabulary is the authors' 32,000,
although bytes use 256 of it.

Writes `results/memory-<preset>-<device>.json`: bytes allocated after each stage and at most in it, milliseconds a step
(median of those that refresh nothing, and of the others), losses and refreshes.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, Batch, Layers, Out, Seq, one_of, write_result
from gpu_measure import device_name, facts, slug
from rich.console import Console

from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import load_corpus
from qgalore_compile.training.llama import PRESETS, find_preset
from qgalore_compile.training.run import Run
from qgalore_compile.training.telemetry import StepRecord

VOCABULARY = 32_000
UNTIMED = 2  # steps: the first compiles, the second may still warm something up


class Memory:
    """Bytes that PyTorch's allocator holds on the device, by stage, and no more than a limit; nothing on a CPU."""

    def __init__(self, device: torch.device, limit_gib: float) -> None:
        self.gpu = device.type == "cuda"
        self.stages: dict[str, dict[str, int]] = {}
        if self.gpu:
            torch.cuda.set_device(device)
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * 2**30 / total), device)

    def stage(self, name: str) -> None:
        """End a stage, and begin the next one's peak."""
        if not self.gpu:
            return
        torch.cuda.synchronize()
        self.stages[name] = {
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
        }
        torch.cuda.reset_peak_memory_stats()


def with_layers(preset: str, layers: int | None) -> str:
    """The name of the preset, or of one made from it with another number of layers."""
    if layers is None:
        return preset
    known, name = find_preset(preset), f"{preset}-{layers}layers"
    PRESETS[name] = dataclasses.replace(known, model=dataclasses.replace(known.model, num_layers=layers))
    return name


def milliseconds(records: list[StepRecord], tokens: int) -> float | None:
    """Median of their steps."""
    return statistics.median(1e3 * tokens / each.tokens_per_second for each in records) if records else None


def train(config: TrainConfig, memory: Memory, console: Console) -> dict[str, Any]:
    """All steps of the run; what there is to say of it."""
    started = time.perf_counter()
    run = Run(config, load_corpus())
    memory.stage("model and optimizer")
    built = time.perf_counter() - started
    records = []
    for _ in range(config.steps):
        records.append(record := run.advance())
        if record.step == 1:
            memory.stage("first step")
        console.print(
            f"step {record.step}: loss {record.loss:.4f}, {len(record.refreshed)} refreshed, "
            f"{config.tokens_per_step / record.tokens_per_second:.3f} s",
            highlight=False,
        )
    memory.stage("other steps")
    timed, tokens = records[UNTIMED:], config.tokens_per_step
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "build_seconds": built,
        "compile_seconds": run.compile_seconds,
        "graphs": run.graphs,
        "step_ms": milliseconds([each for each in timed if not each.turns], tokens),
        "step_ms_with_a_turn": milliseconds([each for each in timed if each.turns], tokens),
        "losses": [each.loss for each in records],
        "refreshes": run.refreshes,
        "skipped_steps": run.skipped_steps,
    }


def main(
    preset: Annotated[str, typer.Option(help="Model, rank and learning rate.")] = "7b",
    layers: Layers = None,
    limit_gib: Annotated[float, typer.Option(help="What PyTorch may allocate.", min=0.1)] = 15.0,
    steps: Annotated[int, typer.Option(min=UNTIMED + 1)] = 40,
    batch: Batch = 1,
    seq: Seq = 256,
    refresh: Annotated[str | None, typer.Option(help="Refresh method. [default: qgalore train's]")] = None,
    nonfinite: Annotated[str | None, typer.Option(help="skip_step or skip_parameter. [default: the former]")] = None,
    optimizer: Annotated[str, typer.Option(help="qgalore, galore or adamw.")] = "qgalore",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, …, or cpu to try the script.")] = "cuda",
    out: Out = RESULTS,
) -> None:
    """Exit status: 0 it fits, 1 it does not, 2 no such device."""
    console, chosen = Console(width=120), one_of(device)
    if chosen is None:
        console.print(f"there is no device {device!r}; --device cpu --preset tiny tries the script without one")
        raise typer.Exit(2)
    preset = with_layers(preset, layers)
    config = TrainConfig.from_preset(
        preset,
        optimizer=optimizer,
        steps=steps,
        batch=batch,
        seq=seq,
        refresh=refresh,
        nonfinite=nonfinite,
        device=device,
        dtype="bfloat16",
        vocab_size=VOCABULARY,
        eval_every=steps,
        eval_tokens=seq,
    )
    memory = Memory(chosen, limit_gib)
    try:
        found = train(config, memory, console)
    except torch.OutOfMemoryError as error:
        memory.stage("where it ended")
        console.print(f"{preset} does not fit {limit_gib} GiB after {list(memory.stages)}: {error}", highlight=False)
        raise typer.Exit(1) from None
    name = device_name(chosen)
    result = {
        "preset": preset,
        "optimizer": optimizer,
        "refresh": config.refresh,
        "nonfinite": config.nonfinite,
        "batch": batch,
        "seq": seq,
        "steps": steps,
        "limit_gib": limit_gib if memory.gpu else None,
        **found,
        "memory": memory.stages,
        "machine": facts(chosen),
    }
    path = out / f"memory-{preset}-{slug(name)}.json"
    write_result(path, result, indent=1)
    for stage, held in memory.stages.items():
        amounts = ", ".join(f"{key} {value / 2**30:.2f}" for key, value in held.items())
        console.print(f"{stage}: {amounts} GiB", highlight=False)
    console.print(f"{found['step_ms']} ms a step; written to {path}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
