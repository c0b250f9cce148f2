"""The first step of a deep model: seconds, and what the process then holds, beside AdamW under a compiled model.

    .venv/bin/python benchmarks/deep_model.py                                  # 30 layers, as SmolLM2-135M has them
    .venv/bin/python benchmarks/deep_model.py --layers 4 --sides qgalore,adamw

The model is transformers' Llama in bfloat16 with SmolLM2-135M's sizes (30 layers of width 576, tied head, vocabulary
49,152) and random weights, which cost what trained ones do.  A step sees 2 × 128 tokens.  Sides:

- "adamw": the model compiled by Inductor, ``torch.optim.AdamW(fused=True)`` outside, as people run it;
- "qgalore", "flat": INT8 weights and `QGaLoreAdamW` at rank 144, the whole step; the second without `reroll` and
  `outline`.

Each side is a process of its own with an empty cache.  Subspaces of a layer fall due in each of the first steps, one
layer after the other; steady steps are those behind.  Resident memory is the operating system's, behind the fourth
step.  Writes `results/deep-model.json`, or `deep-model-float32.json`.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, compile_whole, last_line, machine, training_step, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

import qgalore_compile as qg
from qgalore_compile.training.telemetry import resident_bytes

BATCH, SEQ = 2, 128
STEADY = 8
"""Steps in which nothing is due."""
SIDES = ("adamw", "qgalore", "flat")
SMOLLM2 = dict(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
"""SmolLM2-135M's sizes, as transformers names them."""


def make_model(layers: int, dtype: torch.dtype) -> Any:
    """A Llama of SmolLM2-135M's sizes, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM2 | {"num_hidden_layers": layers}, use_cache=False)
    return LlamaForCausalLM(config).to(dtype)


def make_step(side: str, layers: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensor], Tensor]:
    """A side's step; also of "inductor", the whole step under plain Inductor (`depth.py`)."""
    model = make_model(layers, dtype)
    if side == "adamw":
        compiled = torch.compile(model)
        adamw = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
        return training_step(lambda tokens: compiled(input_ids=tokens, labels=tokens).loss, adamw)
    qg.quantize_(model)
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=144), lr=1e-4)
    options = {"outline": False, "reroll": False} if side == "flat" else {}
    backend = "inductor" if side == "inductor" else "qgalore"
    step = training_step(lambda tokens: model(input_ids=tokens, labels=tokens).loss, opt)
    return compile_whole(step, backend, options)


def measure(side: str, layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """In this process.  In steps 1 to ``layers`` − 1 one layer's subspaces fall due in each, behind them none."""
    step = make_step(side, layers, dtype)
    seconds = []
    held = 0.0
    for index in range(layers + STEADY):
        tokens = torch.randint(49_152, (BATCH, SEQ), generator=torch.Generator().manual_seed(index))
        started = time.perf_counter()
        loss = float(step(tokens))
        seconds.append(time.perf_counter() - started)
        if index == 3:
            gc.collect()
            held = resident_bytes() / 2**20
    return {
        "first_s": seconds[0],
        "due_s": seconds[1:layers],
        "steady_s": seconds[layers:],
        "resident_mib": held,
        "loss": loss,
    }


def main(
    layers: int = 30,
    sides: Annotated[str, typer.Option(help="By comma.")] = ",".join(SIDES),
    dtype: Annotated[str, typer.Option(help="float32 where the processor has no products in bfloat16.")] = "bfloat16",
    one: Annotated[str, typer.Option(help="Measure this side here, and print it.")] = "",
) -> None:
    if one:
        print(json.dumps(measure(one, layers, getattr(torch, dtype))))
        return
    found: dict[str, Any] = {}
    table = Table("side", "first step, s", "a layer due, s", "steady step, s", "resident, MiB")
    for side in sides.split(","):
        with TemporaryDirectory() as cache:
            arguments = ["--layers", str(layers), "--dtype", dtype, "--one", side]
            row = found[side] = json.loads(last_line(__file__, arguments, cache))
        print(side, row, flush=True)
        due, steady = median(row["due_s"]), median(row["steady_s"])
        table.add_row(side, f"{row['first_s']:.1f}", f"{due:.3f}", f"{steady:.3f}", f"{row['resident_mib']:.0f}")
    Console().print(table)
    name = "deep-model" if dtype == "bfloat16" else f"deep-model-{dtype}"
    write_result(RESULTS / f"{name}.json", {"machine": machine(), "layers": layers, "dtype": dtype, "sides": found})


if __name__ == "__main__":
    typer.run(main)
