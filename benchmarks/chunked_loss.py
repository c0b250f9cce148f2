"""A loss over a vocabulary, by rows of its logits and as Inductor has it: seconds, and what memory grows by in a step.

    .venv/bin/python benchmarks/chunked_loss.py
    .venv/bin/python benchmarks/chunked_loss.py --tokens 2048 --vocabulary 32000 --width 4096

A linear layer, a head, cross-entropy, backward and plain gradient descent, in float32: one step, compiled with and
without pass `chunked_loss`, in one process, by turns.  A peak is the kernel's count of resident pages over a step
(VmHWM) less what was resident before it.  Gradients are compared with eager PyTorch's in float64.  Writes
`results/chunked-loss-<tokens>-<vocabulary>-<width>.json`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from common import (
    RESULTS,
    Out,
    cell,
    command,
    commit,
    forget_peak,
    interleaved,
    machine,
    process_bytes,
    ratios,
    seconds_of,
    spread,
    write_result,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SIDES: dict[str, dict[str, Any]] = {"chunked": {}, "unchunked": {"disable": ["chunked_loss"]}}
"""A side's options."""


class Net(nn.Module):
    """A linear layer and a head."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.head(self.first(x)), labels)


def step_of(net: Net, lr: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Plain gradient descent."""

    def step(x: Tensor, labels: Tensor) -> Tensor:
        loss = net(x, labels)
        loss.backward()
        with torch.no_grad():
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.sub_(lr * parameter.grad)
                parameter.grad = None
        return loss.detach()

    return step


def measure(step: Callable[..., Tensor], *given: Tensor) -> tuple[float, int]:
    """Seconds of a step, and bytes that it grows the process by at most."""
    gc.collect()
    forget_peak()
    before = process_bytes("VmRSS")
    seconds = seconds_of(lambda: step(*given).item())
    return seconds, process_bytes("VmHWM") - before


def error(net: Net, made: Callable[..., Tensor], x: Tensor, labels: Tensor) -> dict[str, float]:
    """By weight, how far a step of rate 1 is from float64's, as a share of what it moves."""
    exact = Net(*net.head.weight.shape[::-1]).double()
    exact.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    start = {name: value.clone() for name, value in net.state_dict().items()}
    step_of(exact, 1.0)(x.double(), labels)
    made(x, labels)
    found = {}
    for name, value in net.state_dict().items():
        moved = exact.state_dict()[name] - start[name]
        found[name] = float((value - start[name] - moved).norm() / moved.norm())
        value.copy_(start[name])
    return found


def main(
    tokens: Annotated[int, typer.Option(help="Rows of the logits.")] = 4096,
    vocabulary: Annotated[int, typer.Option(help="Their columns.")] = 49_152,
    width: Annotated[int, typer.Option(help="Of the head's input.")] = 576,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=2)] = 5,
    out: Out = RESULTS,
) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    net = Net(width, vocabulary)
    made, errors = {}, {}
    for side, options in SIDES.items():
        torch._dynamo.reset()
        few = slice(0, min(tokens, 512))  # float64 takes its time
        made[side] = torch.compile(step_of(net, 1.0), backend="qgalore", fullgraph=True, options=options)
        errors[side] = error(net, made[side], x[few], labels[few])
        made[side] = torch.compile(step_of(net, 1e-3), backend="qgalore", fullgraph=True, options=options)
    found = interleaved({side: lambda _, side=side: measure(made[side], x, labels) for side in SIDES}, rounds, 1)
    seconds = {side: spread([each for each, _ in values]) for side, values in found.items()}
    peaks = {side: spread([each / 1e6 for _, each in values]) for side, values in found.items()}
    both = [[each for each, _ in found[side]] for side in SIDES]
    result = {
        "command": command(), "commit": commit(), "machine": machine(), "threads": torch.get_num_threads(),
        "tokens": tokens, "vocabulary": vocabulary, "width": width, "seconds": seconds, "peak_mb": peaks,
        "seconds_ratio": spread(ratios(*both)), "errors": errors,
        "peak_ratio": peaks["chunked"]["median"] / peaks["unchunked"]["median"],
    }  # fmt: skip
    write_result(out / f"chunked-loss-{tokens}-{vocabulary}-{width}.json", result)
    for side in SIDES:
        print(f"{side}: {cell(seconds[side], '.2f')} s, {cell(peaks[side], '.0f')} MB; {errors[side]}")
    print(
        f"chunked ÷ unchunked: {cell(result['seconds_ratio'], '.3f')} of the seconds, {result['peak_ratio']:.3f} of MB"
    )


if __name__ == "__main__":
    typer.run(main)
