"""Time of one weight's whole update by each rule, from the factors of its gradient, beside the products it contains.

    .venv/bin/python benchmarks/rules_step.py --rounds 11

The weight is INT8, 4096×4096, dY and X are bfloat16 of 2,048 tokens.  A rule's side is a compiled function that forms
dYᵀ X and steps, which the passes take apart.  The sides "gradient" and "up" are the library's products dYᵀ X and P N in
bfloat16 and nothing else; "down" is R from the factors, two products.  All sides in one process, interleaved; ratios
within a round.  Writes `results/rules-step.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, cell, command, interleaved, machine, ratios, seconds_of, spread, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step import set_due
from update_step import NEVER, compiled

import qgalore_compile as qg
from qgalore_compile.optim.rules import RULES

SIZE, TOKENS = 4096, 2048


def factors(tokens: int = TOKENS, size: int = SIZE) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (torch.randn(tokens, size) * 0.01).bfloat16(), torch.randn(tokens, size).bfloat16()


def updated(rule: str, rank: int, size: int = SIZE, tokens: int = TOKENS) -> Callable[[], Any]:
    """One update, compiled; its subspace is found and not due again."""
    dy, x = factors(tokens, size)
    weight = nn.Parameter(qg.Int8Weight.from_float((torch.randn(size, size) * 0.02).bfloat16(), 256))
    group = {"params": [weight], "rank": rank, "update_proj_gap": NEVER, "refresh": "randomized", "rule": rule}
    opt = qg.QGaLoreAdamW([group], lr=1e-3, nonfinite="skip_parameter")

    def update() -> None:
        weight.grad = dy.t() @ x
        opt.step()
        weight.grad = None

    if "schedule" in opt.state[weight]:
        set_due([opt.state[weight]["schedule"]], True)
    update()
    return compiled(update, "qgalore")


def products(rank: int) -> dict[str, Callable[[], Any]]:
    """Those of the library alone."""
    dy, x = factors()
    p, n = torch.randn(SIZE, rank).bfloat16(), torch.randn(rank, SIZE).bfloat16()
    return {
        "gradient": lambda: torch.mm(dy.t(), x),
        "up": lambda: torch.mm(p, n),
        "down": lambda: torch.mm(torch.mm(p.t(), dy.t()), x),
    }


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 11,
    ranks: Annotated[str, typer.Option(help="By comma.")] = "256,1024",
    rules: Annotated[str, typer.Option(help="By comma.")] = ",".join(RULES),
    name: Annotated[str, typer.Option(help="Of the result.")] = "rules-step",
) -> None:
    report: dict[str, Any] = {}
    table = Table("rank", "side", "ms: median (p10-p90)", "÷ gradient", "÷ (gradient + up)", "÷ its products")
    for rank in map(int, ranks.split(",")):
        sides = {**products(rank), **{rule: updated(rule, rank) for rule in rules.split(",")}}
        measured = interleaved(
            {name: partial(lambda call, _: 1e3 * seconds_of(call), side) for name, side in sides.items()}, rounds
        )
        gradient, up, down = (measured[name] for name in ("gradient", "up", "down"))
        both = [one + other for one, other in zip(gradient, up, strict=True)]
        contained = {
            "galore": [d + u for d, u in zip(down, up, strict=True)],
            "muon": [d + u for d, u in zip(down, up, strict=True)],
            "fira": [d + b for d, b in zip(down, both, strict=True)],
            "apollo": [d + g for d, g in zip(down, gradient, strict=True)],
            "factored": [2 * d + g for d, g in zip(down, gradient, strict=True)],
        }
        rows = {}
        for side, times in measured.items():
            row = {
                "ms": spread(times),
                "to_gradient": spread(ratios(times, gradient)),
                "to_both": spread(ratios(times, both)),
            }
            if side in contained:
                row["to_its_products"] = spread(ratios(times, contained[side]))
            rows[side] = row
            table.add_row(str(rank), side, *(cell(part, ".2f") for part in row.values()))
        report[str(rank)] = rows
    Console().print(table)
    record = {"size": SIZE, "tokens": TOKENS, "rounds": rounds, "ranks": report}
    write_result(RESULTS / f"{name}.json", {**record, "command": command(), "machine": machine()})


if __name__ == "__main__":
    typer.run(main)
