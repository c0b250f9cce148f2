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
        pytest.param(two_kinds, {}, id="two-kinds"),
        pytest.param(equal_blocks, {"recompute": True}, id="checkpointed", marks=pytest.mark.more),
        pytest.param(
            equal_blocks, {"recompute": True, "micro_batches": 2, "max_grad_norm": 0.1}, id="checkpointed-accumulated"
        ),
        pytest.param(equal_blocks, {"rule": "apollo"}, id="drawn projectors"),
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


# -- steps whose layers look alike to Dynamo, and that depend on how many there are ----------------------------------

Step = Callable[[Tensor, list[Tensor]], Any]
FEW = KEPT + 2


def layer(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden + torch.tanh(hidden @ weight)


def counted(x: Tensor, weights: list[Tensor]) -> Any:
    count = torch.zeros(())
    for weight in weights:
        x, count = layer(x, weight), count + torch.ones(())
    return x / count


def counted_in_place(x: Tensor, weights: list[Tensor]) -> Any:
    count = torch.zeros(())
    for weight in weights:
        x = layer(x, weight)
        count.add_(1)
    return x / count


def averaged_by_all(x: Tensor, weights: list[Tensor]) -> Any:
    """As a batch norm that layers share counts its batches, and averages over them."""
    mean, var, batches = torch.zeros(4), torch.ones(4), torch.zeros(())
    for weight in weights:
        batches.add_(1)
        x = nn.functional.batch_norm(layer(x, weight), mean, var, training=True)
    return x, mean, var, batches


def mean_of_all(x: Tensor, weights: list[Tensor]) -> Any:
    found = []
    for weight in weights:
        x = layer(x, weight)
        found.append(x.norm())
    return torch.stack(found).mean()


def one_value_of_all(x: Tensor, weights: list[Tensor]) -> Any:
    """What every layer counts is one node behind tracing, and the list of it does not grow."""
    found, mask = [], x > 0
    for weight in weights:
        found.append(mask.sum())
        x = layer(x, weight)
    return x, torch.stack(found).sum()


def linked_by_nothing(x: Tensor, weights: list[Tensor]) -> Any:
    """A count that hangs on layers by an empty slice alone, which tracing drops."""
    count = torch.zeros(3)
    for weight in weights:
        count = count + 1
        x = torch.cat([layer(x, weight).flatten(), count[:0]]).view(3, 4)
    return x, count


def one_weight(x: Tensor, weights: list[Tensor]) -> Any:
    for _ in weights:
        x = layer(x, weights[0])
    return x


def dropped_out(x: Tensor, weights: list[Tensor]) -> Any:
    for weight in weights:
        x = layer(x, weight) + nn.functional.dropout(weight, 1.0).sum()
    return x


def apart_from_gradients(x: Tensor, weights: list[Tensor]) -> Any:
    """Gradients that are one value for all layers."""
    total = torch.zeros(())
    for weight in weights:
        x, total = layer(x, weight.detach()), total + weight.sum()
    return torch.stack([each.norm() for each in torch.autograd.grad(x.sum() + total, weights)]).norm()


@pytest.mark.parametrize(
    "step",
    [
        counted, counted_in_place, averaged_by_all, one_value_of_all, linked_by_nothing, one_weight,
        apart_from_gradients, mean_of_all, dropped_out,
    ],
    ids=lambda step: step.__name__,
)  # fmt: skip
def test_what_follows_from_how_many_layers_there_are_is_right(step: Step) -> None:
    found = compared(step)
    assert found is None or step is mean_of_all  # of which what tracing makes depends on no number


def compared(step: Step) -> dict[str, int] | None:
    """What is told of layers that were put back; a step's result must be the one that it has uncompiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    weights = [torch.randn(4, 4, requires_grad=step is apart_from_gradients) for _ in range(FEW)]
    compiled = torch.compile(step, backend=Interpreted(outline=False, reroll=True), fullgraph=True)
    torch.testing.assert_close(compiled(x, weights), step(x, weights), rtol=1e-5, atol=1e-6)
    return traced(qg.report(compiled))


def test_what_does_not_is_traced_for_seven_of_them() -> None:
    def step(x: Tensor, weights: list[Tensor]) -> Any:
        norms = []
        for weight in weights:
            x = layer(x, weight)
            norms.append(x.norm())
        return x, torch.stack(norms).norm()

    assert compared(step) == {"traced": KEPT, "copied": FEW - KEPT}
