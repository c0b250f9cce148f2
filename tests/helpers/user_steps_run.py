"""Runs the programs of ``user_steps.py``: as they are, or compiled by ``backend="qgalore"``.

A user names the backend by that string and nothing else, and so does a program.  Only what stands behind the backend's
passes is another here: graphs are run as Dynamo traced them, or as the passes leave them, and no code is generated.
"""

from __future__ import annotations

import copy
import io
import itertools
import linecache
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch.optim.optimizer as of_torch
from kernels_support import evaluated_kernels
from support import moments_of
from torch import Tensor, fx
from user_steps import UserStep
from user_steps_text import HEAD

import qgalore_compile as qg
from qgalore_compile.backend import reroll
from qgalore_compile.backend.dry_run import dry, without_cache

WIDTHS = {"one": (6,), "two widths": (6, 8), "three widths": (6, 8, 10)}
SIZES = {"equal": (5, 5, 5), "last short": (5, 5, 3), "growing": (4, 5, 6)}  # of one net; the last two of several
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _set(key: str, value: Callable[[int], Any]) -> Callable[[Any, int], None]:
    def change(opt: Any, index: int) -> None:
        for group in opt.param_groups:
            if key != "scale" or "rank" in group:
                group[key] = value(index)

    return change


def _fill(opt: Any, index: int) -> None:
    for group in opt.param_groups:
        group["lr"].fill_(0.01 + 0.01 * index)


SETTINGS: dict[str, Callable[[Any, int], None]] = {
    "lr": _set("lr", lambda index: 0.01 + 0.01 * index),
    "lr fill": _fill,
    "weight_decay": _set("weight_decay", lambda index: 0.1 * (index + 1)),
    "betas": _set("betas", lambda index: (0.9 - 0.1 * index, 0.99)),
    "scale": _set("scale", lambda index: 0.25 + index),
    "max_grad_norm": lambda opt, index: setattr(opt, "max_grad_norm", 0.05 * (index + 1)),
}
"""What is set between steps, before that of a number."""


def _reload(net: Any, opt: Any) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    net.load_state_dict({name: value.detach().clone() for name, value in net.state_dict().items()})


BETWEEN: dict[str, Callable[[Any, Any], Any]] = {
    "freeze": lambda net, opt: net.c.weight.requires_grad_(False),
    "hook": lambda net, opt: net.c.weight.register_hook(lambda g: g * 0),
    "load": _reload,
    "unfreeze": lambda net, opt: net.requires_grad_(True),
    "eval mode": lambda net, opt: net.eval(),
    "gradient": lambda net, opt: setattr(net.c.weight, "grad", torch.ones_like(net.c.weight)),
    "new weights": lambda net, opt: net.c.weight.data.mul_(0.5),
}
"""What happens before the second step."""

_runs = itertools.count()


@dataclass
class Outcome:
    """What a program left.

    Attributes:
        start: weights and state by name in float64, decoded where they are quantised.
        end: likewise, after the last step that was taken.
        gradients: after it, by name; None where there is none.
        results: of each step, and the numbers that it noted.
        steps: how many were taken, of all nets.
        error: what ended them.
    """

    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    steps: int = 0
    error: Exception | None = None

    @property
    def changed(self) -> bool:
        """Whether anything is other than at the start."""
        return any(not torch.equal(value, self.end[name]) for name, value in self.start.items())


def program(step: UserStep) -> str:
    """All of its text."""
    return f"{HEAD}\n{step.source()}\n"


