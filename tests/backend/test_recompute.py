"""Checkpointed parts of a model are computed again where a backward reads them: attention, and every micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import compiled, snapshot
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import qgalore_compile as qg

T, D, HEADS = 6, 16, 2
aten = torch.ops.aten


class Attention(nn.Module):
    """Causal self-attention by PyTorch's operator."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(D, 3 * D), nn.Linear(D, D), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).view(-1, T, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return x + self.outer(out.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Two layers of attention, each checkpointed or not."""

    def __init__(self, checkpointed: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(dropout), Attention(dropout)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x.square().mean()


def stepped(checkpointed: bool, micro_batches: int, *, eager: bool = False, **how: Any) -> tuple[Any, fx.Graph | None]:
    """Every tensor after two steps, and the final graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(checkpointed, **how)
    qg.quantize_(model, group_size=8)
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=4, quant_group_size=8), lr=0.01)

    def step(batch: Tensor) -> Tensor:
        losses = []
        for given in batch.chunk(micro_batches):
            loss = model(given)
            loss.backward()
            losses.append(loss.detach())
        opt.step()
        opt.zero_grad()
        return torch.stack(losses).mean()

    run, backend = (step, None) if eager else compiled(step)
    for index in range(2):
        run(torch.randn(4, T, D, generator=torch.Generator().manual_seed(index)))
    return snapshot(model, opt), backend.graphs[0].graph if backend else None


def attentions(graph: fx.Graph) -> int:
    return sum("scaled_dot_product" in str(node.target) and "backward" not in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_is_the_one_without_checkpoints_and_computes_attention_twice(micro_batches: int) -> None:
    values, graph = stepped(True, micro_batches)
    expected, plain = stepped(False, micro_batches)
    assert graph is not None
    assert plain is not None
    assert (attentions(graph), attentions(plain)) == (4 * micro_batches, 2 * micro_batches)
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, equal_nan=True)


def test_of_a_block_its_input_alone_lives_until_the_backward() -> None:
    """Of the last one the loss itself is left, which nothing but the caller reads."""
    _, graph = stepped(True, 1)
    assert graph is not None
    place = {node: index for index, node in enumerate(graph.nodes)}
    attention = [node for node in graph.nodes if "scaled_dot_product" in str(node.target)]
    backward = [place[node] for node in attention if "backward" in str(node.target)]
    first = attention[0]
    assert max(place[user] for pick in first.users for user in pick.users) < min(backward)


def test_dropout_in_it_is_refused_and_what_to_do_is_said() -> None:
    with pytest.raises(Exception, match=r"draws random numbers.*Set the dropout to 0"):
        stepped(True, 1, dropout=0.1)
