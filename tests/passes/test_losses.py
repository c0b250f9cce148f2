"""What stands between logits and their gradient is found, and copied on matrices; else the graph is as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import assert_bit_equal, results, targets, traced
from torch import Tensor, fx
from torch.nn.functional import cross_entropy

from qgalore_compile.kernels.read.region import Refusal, RefusedError
from qgalore_compile.passes.losses import Loss, Matrices, loss_of
from qgalore_compile.passes.nodes import make, shape
from qgalore_compile.passes.placement import move_behind

aten = torch.ops.aten
T, V, D = 8, 20, 3

LossOf = Callable[[Tensor, Tensor], Tensor]


def graph_of(loss: LossOf, y: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """A loss and its gradient with respect to hidden (T, D) and weight (V, D)."""

    def step(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        total = loss(x @ w.t(), y)
        return total.detach(), *torch.autograd.grad(total, [x, w])

    inputs = [torch.randn(T, D), torch.randn(V, D), y]
    return traced(step, *inputs, names=["x", "w", "y"]), inputs


def logits_of(module: fx.GraphModule) -> fx.Node:
    return next(node for node in module.graph.nodes if node.target is aten.mm.default)


def log_sum(z: Tensor, y: Tensor) -> Tensor:
    """Shapes (2, T / 2, V), and a number a row and one a column that do not follow from the logits."""
    z = z.view(2, T // 2, V) * torch.linspace(0.5, 1.5, V)
    return (torch.logsumexp(z, -1) * y.view(2, T // 2)).mean()


ROWS = torch.arange(1.0, T + 1)


def found(loss: LossOf, y: Tensor = ROWS) -> tuple[fx.GraphModule, list[Tensor], Loss]:
    module, inputs = graph_of(loss, y)
    result = loss_of(logits_of(module))
    assert result is not None
    return module, inputs, result


def test_the_gradient_is_what_products_read_and_results_are_numbers_of_rows() -> None:
    *_, loss = found(log_sum)
    assert {user.target for user in loss.gradient.users} <= {aten.mm.default, aten.permute.default, aten.t.default}
    assert [shape(node) for node in loss.results] == [(2, T // 2)]
    assert loss.gradient in loss.inside
    assert all(node in loss.inside for node in loss.logits.users)
    assert loss.inside == sorted(loss.inside)
    assert aten.mean.default not in [node.target for node in loss.inside]


def test_copies_are_on_matrices_and_are_equal() -> None:
    module, inputs, loss = found(log_sum)
    before = results(module, inputs)
    matrices = Matrices(module.graph, loss)
    assert {shape(node) for node in matrices.inside} <= {(T, V), (T, 1), ()}
    assert [shape(matrices.of[node]) for node in (loss.gradient, *loss.results)] == [(T, V), (T, 1)]
    kept = (loss.gradient, *loss.results)
    with module.graph.inserting_before(max(matrices.inside).next):
        shaped = [make(module.graph, aten.reshape.default, matrices.of[old], list(shape(old))) for old in kept]
    for old, new in zip(kept, shaped, strict=True):
        old.replace_all_uses_with(new)
    move_behind(shaped[-1], shaped)
    module.graph.lint()
    module.recompile()
    for one, other in zip(results(module, inputs), before, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_that_are_erased_leave_the_graph_as_it_was() -> None:
    module, inputs, loss = found(log_sum)
    before, nodes = results(module, inputs), targets(module.graph)
    Matrices(module.graph, loss).erase()
    assert targets(module.graph) == nodes
    assert_bit_equal(results(module, inputs), before)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: (z.square().sum(-1) * y).sum(), id="no softmax"),
        pytest.param(lambda z, y: torch.logsumexp(z.t(), -1).sum(), id="over the rows"),
        pytest.param(lambda z, y: torch.logsumexp(z.detach(), -1).sum() + 0 * z.sum(), id="no gradient"),
    ],
)
def test_what_is_no_loss_over_columns_is_none(loss: LossOf) -> None:
    assert loss_of(logits_of(graph_of(loss, ROWS)[0])) is None


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: torch.logsumexp(z, -1).sum() + z.argmax(-1).sum(), id="logits"),
        pytest.param(lambda z, y: torch.logsumexp(z, -1).sum() + z.square().mean(), id="a square"),
    ],
)
def test_what_reads_more_than_numbers_of_rows_is_named(loss: LossOf) -> None:
    with pytest.raises(RefusedError) as refused:
        loss_of(logits_of(graph_of(loss, ROWS)[0]))
    assert refused.value.refusal is Refusal.READ


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        pytest.param(lambda z, y: cross_entropy(z, y.long()) ** 2, Refusal.LATE, id="the scale follows from the loss"),
        pytest.param(lambda z, y: torch.logsumexp(z + y[:, None].expand(T, V).flip(0), -1).sum(),
                     Refusal.OPERATION, id="a matrix that is made otherwise"),
    ],
)  # fmt: skip
def test_what_is_no_function_of_rows_is_refused_and_the_graph_stays(loss: LossOf, why: Refusal) -> None:
    module, inputs, found_ = found(loss)
    before, nodes = results(module, inputs), targets(module.graph)
    with pytest.raises(RefusedError) as refused:
        Matrices(module.graph, found_)
    assert refused.value.refusal is why
    assert targets(module.graph) == nodes
    assert_bit_equal(results(module, inputs), before)
