"""Frames that Dynamo cuts or gives up: ``strict`` refuses them before anything changes, and the report names them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from support import Interpreted, assert_unchanged, snapshot
from torch import Tensor, nn
from tracing_support import assert_as_eager, batch, loss_of, parts, zero_first

import qgalore_compile as qg
from qgalore_compile.backend.entry import UnfusedError, qgalore
from qgalore_compile.backend.tracing import is_strict, step_backend

# Dynamo looks at .grad of what is no leaf, and hides the warning by a filter that "error" comes before.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

Step = Callable[[Tensor], Any]


def helper(loss: Tensor) -> Tensor:
    doubled = loss * 2
    print("helper")
    return doubled / 2


def in_a_helper(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    def step(x: Tensor) -> None:
        opt.zero_grad()
        helper(loss_of(net, x)).backward()
        opt.step()

    return step


def trying_helper(net: nn.Module, x: Tensor) -> Tensor:
    try:
        hidden = net[1](net[0](x))
        print("try")
        return net[2](hidden).square().mean()  # type: ignore[no-any-return]
    finally:
        pass


def in_a_try_of_a_helper(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    def step(x: Tensor) -> None:
        opt.zero_grad()
        trying_helper(net, x).backward()
        opt.step()

    return step


def in_a_try(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    def step(x: Tensor) -> None:
        try:
            opt.zero_grad()
            loss = loss_of(net, x)
            print("try")
            loss.backward()
            opt.step()
        except RuntimeError:
            raise

    return step


def in_a_try_behind_the_model(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    """The graph reaches as far as the ``try``, and Python runs the rest."""

    def step(x: Tensor) -> None:
        opt.zero_grad()
        loss = loss_of(net, x)
        try:
            print("try")
            loss.backward()
            opt.step()
        finally:
            pass

    return step


@contextlib.contextmanager
def timed() -> Iterator[None]:
    yield


def in_a_with(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    def step(x: Tensor) -> None:
        with timed():
            opt.zero_grad()
            loss = loss_of(net, x)
            print("with")
            loss.backward()
            opt.step()

    return step


def in_a_loop(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    def step(x: Tensor) -> None:
        for part in x.chunk(2):
            loss_of(net, part).backward()
            print("loop")
        opt.step()
        opt.zero_grad()

    return step


class Printing(nn.Tanh):
    """A layer that prints."""

    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        return super().forward(x)


def in_forward(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    net[1] = Printing()
    return zero_first(net, opt)


def in_a_module_hook(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    net[1].register_forward_hook(lambda module, args, output: print("hook"))
    return zero_first(net, opt)


def before_everything(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
    whole = zero_first(net, opt)

    def step(x: Tensor) -> None:
        print("first")
        whole(x)

    return step


BROKEN = [
    in_a_helper,
    in_a_try_of_a_helper,
    in_a_try,
    in_a_try_behind_the_model,
    in_a_with,
    in_a_loop,
    in_forward,
    in_a_module_hook,
    before_everything,
]
GIVEN_UP = [in_a_try, in_a_try_behind_the_model, in_a_with, in_a_loop]


def reported(make: Any, **options: Any) -> qg.Report:
    step = torch.compile(make(*parts()), backend=Interpreted(**options))
    step(batch(0, 6))
    return qg.report(step)


@pytest.mark.parametrize("make", BROKEN)
def test_strict_refuses_a_broken_step_in_words_before_anything_changes(make: Any) -> None:
    net, opt = parts()
    step = torch.compile(make(net, opt), backend=Interpreted(strict=True))
    before = snapshot(net, opt)
    for _ in range(2):  # the second time as the first
        with pytest.raises(UnfusedError, match=r"(?s)step.*`print`.*, at \S+test_frames\.py:\d+; move what breaks it"):
            step(batch(0, 6))
    assert_unchanged(before, snapshot(net, opt))


@pytest.mark.parametrize("make", BROKEN)
def test_a_broken_step_trains_as_eager_does_and_its_report_tells_of_the_break(make: Any) -> None:
    assert_as_eager(make, fullgraph=False, backend=Interpreted())
    torch._dynamo.reset()
    report = reported(make)
    text = str(report)
    assert "1 graph" not in text
    assert "in pieces, " in text.splitlines()[0]
    assert any(
        "`print`" in reason and "test_frames.py:" in reason for reason in (*report.graph_breaks, *report.skipped_frames)
    )


@pytest.mark.parametrize("make", GIVEN_UP)
def test_a_step_that_python_runs_is_told_with_its_place(make: Any) -> None:
    report = reported(make)
    (skipped,) = [each for each in report.skipped_frames if each.startswith("step (")]
    assert f"test_frames.py:{make(*parts()).__code__.co_firstlineno})" in skipped
    assert ("from the break on" in skipped) == (make is in_a_try_behind_the_model)
    assert "in eager: step (" in str(report)


def test_a_step_without_a_break_is_one_graph_and_strict_lets_it_be() -> None:
    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
        def step(x: Tensor) -> None:
            with torch.autograd.set_grad_enabled(True):  # which Dynamo knows
                for part in x.chunk(2):
                    loss_of(net, part).backward()
            try:
                opt.step()
            finally:
                opt.zero_grad()

        return step

    report = reported(make, strict=True)
    assert str(report).startswith("step: 1 graph, 0 recompile(s); 2 of 2 projected layers matched, 2 without")
    assert (report.graph_breaks, report.skipped_frames) == ((), ())


def test_functions_that_a_step_calls_behind_a_break_are_reported_with_it() -> None:
    report = reported(in_a_try)
    functions = {each.function for each in report.compilations}
    assert "loss_of" in functions
    assert functions & {"step", "call"}  # the optimizer's, or what runs its hooks, where Dynamo has not skipped that
    assert len({each.region for each in report.compilations}) == 1
    assert sorted(layer.name for layer in report.layers if layer.matched) == ["0.weight", "2.weight"]


def test_a_step_that_gives_no_graph_at_all_is_reported() -> None:
    def step(x: Tensor) -> Tensor:
        for _ in range(2):
            print(x.shape)
        return x

    compiled = torch.compile(step, backend=Interpreted())
    compiled(batch(0))
    for each in (compiled, step):
        assert "nothing was compiled\nin eager: step (" in str(qg.report(each))


def test_reports_of_two_steps_tell_of_their_own_frames_alone() -> None:
    assert reported(in_a_try).skipped_frames
    assert not reported(zero_first).skipped_frames
    assert not any("with" in each for each in reported(in_a_try).graph_breaks)


def test_a_step_that_runs_out_of_recompilations_is_told_and_refused() -> None:
    def step_of(**options: Any) -> Any:
        net, opt = parts()

        def step(x: Tensor, power: int) -> None:
            net(x).abs().pow(power).mean().backward()
            opt.step()
            opt.zero_grad()

        return torch.compile(step, backend=Interpreted(**options), dynamic=False)

    with torch._dynamo.config.patch(recompile_limit=1):
        step = step_of()
        for power in (1, 2):
            step(batch(0), power)
        assert any("recompile limit" in each for each in qg.report(step).skipped_frames)
        strict = step_of(strict=True)
        strict(batch(0), 1)
        with pytest.raises(UnfusedError, match="recompile limit"):
            strict(batch(0), 2)


def test_an_error_that_dynamo_is_told_to_suppress_is_reported() -> None:
    net, opt = parts()
    step = torch.compile(zero_first(net, opt), backend=step_backend(lambda gm, inputs: gm.no_such_thing))
    before = net[0].weight.detach().clone()
    with torch._dynamo.config.patch(suppress_errors=True):
        step(batch(0))
    assert not torch.equal(net[0].weight, before)
    report = qg.report(step)
    assert any("raised: AttributeError" in each for each in report.skipped_frames)
    assert str(report).startswith("nothing was compiled")


def test_what_broke_is_forgotten_when_dynamo_is_reset() -> None:
    loud = [True]

    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Step:
        whole = zero_first(net, opt)

        def step(x: Tensor) -> None:
            if loud:
                print("loud")
            whole(x)

        return step

    step = torch.compile(make(*parts()), backend=Interpreted())
    step(batch(0))
    assert "in pieces" in str(qg.report(step))
    torch._dynamo.reset()
    loud.clear()
    step(batch(0))
    assert str(qg.report(step)).startswith("step: 1 graph")


@pytest.mark.parametrize(
    "backend",
    [
        Interpreted(strict=True),
        functools.partial(qgalore, options={"strict": True}),
        torch._TorchCompileWrapper("qgalore", None, {"strict": True}, None),
    ],
    ids=["by an attribute", "by a partial", "by torch.compile"],
)
def test_a_backend_is_strict_wherever_its_options_are_held(backend: Any) -> None:
    assert is_strict(backend)
    assert is_strict(step_backend(functools.partial(backend)))
    assert not is_strict(Interpreted(strict=False))
    assert not is_strict(qgalore)
