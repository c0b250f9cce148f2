"""Does the pass `outline` change a bit?  Steps of many model families with it and without it, from one state.

    .venv/bin/python benchmarks/check_outline.py [--only NAME …]

Each family is a tiny random model of transformers with four layers, trained for three steps of two micro-batches, in
each of which other layers refresh; float32, through the backend's real passes and then interpreted, so that both sides
run the same operations.  Losses, weights and all state must be equal bit for bit, and at least one function must be
found.  Writes `results/check-outline.json`: functions and their calls, nodes with and without.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from check_families import Made, images, language
from common import RESULTS, machine, write_result
from torch import Tensor, fx

import qgalore_compile as qg
from qgalore_compile.backend import dry_run
from qgalore_compile.backend.compilation import Compilation
from qgalore_compile.backend.entry import qgalore
from qgalore_compile.backend.tracing import step_backend
from qgalore_compile.weights import QuantizedWeight

LAYERS = 4
DEEP: dict[str, Any] = dict(num_hidden_layers=LAYERS)
MOE: dict[str, Any] = dict(**DEEP, num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=2)
FAMILIES: dict[str, Callable[[], Made]] = {
    "Llama": language("Llama", **DEEP, num_key_value_heads=1),
    "Llama, tied": language("Llama", **DEEP, tie_word_embeddings=True),
    "Gemma2": language("Gemma2", **DEEP, num_key_value_heads=1, head_dim=16, sliding_window=4),
    "Qwen2": language("Qwen2", **DEEP, num_key_value_heads=1),
    "Qwen3": language("Qwen3", **DEEP, num_key_value_heads=1, head_dim=16),
    "Mistral": language("Mistral", **DEEP, num_key_value_heads=1, sliding_window=4),
    "Phi": language("Phi", **DEEP),
    "GPT-NeoX": language("GPTNeoX", **DEEP),
    "OPT": language("OPT", **DEEP, ffn_dim=64, word_embed_proj_dim=32),
    "BERT": language("Bert", "ForMaskedLM", **DEEP, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "ViT": images("ViT", num_hidden_layers=LAYERS),
    "Mixtral": language("Mixtral", **MOE),
}
CHECKPOINTED = ("Llama", "Qwen2")


def trained(make: Callable[[], Made], checkpointed: bool, outline: bool) -> tuple[list[Tensor], Any, int]:
    """All that three steps compute and leave, functions with their calls, and the final graph's nodes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = make()
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qg.quantize_(model, group_size=8)
        groups = qg.param_groups(model, rank=4, update_proj_gap=4, quant_group_size=8)
    opt = qg.QGaLoreAdamW(groups, lr=1e-2, max_grad_norm=1.0)
    graphs: list[fx.Graph] = []
    records: list[Compilation] = []

    def finish(gm: fx.GraphModule) -> Callable[..., Any]:
        graphs.append(gm.graph)
        return gm.forward

    @step_backend
    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with dry_run.without_cache():
            return qgalore(gm, inputs, options={"outline": outline}, inner_compile=dry_run.dry(finish), into=records)

    def step(batch: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for _ in range(2):
            loss = model(**batch).loss / 2
            loss.backward()
            total = total + loss.detach()
        opt.step()
        opt.zero_grad()
        return total

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    found = [compiled(batch) for _ in range(3)]
    for parameter in model.parameters():
        found += parameter.parts if isinstance(parameter, QuantizedWeight) else [parameter.detach()]
        found += [value for name, value in opt.state.get(parameter, {}).items() if name != "schedule"]
    return [each.clone() for each in found], records[0].program.get("functions", {}), len(graphs[0].nodes)


def verdict(name: str, checkpointed: bool) -> dict[str, Any]:
    """Of one family."""
    plain, _, nodes = trained(FAMILIES[name], checkpointed, outline=False)
    outlined, functions, fewer = trained(FAMILIES[name], checkpointed, outline=True)
    equal = len(plain) == len(outlined) and all(
        one.dtype == other.dtype and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        for one, other in zip(plain, outlined, strict=True)
    )
    layers = {name: calls for name, calls in functions.items() if "layer" in name}
    return {"equal": equal, "functions": layers, "nodes": nodes, "outlined": fewer}


def main(only: Annotated[list[str] | None, typer.Option(help="Families.")] = None) -> None:
    found: dict[str, Any] = {}
    cases = [(name, False) for name in FAMILIES] + [(name, True) for name in CHECKPOINTED]
    for name, checkpointed in cases:
        if only and name not in only:
            continue
        title = f"{name}, checkpointed" if checkpointed else name
        try:
            found[title] = verdict(name, checkpointed)
        except Exception as error:  # told as its verdict; the other families are asked still
            found[title] = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(title, json.dumps(found[title]), flush=True)
        write_result(RESULTS / "check-outline.json", {"machine": machine(), "layers": LAYERS, "families": found})


if __name__ == "__main__":
    typer.run(main)