def run(step: UserStep, how: str, steps: int = 3) -> Outcome:
    """Run a program: ``how`` is "eager", "traced" (graphs as Dynamo makes them) or "whole" (through the passes)."""
    text, outcome, made = program(step), Outcome(), []
    name = f"<user step {how} {hash(step)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = ModuleType(f"user_step_{next(_runs)}")  # Dynamo imports what holds a code's globals, and keeps it by name
    scope = vars(module)

    def compiler(function: Callable[..., Any]) -> Any:
        if how == "eager":
            return function
        dynamic = {"yes": True, "no": False}.get(step.dynamic)
        return torch.compile(function, backend="qgalore", fullgraph=step.fullgraph == "yes", dynamic=dynamic)

    scope["COMPILE"] = compiler
    steps = 2 if step.nets != "one" else steps
    torch._dynamo.reset()
    try:
        with _as_in_a_program(module), _without_code_generation(how):
            exec(compile(text, name, "exec"), scope)
            for width in WIDTHS["one" if step.form == "global" else step.nets]:
                torch.manual_seed(width)
                made.append(scope["make"](width))
            outcome.start = _state(made)
            try:
                for index, size in enumerate(SIZES[step.batches][-steps:]):
                    for each in made:
                        outcome.results.append(_one_step(step, each, index, size))
                        outcome.steps += 1
            except Exception as error:
                outcome.error = error
    finally:
        linecache.cache.pop(name, None)
    outcome.end = _state(made)
    outcome.gradients = {
        f"{index}.{name}": p.grad for index, each in enumerate(made) for name, p in each[0].named_parameters()
    }
    outcome.results += [*scope["LOSSES"], *scope["NORMS"], *scope["NOTES"]]
    return outcome


def _one_step(step: UserStep, made: Any, index: int, size: int) -> Any:
    """Take a step of one net, with what the loop around it does before and after."""
    net, opt, other, schedule, _, take = made
    torch.manual_seed(index)
    x = torch.randn(size, net.a.in_features).to(DTYPES.get(step.precision, torch.float32))
    if step.setting in SETTINGS:
        SETTINGS[step.setting](opt, index)
    if index == 1 and step.between in BETWEEN:
        BETWEEN[step.between](net, opt)
    result = take(x, torch.randn(size, 3), *([index % 2 == 0] if step.micro_batches == "every second" else []))
    if step.zero == "outside":
        for each in (opt, other):
            if each is not None:
                each.zero_grad()
    if step.schedule == "outside":
        schedule.step()
    result = result["loss"] if isinstance(result, dict) else result
    return 0.0 if result is None else float(result)


def _state(made: Sequence[Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for index, (net, *optimizers, _, _, _) in enumerate(made):
        names = {p: f"{index}.{name}" for name, p in net.named_parameters()}
        found |= {f"{index}.{name}": buffer for name, buffer in net.named_buffers()}
        for p, name in names.items():
            found[name] = p.dequantize() if isinstance(p, qg.Int8Weight) else p
        for opt in optimizers:
            for p, state in ({} if opt is None else opt.state).items():
                found |= {f"{names[p]}/{key}": value for key, value in state.items() if not key.startswith("exp_avg")}
                if isinstance(opt, qg.QGaLoreAdamW):
                    found |= dict(zip((f"{names[p]}/m", f"{names[p]}/v"), moments_of(opt, p), strict=True))
    return {name: torch.as_tensor(value).detach().double().nan_to_num().clone() for name, value in found.items()}


@contextmanager
def _without_code_generation(how: str) -> Iterator[None]:
    """What the backend calls when it has parsed its options, with an interpreter where Inductor would generate code."""
    compile_fx = reroll.compile_fx

    def instead(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        if how == "traced":
            return gm.forward
        with without_cache():
            return compile_fx(gm, inputs, **{**settings, "inner_compile": dry(lambda graph: graph.forward)})

    # dropout's own random numbers, which an interpreter draws as eager does
    guards = mock.patch.object(torch._dynamo.guards, "profile_guard_manager", return_value=0.0)  # which takes a while
    with (
        mock.patch.object(reroll, "compile_fx", instead),
        evaluated_kernels(),
        guards,
        torch._inductor.config.patch(fallback_random=True),
    ):
        yield


@contextmanager
def _as_in_a_program(module: ModuleType) -> Iterator[None]:
    """A module that can be imported, warnings that are no errors, nothing printed, no hook left behind."""
    hooks, sys.modules[module.__name__] = dict(of_torch._global_optimizer_post_hooks), module
    quiet = mock.patch.object(logging.getLogger("steps"), "disabled", True)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), quiet:
            warnings.simplefilter("ignore")
            yield
    finally:
        del sys.modules[module.__name__]
        of_torch._global_optimizer_post_hooks.clear()
        of_torch._global_optimizer_post_hooks.update(hooks)
