"""Forward and backward compiled as two graphs: a compiled model, or a step that returns a loss with its history."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qgalore_compile as qg

WIDTH, CLASSES, BATCH = 16, 12, 8


class Net(nn.Module):
    def __init__(self, loss: str, int8: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.a = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, 32)
        self.b, self.head = nn.Linear(32, WIDTH), nn.Linear(WIDTH, CLASSES, bias=loss != "ignore")
        self.loss = loss
        if int8:
            qg.quantize_(self, group_size=8, targets=["a", "b"])

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        logits = self.head(hidden + self.b(nn.functional.gelu(self.a(hidden))))
        if self.loss == "square":
            return (logits - targets[:, None] / CLASSES).square().mean()
        return nn.functional.cross_entropy(logits, targets, ignore_index=3 if self.loss == "ignore" else -100)


def gradients(forward: Callable[[Tensor, Tensor], Tensor], net: Net) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    net.zero_grad()
    forward(*(torch.randint(0, CLASSES, (BATCH,), generator=generator) for _ in range(2))).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.compiles
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("loss", ["cross-entropy", "ignore", "square"])
def test_gradients_of_a_compiled_model_are_eagers(loss: str, int8: bool) -> None:
    net = Net(loss, int8)
    expected = gradients(net, net)
    found = gradients(torch.compile(net, backend="qgalore"), net)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        apart = (found[name] - gradient).abs().max()
        assert apart <= 1e-5 * gradient.abs().max(), name


@pytest.mark.compiles
def test_no_function_in_a_backward_may_overwrite_what_another_reads_or_a_second_backward() -> None:
    net = Net("cross-entropy", True)
    tokens = torch.arange(BATCH) % CLASSES
    loss = torch.compile(net, backend="qgalore")(tokens, tokens.flip(0))
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    loss.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])
