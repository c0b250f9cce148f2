"""Steps of which AOTAutograd was shown a few layers: their graph is the one that all layers are traced to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Interpreted, snapshot, tokens
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import qgalore_compile as qg
from qgalore_compile.backend.reroll import KEPT
from qgalore_compile.passes.nodes import looks

LAYERS = KEPT + 2


class Block(nn.Module):
    """A norm and a linear layer around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.LayerNorm(8, bias=False)
        self.linear = nn.Linear(8, 8, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.function(self.linear(self.norm(hidden)))


class Stack(nn.Module):
    """Blocks between an embedding and its own transposed."""

    def __init__(self, blocks: list[Block], recompute: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.blocks = nn.ModuleList(blocks)
        self.recompute = recompute
        self.tap: int | None = None

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.embed(given)
        extra = hidden.new_zeros(())
        for index, block in enumerate(self.blocks):
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.recompute else block(hidden)
            if index == self.tap:
                extra = hidden.square().mean()
        logits = hidden @ self.embed.weight.T
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten()) + extra


def equal_blocks(count: int = LAYERS) -> list[Block]:
    return [Block(torch.relu) for _ in range(count)]


def two_kinds() -> list[Block]:
    return [Block(torch.tanh if index % 2 else torch.relu, bias=bool(index % 2)) for index in range(2 * LAYERS)]


def stack(blocks: Callable[[], list[Block]], recompute: bool) -> Stack:
    torch.manual_seed(0)
    return Stack(blocks(), recompute)


def run(model: Stack, micro_batches: int = 1, disable: tuple[str, ...] = (), **settings: Any) -> tuple[Any, Any, Any]:
    """Every tensor after three steps, refreshes among them; the final graph; what is told."""
    torch._dynamo.reset()
    qg.quantize_(model, group_size=8)
    of_optimizer = {key: settings.pop(key) for key in ("nonfinite", "max_grad_norm") & settings.keys()}
    groups = qg.param_groups(model, rank=2, update_proj_gap=2, quant_group_size=8, **settings)
    opt = qg.QGaLoreAdamW(groups, lr=0.01, **of_optimizer)

    def step(*batch: Tensor) -> Tensor:
        loss = torch.zeros(())
        for given in batch:
            loss = model(given)
            loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    backend = Interpreted(outline=False, reroll=True, disable=disable)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for index in range(3):
        compiled(*(tokens(seed=10 * index + each) for each in range(micro_batches)))
    return snapshot(model, opt), backend.graphs[0].graph, qg.report(compiled)


def text(graph: fx.Graph) -> list[str]:
    """A graph, nodes by their place."""
    place = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    return [
        f"{node.op} {'' if node.op == 'placeholder' else node.target} "
        f"{fx.map_arg((node.args, node.kwargs), place.__getitem__)} {looks(node.meta.get('val'))}"
        for node in graph.nodes
    ]


def traced(report: Any) -> dict[str, int] | None:
    found: dict[str, int] | None = report._latest.program.get("rerolled")
    return found


def told(report: Any) -> list[dict[str, Any]]:
    """What is told of each layer, but for the names of nodes, which count them."""
    return [{name: fact for name, fact in layer.items() if name != "node"} for layer in report.layers]


@pytest.mark.parametrize(
    ("blocks", "settings"),
    [
        pytest.param(equal_blocks, {}, id="plain"),
        pytest.param(equal_blocks, {"micro_batches": 2, "max_grad_norm": 0.1}, id="accumulated-clipped"),
        pytest.param(two_kinds, {}, id="two-kinds"),
        pytest.param(equal_blocks, {"recompute": True}, id="checkpointed"),
    ],
)
def test_graph_results_and_report_are_those_of_all_layers(
    blocks: Callable[[], list[Block]], settings: dict[str, Any]
) -> None:
    settings = dict(settings)
    recompute = settings.pop("recompute", False)
    values, graph, report = run(stack(blocks, recompute), **settings)
    expected, whole, full_report = run(stack(blocks, recompute), disable=("unroll",), **settings)
    assert traced(report) == {"traced": KEPT, "copied": 2}
    assert traced(full_report) is None
    assert text(graph) == text(whole)
    for name, value in expected.items():
        assert torch.equal(values[name].nan_to_num(), value.nan_to_num()), name
    assert told(report) == told(full_report)


@pytest.mark.parametrize("case", ["few", "another", "tapped", "shared"])
def test_layers_that_are_not_alike_are_all_traced(case: str) -> None:
    model = Stack(equal_blocks(KEPT + 1 if case == "few" else LAYERS))
    if case == "another":
        model.blocks[4].function = torch.tanh
    if case == "tapped":
        model.tap = 4
    if case == "shared":
        model.blocks[5].linear.weight = model.blocks[3].linear.weight
    assert traced(run(model)[2]) is None
