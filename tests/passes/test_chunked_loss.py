"""A loss over a vocabulary is computed by rows of logits, down to their gradient, where it can be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphs import targets
from kernels_support import evaluated_kernels
from support import Interpreted, compiled
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy, log_softmax

import qgalore_compile as qg
from qgalore_compile.kernels.loss import below
from qgalore_compile.kernels.ops import run_loss, run_program
from qgalore_compile.passes.nodes import value

V, TOKENS = 300, 64
FEW, MANY = 16, 80
"""Widths at which the head's gradient is smaller and larger than its factors."""

LossOf = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs are evaluated, for losses of any size."""
    for name in ("chunked_loss", "row_slices"):
        monkeypatch.setattr(sys.modules[f"qgalore_compile.passes.{name}"], "SMALL", 1)
    with evaluated_kernels():
        yield


class Net(nn.Module):
    """A linear layer and a head."""

    def __init__(self, width: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width, dtype=dtype)
        self.head = nn.Linear(width, V, bias=bias, dtype=dtype)


def labels(ignored: bool = False) -> Tensor:
    found = torch.randint(V, (TOKENS,), generator=torch.Generator().manual_seed(1))
    return found.masked_fill(torch.arange(TOKENS) % 3 == 0, -100) if ignored else found


def rewritten(
    loss_of: LossOf, y: Tensor, *, width: int = FEW, bias: bool = False, dtype: torch.dtype = torch.float32,
    frozen: tuple[str, ...] = (),
) -> fx.Graph:  # fmt: skip
    """The graph of a forward and backward, whose loss and gradients are eager's."""
    net, x = Net(width, bias, dtype), torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(net.head(net.first(x)), y)
        loss.backward()
        return loss.detach()

    def run(step: Callable[..., Tensor]) -> list[Tensor]:
        net.zero_grad()
        return [step(x, y), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    made, backend = compiled(step)
    found, expected = run(made), run(step)
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= limit * float(other.abs().max()) + 1e-30
    return backend.graphs[-1].graph


def call_of(graph: fx.Graph) -> object:
    """What computes the loss."""
    return next((each for each in targets(graph) if each in (run_loss, run_program)), None)


def of_logits(graph: fx.Graph) -> list[str]:
    """Nodes of the logits' size that are computed, but for those that are the same storage."""
    return [node.name for node in graph.nodes
            if node.op == "call_function" and getattr(value(node), "shape", None) in ((TOKENS, V), (V, TOKENS))
            and node.target is not torch.ops.aten.permute.default and "getitem" not in node.name]  # fmt: skip


def smooth(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z.float(), y, label_smoothing=0.1)


def capped_with_z_loss(z: Tensor, y: Tensor) -> Tensor:
    z = 30 * torch.tanh(z / 30)
    return cross_entropy(z, y) + 1e-4 * torch.logsumexp(z, -1).square().mean()


def in_batches(z: Tensor, y: Tensor) -> Tensor:
    """Soft-capping and the second term on (B, T, V), as models write them."""
    z = 30 * torch.tanh(z.view(4, -1, V) / 30)
    return cross_entropy(z.float().view(-1, V), y) + 1e-4 * torch.logsumexp(z.float(), -1).square().mean()


def shifted(z: Tensor, y: Tensor) -> Tensor:
    """Within the loss, as models do it: pass ``row_slices`` takes the copies away before."""
    return cross_entropy(z.view(4, -1, V)[:, :-1].flatten(0, 1).float(), y.view(4, -1)[:, 1:].flatten())


def focal(z: Tensor, y: Tensor) -> Tensor:
    picked = log_softmax(z, -1).gather(1, y[:, None])
    return -((1 - picked.exp()) ** 2 * picked).mean()


def weighted(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z, y, weight=torch.linspace(0.5, 1.5, V), reduction="sum")


LOSSES: dict[str, tuple[LossOf, dict[str, Any]]] = {
    "cross-entropy": (cross_entropy, {}),
    "with a bias": (cross_entropy, {"bias": True}),
    "labels ignored, smoothed": (smooth, {"y": labels(True)}),
    "capped, with a z-loss": (capped_with_z_loss, {}),
    "of three dimensions": (in_batches, {"y": labels(True)}),
    "focal": (focal, {}),
    "shifted": (shifted, {}),
    "weighted, summed": (weighted, {}),
    "in bfloat16": (cross_entropy, {"dtype": torch.bfloat16}),
    "of bfloat16 in float32": (smooth, {"dtype": torch.bfloat16}),
    "of a head that does not learn": (cross_entropy, {"frozen": ("head.weight",)}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_logits_exist_where_their_gradients_are_smaller(name: str) -> None:
    loss_of, keys = LOSSES[name]
    graph = rewritten(loss_of, **{"y": labels(), **keys})
    assert call_of(graph) is run_loss
    assert of_logits(graph) == []


@pytest.mark.parametrize("name", ["cross-entropy", "labels ignored, smoothed", "of three dimensions", "in bfloat16"])
def test_they_become_their_gradient_in_place_where_those_are_larger(name: str) -> None:
    loss_of, keys = LOSSES[name]
    graph = rewritten(loss_of, **{"y": labels(), **keys, "width": MANY})
    assert call_of(graph) is run_program
    assert len(of_logits(graph)) == 1


class Tied(nn.Module):
    """A head that is the embedding's weight, or an INT8 one."""

    def __init__(self, width: int, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width)])
        self.head = nn.Linear(width, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        qg.quantize_(self, group_size=8, targets=["blocks.0", *([] if tied else ["head"])])

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return cross_entropy(self.head(hidden + self.blocks[0](hidden)).flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize(
    ("tied", "micro_batches", "disable"), [(True, 1, []), (True, 2, ["order"]), (False, 1, [])],
    ids=["tied", "tied, two micro-batches, as it left them", "an INT8 head"],
)  # fmt: skip
def test_a_step_of_a_model_is_the_eager_one(tied: bool, micro_batches: int, disable: list[str]) -> None:
    """A gradient that is added to another one where it is computed, and a weight that is decoded twice.  Pass ``order``
    would mend the order of nodes."""
    model = Tied(FEW, tied)
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=4, quant_group_size=8, targets=["blocks.0"]), lr=0.01)

    def step(tokens: Tensor) -> Tensor:
        total = torch.zeros(())
        for part in tokens.chunk(micro_batches):
            loss = model(part) / micro_batches
            loss.backward()
            total += loss.detach()
        opt.step()
        opt.zero_grad()
        return total

    tokens = torch.randint(V, (4 * micro_batches, TOKENS // 4))
    assert qg.check(step, tokens, backend=Interpreted(disable=disable)).ok
    made, backend = compiled(step, disable=disable)
    made(tokens)
    assert targets(backend.graphs[-1].graph).count(run_loss) == micro_batches


PERM = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))


def each(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z, y, reduction="none")


def several(z: Tensor, y: Tensor) -> Tensor:
    return -(torch.zeros(TOKENS, V).scatter(1, y.view(-1, 2), 1.0) * log_softmax(z, -1)).sum(-1).mean()


def from_the_first_columns(z: Tensor, y: Tensor) -> Tensor:
    return -(torch.zeros(TOKENS, V).scatter_add(1, y[:, None], z.softmax(-1).detach()) * log_softmax(z, -1)).sum()


def put_into_rows(z: Tensor, y: Tensor) -> Tensor:
    return (each(z, y) * torch.zeros(TOKENS).scatter_add(0, y % TOKENS, each(z, y).detach())).mean()


def a_number_a_batch(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy((z.view(4, -1, V) / torch.arange(1.0, 5).view(4, 1, 1)).view(-1, V), y)


@pytest.mark.parametrize(
    "loss_of",
    [
        pytest.param(lambda z, y: (each(z, y) * each(z, y).detach().gather(0, PERM).sigmoid()).mean(), id="of rows"),
        several,
        from_the_first_columns,
        pytest.param(lambda z, y: (each(z, y) * torch.where((-z.relu()).any(-1), 2.0, 1.0)).mean(), id="any of floats"),
        put_into_rows,
        a_number_a_batch,
    ],
)
def test_picking_and_putting_otherwise_is_eagers(loss_of: LossOf) -> None:
    rewritten(loss_of, labels())


def test_a_number_of_rows_and_a_view_of_it_are_both_results() -> None:
    net, x, y = Net(FEW, False, torch.float32), torch.randn(TOKENS, FEW), labels()

    def step() -> tuple[Tensor, ...]:
        z = net.head(net.first(x))
        lse = z.logsumexp(-1, keepdim=True)
        loss = cross_entropy(z, y) + 0.1 * lse.squeeze(-1).square().mean()
        loss.backward()
        return loss.detach(), lse.detach(), lse.detach().squeeze(-1)

    for one, other in zip(compiled(step)[0](), step(), strict=True):
        torch.testing.assert_close(one, other)


def test_logits_of_something_with_itself_have_both_gradients() -> None:
    weight, x, y = nn.Parameter(torch.randn(2, 5)), torch.randn(TOKENS, 5), (torch.arange(TOKENS) + 1) % TOKENS

    def step() -> Tensor:
        keys = x @ weight.t()
        loss = cross_entropy(keys @ keys.t(), y)
        loss.backward()
        return loss.detach()

    step()
    expected, weight.grad = weight.grad, None
    compiled(step)[0]()
    torch.testing.assert_close(weight.grad, expected)


def accuracy(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z, y) + 0 * (z.argmax(-1) == y).float().mean()


@pytest.mark.parametrize(
    "loss_of",
    [
        pytest.param(accuracy, id="the logits are read by something else"),
        pytest.param(lambda z, y: cross_entropy(z, y) ** 2, id="the gradient's scale is the loss"),
        pytest.param(lambda z, y: cross_entropy(z, y) + z.square().mean(), id="a sum of another kind"),
        pytest.param(lambda z, y: cross_entropy(z + z.mean(0), y), id="rows that depend on each other"),
        pytest.param(lambda z, y: z[torch.arange(TOKENS), y].square().mean(), id="no softmax"),
        pytest.param(lambda z, y: cross_entropy(z.double(), y), id="in float64"),
    ],
)
def test_another_loss_stays_as_it_is(loss_of: LossOf) -> None:
    graph = rewritten(loss_of, labels())
    assert call_of(graph) is None
    assert below not in targets(graph)


def test_a_label_out_of_bounds_stays_an_error() -> None:
    """A sum over what a comparison lets pass would be 0."""
    wrong = labels()
    wrong[5] = V
    with pytest.raises(IndexError, match=f"label {V} is none of the {V}"):
        rewritten(cross_entropy, wrong)
