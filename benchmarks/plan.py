"""What `qg.plan` says a step holds, beside what one holds that is compiled and run.

    .venv/bin/python benchmarks/plan.py --preset 60m --batch 1 --seq 256
    .venv/bin/python benchmarks/plan.py --preset smollm2 --layers 4 --batch 1 --seq 128

Compared are, each with its own forecast:

- tensors in a step that refreshes nothing: weights and states, and the most that the CPU's allocator held above them,
  told by torch's profiler over one step;
- tensors in a step that refreshes every projected weight, likewise;
- the process: its peak resident size over the run (VmHWM), compilation included, and over one steady step.

`smollm2` has SmolLM2-135M's sizes, by transformers.  Results are added to `results/plan.json`, one entry a run.
"""

from __future__ import annotations

import dataclasses
import json
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
from deep_model import SMOLLM2
from live_bytes import measure
from rich.console import Console
from rich.table import Table
from torch import nn
from train_step import set_due

import qgalore_compile as qg
from qgalore_compile.training.llama import Llama, find_preset


def build(preset: str, layers: int | None) -> tuple[nn.Module, int, int]:
    """A model of the preset's sizes, its rank, and the tokens that it knows."""
    if preset != "smollm2":
        known = find_preset(preset)
        config = dataclasses.replace(known.model, num_layers=layers or known.model.num_layers)
        return Llama(config), known.rank, config.vocab_size
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMOLLM2 | ({"num_hidden_layers": layers} if layers else {}), attn_implementation="sdpa")
    return LlamaForCausalLM(config), 144, config.vocab_size


def run(preset: str, layers: int | None, batch: int, seq: int, dtype: torch.dtype) -> dict[str, Any]:
    """The measured side: bytes of tensors and of the process."""
    start = process_bytes("VmRSS")
    torch.manual_seed(0)
    model, rank, vocabulary = build(preset, layers)
    model = qg.quantize_(model.to(dtype))
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=rank, update_proj_gap=10**9), lr=0.01)
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    held += sum(tensor.nbytes for state in opt.state.values() for tensor in state.values())
    schedules = [state["schedule"] for state in opt.state.values() if "schedule" in state]
    by_labels = preset == "smollm2"
    call = (lambda a, b: model(a, labels=b, use_cache=False).loss) if by_labels else model
    step = torch.compile(training_step(call, opt), backend="qgalore", fullgraph=True)
    tokens = [torch.randint(vocabulary, (batch, seq)) for _ in range(2)]
    held += sum(each.nbytes for each in tokens)
    set_due(schedules, False)
    step(*tokens)
    step(*tokens)
    compiled = process_bytes("VmHWM")
    steady = measure(step, tokens)
    set_due(schedules, True)
    refreshing = measure(step, tokens)
    set_due(schedules, False)
    forget_peak()
    before = process_bytes("VmRSS")
    step(*tokens)
    return {
        "tensors_held": held,
        "steady_above": max(steady["between_ops"], steady["inside_op"]),
        "refreshing_above": max(refreshing["between_ops"], refreshing["inside_op"]),
        "refreshing_inside": refreshing["inside_op_name"],
        "process_at_start": start,
        "process_peak": compiled,
        "process_before_steady_step": before,
        "process_peak_of_steady_step": process_bytes("VmHWM"),
    }


def foreseen(preset: str, layers: int | None, batch: int, seq: int, dtype: torch.dtype) -> dict[str, Any]:
    """The forecast, from the model on the meta device."""
    with torch.device("meta"):
        model, rank, _ = build(preset, layers)
    plan = qg.plan(model.to(dtype), batch=batch, seq=seq, rank=rank, device="cpu", compare=False)
    return {
        "tensors_held": plan.forecast.resident,
        "steady_peak": plan.forecast.steady_peak,
        "peak": plan.peak,
        "total": plan.total,
        "bytes": plan.bytes,
        "at": str(plan.forecast.at),
    }


def compared(forecast: dict[str, Any], found: dict[str, Any]) -> list[tuple[str, int, int]]:
    """What is compared: in words, as foreseen and as measured."""
    held = found["tensors_held"]
    return [
        ("tensors between steps", forecast["tensors_held"], held),
        ("tensors, a step without a refresh", forecast["steady_peak"], held + found["steady_above"]),
        ("tensors, all weights refreshed", forecast["peak"], held + found["refreshing_above"]),
        ("the process, with compilation", forecast["total"], found["process_peak"]),
    ]


def main(
    preset: Annotated[str, typer.Option(help="A preset, or smollm2.")] = "60m",
    layers: Layers = None,
    batch: Batch = 1,
    seq: Seq = 256,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    out: Out = RESULTS,
) -> None:
    kind = getattr(torch, dtype)
    forecast = foreseen(preset, layers, batch, seq, kind)
    found = run(preset, layers, batch, seq, kind)
    name = f"{preset}{f'-{layers}layers' if layers else ''}, {batch}x{seq}, {dtype}"
    table = Table("", "foreseen, MB", "measured, MB", "ratio", title=name)
    rows = compared(forecast, found)
    for words, ours, theirs in rows:
        table.add_row(words, f"{ours / 1e6:,.2f}", f"{theirs / 1e6:,.2f}", f"{ours / theirs:.4f}")
    Console().print(table)
    path = out / "plan.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    ratios = {words: round(ours / theirs, 4) for words, ours, theirs in rows}
    entry = {"foreseen": forecast, "measured": found, "foreseen_to_measured": ratios}
    entries[name] = {**entry, "command": command(), "machine": machine()}
    write_result(path, entries, indent=1)


if __name__ == "__main__":
    typer.run(main)
