"""An update at full rank reads its gradient as it is made, block by block, where nobody else needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphs import after, results, targets, traced
from kernels_support import evaluated_kernels
from support import assert_within_contract
from torch import Tensor, fx, nn

import qgalore_compile as qg
from qgalore_compile.kernels.ops import run_program, run_rows
from qgalore_compile.kernels.rows import squares
from qgalore_compile.passes.nodes import Mutation, value

aten = torch.ops.aten
V, D, TOKENS = 300, 256, 8
PASSES = ("update", "fuse", "row_blocks")


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """Programs are evaluated."""
    with evaluated_kernels():
        yield


def product(logits: Tensor, x: Tensor) -> Tensor:
    return logits.t() @ x


def indexed(dx: Tensor, tokens: Tensor) -> Tensor:
    return aten.embedding_dense_backward(dx, tokens, V, -1, False)


Gradient = Callable[..., Tensor]


def rewritten(gradient: Gradient, given: list[Tensor], *, norm: bool = True, extra: str = "") -> tuple[Any, Any]:
    """w ← w - 0.1 (m ← 0.9 m + 0.1 g), where the norm is finite: the record of the pass, and the graph, whose results
    are those of the graph before it."""

    def step(w: Tensor, m: Tensor, *rest: Tensor) -> Tensor:
        g = gradient(*rest)
        total = torch.linalg.vector_norm(g, dtype=torch.float32) if norm else torch.zeros(())
        momentum = 0.9 * m + 0.1 * g.float()
        new = w - 0.1 * torch.where(total.isfinite(), momentum, 0.0).to(w.dtype)
        aten.copy_.default(w, new)
        aten.copy_.default(m, momentum)
        return total + g.float().amax() if extra else total

    weight = torch.randn(V, D).to(gradient(*given).dtype)
    inputs = [weight, torch.randn(V, D), *given]
    module = traced(step, *inputs, names=["w", "m", "a", "b", "c", "d"][: len(inputs)])
    expected = results(module, inputs)
    record = after(module, *PASSES).records[-1]
    found = results(module, inputs)
    assert_within_contract(*(dict(zip("twm", each, strict=False)) for each in (found, expected)))
    return record, module


def whole(graph: fx.Graph) -> list[str]:
    """Nodes of the gradient's size that are computed."""
    return [node.name for node in graph.nodes
            if node.op == "call_function" and getattr(value(node), "shape", None) == (V, D)
            and node.target is not torch.ops.aten.copy_.default and "getitem" not in node.name]  # fmt: skip


def factors(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> list[Tensor]:
    return [torch.randn(tokens, V).to(dtype), torch.randn(tokens, D).to(dtype)]


def rows(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(TOKENS, D).to(dtype), torch.randint(V, (TOKENS,))]


GRADIENTS: dict[str, tuple[Gradient, list[Callable[..., list[Tensor]]]]] = {
    "of a head": (product, [factors]),
    "of an embedding": (indexed, [rows]),
    "of both, tied": (lambda a, b, c, d: product(a, b) + indexed(c, d), [factors, rows]),
    "of two micro-batches": (lambda a, b, c, d: product(a, b) + product(c, d), [factors, factors]),
}


@pytest.mark.parametrize(("name", "norm"), [*((name, True) for name in GRADIENTS), ("of a head", False)])
def test_the_gradient_never_exists(name: str, norm: bool) -> None:
    """With its norm, which the optimizer of this package always takes, and without."""
    gradient, makers = GRADIENTS[name]
    record, module = rewritten(gradient, [each for make in makers for each in make()], norm=norm)
    assert (len(record.matches), record.skipped) == (1, [])
    assert whole(module.graph) == []
    (call,) = filter(None, (Mutation.of(node, run_program, run_rows) for node in module.graph.nodes))
    assert call.op is run_rows
    assert [node.target for node in module.graph.nodes].count(squares) == norm


def test_a_head_in_bfloat16_has_its_product_in_bfloat16() -> None:
    record, module = rewritten(product, factors(torch.bfloat16))
    assert len(record.matches) == 1
    assert whole(module.graph) == []


@pytest.mark.parametrize(
    ("gradient", "given", "extra", "why"),
    [
        (product, factors(), "amax", "read by more than its update and its norm"),
        (product, factors(tokens=200), "", "is larger than it"),
        (lambda a, b: (a.t() @ b).relu(), factors(), "", None),
        (lambda a, b: (a.double().t() @ b.double()).float(), factors(), "", None),
    ],
    ids=["another reader", "more tokens than it is worth", "no sum", "products of another type"],
)
def test_another_gradient_stays_whole(gradient: Gradient, given: list[Tensor], extra: str, why: str | None) -> None:
    """Why it does is told where it is a sum of such terms."""
    record, module = rewritten(gradient, given, extra=extra)
    assert record.matches == []
    assert run_rows not in targets(module.graph)
    assert (why is None) == (record.skipped == [])
    assert why is None or why in str(record.skipped)


# -- whole steps ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding, a block, and a head that may be the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 256)
        self.blocks = nn.ModuleList([nn.Linear(256, 256)])
        self.head = nn.Linear(256, 300, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        logits = self.head(hidden + self.blocks[0](hidden))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("nonfinite", ["skip_step", pytest.param("skip_parameter", marks=pytest.mark.more)])
@pytest.mark.parametrize("ends", ["untied", "tied", "an INT8 head"])
def test_a_step_of_a_model_is_the_eager_one(ends: str, nonfinite: str) -> None:
    model = Tied(ends == "tied")
    qg.quantize_(model)
    if ends == "an INT8 head":
        qg.quantize_(model, targets=["head"])
    with pytest.warns(qg.CoverageWarning, match="projected: 1 weights"):
        groups = qg.param_groups(model, rank=4)
    opt = qg.QGaLoreAdamW(groups, lr=1e-2, nonfinite=nonfinite, max_grad_norm=1.0)

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = model(tokens)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    report = qg.explain(step, torch.randint(300, (2, 8)))
    (passed,) = [each for each in report.passes if each.name == "row_blocks"]
    assert (len(passed.matches), passed.skipped) == (1 if ends == "tied" else 2, [])
    checked = qg.check(step, torch.randint(300, (2, 8)))
    assert checked.ok, checked
