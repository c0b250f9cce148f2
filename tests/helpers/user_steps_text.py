"""Pieces of the programs of ``user_steps.py``: what stands before each, and lines by the names of choices."""

from __future__ import annotations

HEAD = """
import functools, logging
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint
import qgalore_compile as qg

LOSSES, NORMS, NOTES = [], [], []


class Net(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.a = nn.Linear(width, width, bias=False)
        self.b = nn.Linear(width, width, bias=False) if kind in ("deep", "shared") else None
        if kind == "shared":
            self.b.weight = self.a.weight
        if kind == "unused":
            self.unused = nn.Linear(width, 2)
        self.c = nn.Linear(width, 3, bias=False)
        self.register_buffer("average", self.c.weight.detach().clone())
        self.inner = {"dropout": nn.Dropout(0.5), "norm": nn.BatchNorm1d(width)}.get(kind, nn.Identity())

    def forward(self, x, hooked=False):
        hidden = torch.tanh(self.a(x))
        if hooked and hidden.requires_grad:
            hidden.register_hook(lambda g: g * 0)
        if self.b is not None:
            hidden = torch.tanh(self.b(hidden))
        return self.c(self.inner(hidden))


@torch._dynamo.disable
def note(loss):
    NOTES.append(float(loss.detach()))


def inner(loss):
    print("inner", loss.shape)
    return loss


def inner_with(loss):
    with Timer():
        note(loss)


class Timer:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def zero(parameter):
    parameter.grad.zero_()


def stop(module, grads, _):
    return tuple(None if grad is None else grad * 0 for grad in grads)


def halve(optimizer, *_):
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.mul_(0.5)
                p.grad[0].zero_()


@torch.no_grad()
def shrink(optimizer, *_):
    optimizer.param_groups[-1]["params"][-1].mul_(0.5)

"""

BACKWARD = {
    "plain": ["LOSS.backward()"],
    "retain": ["LOSS.backward(retain_graph=True)"],
    "of torch": ["torch.autograd.backward(LOSS)"],
    "two losses": ["LOSS.backward(retain_graph=True)", "out.float().mean().backward()"],
    "grad": [
        "own = [p for p in net.parameters() if p.requires_grad]",
        "for p, g in zip(own, torch.autograd.grad(LOSS, own, allow_unused=True)):",
        "    p.grad = g",
    ],
    "inputs": ["LOSS.backward(inputs=[p for p in net.parameters() if p.requires_grad])"],
    "gradient": ["LOSS.backward(torch.full_like(LOSS, 0.5))"],
    "checkpoint": ["LOSS.backward()"],
    "penalty": [
        "for group in opt.param_groups:",
        "    for p in group['params']:",
        "        loss = loss + 0.01 * p.float().square().sum()",
        "LOSS.backward()",
    ],
    "chunks": [
        "LOSS.backward()",
        "for part, goal in zip(x.chunk(2), y.chunk(2)):",
        "    (net(part).float() - goal).square().mean().backward()",
    ],
}
"""How gradients of LOSS come about; with "checkpoint" the forward is another."""

BREAKS = {
    "nothing": [],
    "print": ["print('loss', loss.shape)"],
    "item": ["value = loss.item()"],
    "append": ["LOSSES.append(loss.item())"],
    "float": ["if float(loss) > 1e6:", "    raise SystemExit"],
    "isnan": ["if torch.isnan(loss):", "    raise FloatingPointError('the loss is NaN')"],
    "if gradient": [
        "gradient = next(p.grad for p in net.parameters() if p.grad is not None)",
        "if gradient.abs().max() > 1e6:",
        "    raise FloatingPointError('a gradient')",
    ],
    "loop": ["for p in net.parameters():", "    if p.grad is not None:", "        p.grad.clamp_(-0.01, 0.01)"],
    "average": ["with torch.no_grad():", "    net.average.lerp_(net.c.weight.to(net.average.dtype), 0.5)"],
    "disabled": ["note(loss)"],
    "logging": ["logging.getLogger('steps').warning('loss %s', loss.detach())"],
    "graph_break": ["torch._dynamo.graph_break()"],
    "inner": ["inner(loss)"],
    "try": ["try:", "    note(loss)", "except ValueError:", "    pass"],
    "with": ["with Timer():", "    note(loss)"],
    "inner with": ["inner_with(loss)"],
}

HOOKS = {
    "none": [],
    "parameter": ["net.a.weight.register_hook(lambda g: g * 0)"],
    "post accumulate": ["net.c.weight.register_post_accumulate_grad_hook(zero)"],
    "activation": [],
    "forward": ["net.c.register_forward_hook(lambda module, given, out: out * 2)"],
    "forward pre": ["net.c.register_forward_pre_hook(lambda module, given: (given[0] * 2,))"],
    "backward": ["net.c.register_full_backward_hook(stop)"],
    "step pre": ["opt.register_step_pre_hook(halve)"],
    "step post": ["opt.register_step_post_hook(shrink)"],
    "global step post": ["register_optimizer_step_post_hook(shrink)"],
}
