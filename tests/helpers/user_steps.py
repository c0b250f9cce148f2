"""Training steps as users write them: as source text, drawn piece by piece.

A :class:`UserStep` says of every habit (where gradients are cleared, how the step is spelled, what breaks the graph,
which hooks there are, …) which one it has; :meth:`UserStep.source` writes the program.  ``user_steps_run.py`` runs it
with and without a compiler.  The text is what fails, so the text is what a failure shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from user_steps_text import BACKWARD, BREAKS, HOOKS


def choice(names: str) -> Any:
    """What a step may be in one respect, the usual first; names by comma."""
    values = tuple(names.split(", "))
    return field(default=values[0], metadata={"values": values})


@dataclass(frozen=True, repr=False)
class UserStep:
    """One program.

    Attributes:
        form: what is compiled, and where it finds its net and optimizer.
        zero: where gradients are cleared, and how.
        micro_batches: how many gradients are accumulated before an update.
        backward: how gradients come about.
        before, after, end: what breaks the graph before and after ``backward()``, and behind the update.
        clip: of gradients.
        hook: on a parameter, an activation, a module, the optimizer or all optimizers.
        step: how the update is called.
        other: a second optimizer, or a second round of the first one.
        schedule: where a scheduler steps.
        net: what is special about the parameters.
        precision: of the net.
        moments: of the optimizer.
        between: what happens to net and optimizer before the second step.
        evaluate: whether the step also runs the net without gradients.
        batches: their sizes.
        setting: a number of all groups that is set before each step, or in it.
        returns: what the step returns.
        nets: how many nets of one factory are trained in turns.
        fullgraph, dynamic: of ``torch.compile``.
    """

    form: str = choice(
        "closure, global, method, module, callable, lambda, partial, arguments, shared arguments, nested, optimizer, "
        "model"
    )
    zero: str = choice(
        "last, first, forward, first kept, last kept, net first, net last, none first, none last, outside, never"
    )
    micro_batches: str = choice("one, two, every second")
    backward: str = choice("plain, retain, of torch, two losses, grad, inputs, gradient, checkpoint, penalty, chunks")
    before: str = choice(
        "nothing, print, item, float, isnan, disabled, logging, graph_break, inner, try, with, inner with"
    )
    after: str = choice("nothing, print, item, if gradient, loop, disabled, logging, graph_break, inner, try")
    end: str = choice("nothing, print, item, append, disabled, average")
    clip: str = choice("none, norm, value, max_grad_norm, norm read")
    hook: str = choice(
        "none, parameter, post accumulate, activation, forward, forward pre, backward, step pre, step post, "
        "global step post"
    )
    step: str = choice("plain, with closure, zero in closure, scaler, unscaled, skip_parameter")
    other: str = choice("none, SGD, AdamW, ours, two rounds")
    schedule: str = choice("none, outside, inside")
    net: str = choice("plain, deep, shared, frozen, frozen weight, unused, dropout, norm, int8")
    precision: str = choice("float32, bfloat16, float16, autocast")
    moments: str = choice("32bit, 8bit")
    between: str = choice("nothing, freeze, unfreeze, hook, load, eval mode, gradient, new weights")
    evaluate: str = choice("never, inside, inside train")
    batches: str = choice("equal, last short, growing")
    setting: str = choice("none, lr, lr fill, lr inside, weight_decay, betas, scale, max_grad_norm")
    returns: str = choice("detached, item, nothing, loss, dict, counted")
    nets: str = choice("one, two widths, three widths")
    fullgraph: str = choice("no, yes")
    dynamic: str = choice("where it differs, yes, no")

    def unusual(self) -> dict[str, str]:
        """The choices that are not the usual ones."""
        return {name: getattr(self, name) for name, values in CHOICES.items() if getattr(self, name) != values[0]}

    def __repr__(self) -> str:
        return f"UserStep({', '.join(f'{name}={value!r}' for name, value in self.unusual().items())})"

    # -- the program --------------------------------------------------------------------------------------------------

    @property
    def given(self) -> str:
        """Arguments of the step; ``last`` tells whether gradients are complete."""
        return "x, y, last" if self.micro_batches == "every second" else "x, y"

    def source(self) -> str:
        """Python that defines ``make(width)``, which returns net, optimizers, schedule, and the step that it has given
        to ``COMPILE``."""
        returns = {
            "detached": "return loss.detach()",
            "item": "return loss.item()",
            "nothing": "return None",
            "loss": "return loss",
            "counted": "return sum(p.grad is not None for p in net.parameters())",
            "dict": "return {'loss': loss.detach()}",
        }[self.returns]
        lines, result = [*self._body(), returns], f"return {ALL}, run"
        step, classes = _function(f"step({self.given})", lines), []
        setup, made = self._setup(), ["run = COMPILE(step)"]
        if self.form == "global":
            setup, classes, step = [f"global {ALL}", *setup], step, []
        elif self.form in ("method", "callable", "module"):
            classes, step = self._class(lines), []
            made = [f"run = COMPILE(Trainer({ALL}){'.step' if self.form == 'method' else ''})"]
        elif self.form == "shared arguments":
            classes, step = [*_function(f"step({ALL}, {self.given})", lines), "step = COMPILE(step)"], []
            made = [f"run = functools.partial(step, {ALL})"]
        elif self.form in ("arguments", "partial"):
            step = _function(f"step({ALL}, {self.given})", lines)
            compiled = f"COMPILE(functools.partial(step, {ALL}))"
            made = [f"run = {compiled if self.form == 'partial' else f'functools.partial(COMPILE(step), {ALL})'}"]
        elif self.form == "lambda":
            made = [f"run = COMPILE(lambda {self.given}: step({self.given}))"]
        elif self.form == "optimizer":
            made = ["update = COMPILE(opt.step)", "run = step"]
        elif self.form == "model":
            made = ["forward = COMPILE(net)", "run = step"]
        return "\n".join([*classes, *_function("make(width)", [*setup, *step, *made, result])])

    def _class(self, lines: Sequence[str]) -> list[str]:
        name = {"method": "step", "callable": "__call__", "module": "forward"}[self.form]
        base = "(nn.Module)" if self.form == "module" else ""
        own = [re.sub(r"(?<![\w.'])(net|opt|other|schedule|scaler)\b", r"self.\1", line) for line in lines]
        init = (["super().__init__()"] if base else []) + [f"self.{each} = {each}" for each in ALL.split(", ")]
        body = [*_function(f"__init__(self, {ALL})", init), *_function(f"{name}(self, {self.given})", own)]
        return [f"class Trainer{base}:", *(f"    {line}" for line in body)]

    def _setup(self) -> list[str]:
        lines, targets = [f"net = Net(width, {self.net!r})"], ["a"]
        if self.net == "frozen":
            lines.append("net.c.weight.requires_grad_(False)")
        elif self.net == "frozen weight":
            lines, targets = [*lines, "net.a.weight.requires_grad_(False)"], ["c"]
        elif self.net == "int8":
            lines.append("qg.quantize_(net, group_size=4, targets=['a'])")
        if self.precision in ("bfloat16", "float16"):
            lines.append(f"net.{'bfloat16' if self.precision == 'bfloat16' else 'half'}()")
        mine = "net"
        kinds = {
            "SGD": "torch.optim.SGD(rest, lr=0.05)",
            "AdamW": "torch.optim.AdamW(rest, lr=0.01)",
            "ours": "qg.QGaLoreAdamW(rest, lr=0.01, moments='32bit')",
        }
        lines.append("other = schedule = scaler = None")
        if self.other in kinds:  # which takes what is not projected
            lines += [
                f"rest = list(net.{'a' if targets == ['c'] else 'c'}.parameters())",
                f"other = {kinds[self.other]}",
            ]
            mine, targets = f"nn.ModuleList([net.{targets[0]}])", ["0"]
        extra = ", max_grad_norm=0.05" if self.clip == "max_grad_norm" else ""
        extra += ", nonfinite='skip_parameter'" if self.step == "skip_parameter" else ""
        keys = f"targets={targets}, rank=2, quant=False, refresh='svd', update_proj_gap=2"
        lines += [
            f"groups = qg.param_groups({mine}, {keys})",
            f"opt = qg.QGaLoreAdamW(groups, lr=0.01, moments={self.moments!r}{extra})",
        ]
        if self.schedule != "none":
            lines.append("schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda at: 1 / (1 + at))")
        if self.step in ("scaler", "unscaled"):
            lines.append("scaler = torch.amp.GradScaler('cpu', init_scale=8.0)")
        return lines + HOOKS[self.hook]

    def _zero_at(self, place: str) -> list[str]:
        """``start`` of the step, behind the ``forward``, or the ``end``."""
        start = ("first", "first kept", "net first", "none first")
        at = "start" if self.zero in start else {"forward": "forward", "outside": "", "never": ""}.get(self.zero, "end")
        if at != place or (self.zero == "forward" and self.micro_batches != "one"):
            return []
        if self.zero.startswith("net"):
            return ["net.zero_grad()"]
        if self.zero.startswith("none"):
            return ["for p in net.parameters():", "    p.grad = None"]
        kept = "set_to_none=False" if self.zero.endswith("kept") else ""
        return [f"{each}.zero_grad({kept})" for each in ("opt", *(["other"] if self._two else []))]

    @property
    def _two(self) -> bool:
        return self.other in ("SGD", "AdamW", "ours")

    def _micro(self) -> list[str]:
        """One micro-batch: forward, and backward."""
        forward = "forward" if self.form == "model" else "net"
        hooked = ", hooked=True" if self.hook == "activation" else ""
        lines = [f"out = {forward}(x{hooked})"]
        if self.backward == "checkpoint":
            lines = [f"out = checkpoint({forward}, x{hooked}, use_reentrant=False)"]
        if self.precision == "autocast":
            lines = ["with torch.autocast('cpu', torch.bfloat16):", f"    {lines[0]}"]
        lines.append("loss = (out.float() - y).square().mean()")
        if self.micro_batches == "two":
            lines.append("loss = loss / 2")
        lines += [*self._zero_at("forward"), *BREAKS[self.before]]
        return [*lines, *self._backward("scaler.scale(loss)" if self.step in ("scaler", "unscaled") else "loss")]

    def _backward(self, loss: str) -> list[str]:
        return [line.replace("LOSS", loss) for line in BACKWARD[self.backward]]

    def _up_to_backward(self) -> list[str]:
        if self.micro_batches == "two":
            return ["for _ in range(2):", *(f"    {line}" for line in self._micro())]
        return self._micro()

    def _from_backward(self, do: str) -> list[str]:
        lines = [*BREAKS[self.after], *(["scaler.unscale_(opt)"] if self.step == "unscaled" else [])]
        if self.clip in ("norm", "norm read"):
            lines.append("norm = nn.utils.clip_grad_norm_(net.parameters(), 0.05)")
        if self.clip == "norm read":
            lines.append("NORMS.append(norm.item())")
        if self.clip == "value":
            lines.append("nn.utils.clip_grad_value_(net.parameters(), 0.01)")
        if self.setting == "lr inside":
            lines += ["for group in opt.param_groups:", "    group['lr'] = 0.02"]
        lines += ["scaler.step(opt)", "scaler.update()"] if self.step in ("scaler", "unscaled") else [do]
        lines += ["other.step()"] if self._two else []
        lines += ["schedule.step()"] if self.schedule == "inside" else []
        lines += [*BREAKS[self.end], *self._zero_at("end")]
        if self.micro_batches == "every second":
            return ["if last:", *(f"    {line}" for line in lines)]
        return lines

    def _body(self) -> list[str]:
        lines, do = self._zero_at("start"), "update()" if self.form == "optimizer" else "opt.step()"
        if self.step in ("with closure", "zero in closure"):
            clear = ["opt.zero_grad()"] if self.step == "zero in closure" else []
            lines += _function("closure()", [*clear, *self._up_to_backward(), "return loss"])
            lines += [f"loss = {do[:-1]}closure)", *self._from_backward(do="pass")]
        else:
            if self.form == "nested":
                lines += _function("forward_backward()", [*self._up_to_backward(), "return loss"])
                lines += ["loss = forward_backward()", *self._from_backward(do)]
            else:
                lines += [*self._up_to_backward(), *self._from_backward(do)]
            if self.other == "two rounds":
                lines += ["loss = net(x).float().abs().mean()", "loss.backward()", do, "opt.zero_grad()"]
        if self.evaluate != "never":
            evaluation = ["with torch.no_grad():", "    loss = loss + net(x).float().mean()"]
            lines += ["net.eval()", *evaluation, "net.train()"] if self.evaluate == "inside train" else evaluation
        return lines


CHOICES: dict[str, tuple[str, ...]] = {each.name: each.metadata["values"] for each in fields(UserStep)}
"""What a step may be, the usual first."""

ALL = "net, opt, other, schedule, scaler"

REFUSED = {
    **{
        (place, kind): words
        for place in ("before", "after", "end")
        for kind, words in {
            "print": "builtin operator `print`",
            "inner": "builtin operator `print`",
            "float": "data-dependent",
            "isnan": "Data-dependent branching",
            "if gradient": "Data-dependent branching",
            "logging": "Logger|logging",
            "graph_break": r"graph_break\(\)",
            **dict.fromkeys(("disabled", "try", "with", "inner with"), r"torch\.compiler\.disable"),
        }.items()
        if kind in CHOICES[place]
    },
    ("hook", "backward"): "backwards hooks",
    ("step", "scaler"): r"GradScaler\.scale",
    ("step", "unscaled"): r"GradScaler\.scale",
    ("other", "SGD"): r"graph_break\(\)",
    ("other", "AdamW"): r"graph_break\(\)",
    ("schedule", "inside"): r"LRScheduler\.step",
    ("backward", "of torch"): r"function `backward` in file .*torch/autograd",
    ("returns", "loss"): r"loss\.detach\(\)",
}
"""What breaks the graph, and so may be refused with ``fullgraph=True``, and what the error must say of it.  There is
nothing that may be refused without."""


def _function(signature: str, lines: Sequence[str]) -> list[str]:
    return [f"def {signature}:", *(f"    {line}" for line in lines)]
