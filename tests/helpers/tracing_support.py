"""Steps for tests of tracing: a backend without a compiler behind it, small models, and training held against eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn

import qgalore_compile as qg
import qgalore_compile.backend.entry  # which teaches Dynamo
from qgalore_compile.backend.tracing import step_backend


@step_backend
class Traced:
    """A backend that runs the graph as it is, traced as a step of "qgalore"; ``sizes`` are those of its inputs."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.sizes: list[list[Any]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        given = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
        self.sizes.append([size for x in given if isinstance(x, Tensor) for size in x.shape])
        return gm.forward


def parts(width: int = 6, **keys: Any) -> tuple[nn.Module, qg.QGaLoreAdamW]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))
    return net, qg.QGaLoreAdamW(qg.param_groups(net, rank=2, refresh="svd", **keys), lr=0.01, moments="32bit")


def batch(seed: int, rows: int = 5) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()  # type: ignore[no-any-return]


Make = Callable[[nn.Module, qg.QGaLoreAdamW], Callable[[Tensor], Any]]


def trained(
    make: Make, *, fullgraph: bool = True, backend: Any = None, compiled: bool = True
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and gradients after three steps."""
    net, opt = parts()
    step = make(net, opt)
    run = torch.compile(step, backend=backend or Traced(), fullgraph=fullgraph) if compiled else step
    for seed in range(3):
        run(batch(seed))
    return [p.detach() for p in net.parameters()], [p.grad for p in net.parameters()]


def assert_as_eager(make: Make, **how: Any) -> None:
    expected, expected_grads = trained(make, compiled=False)
    found, found_grads = trained(make, **how)
    start = [p.detach() for p in parts()[0].parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(expected, start, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [g is None for g in found_grads] == [g is None for g in expected_grads]
    for mine, theirs in zip(found_grads, expected_grads, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def zero_first(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
    def step(x: Tensor) -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


BREAKS: dict[str, Callable[[Tensor], Any]] = {
    "print": lambda loss: print("loss"),
    "item": lambda loss: loss.item(),
    "branch": lambda loss: 1 if torch.isnan(loss) else 0,
    "graph_break": lambda loss: torch._dynamo.graph_break(),
}


def broken(what: str, where: str) -> Make:
    breaks = BREAKS[what]

    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
        def step(x: Tensor) -> None:
            hidden = net[0](x)
            if where == "inside the model":
                breaks(hidden.sum())
            loss = net[2](net[1](hidden)).square().mean()
            if where == "before backward":
                breaks(loss)
            loss.backward()
            if where == "before the update":
                breaks(loss)
            opt.step()
            opt.zero_grad()
            if where == "at the end":
                breaks(loss)

        return step

    return make
