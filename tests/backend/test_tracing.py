"""One step as Dynamo traces it: what trains in eager trains in a graph.

Most run Dynamo's own graph, without a compiler behind it: what is tested here has happened by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from tracing_support import BREAKS, Make, Traced, assert_as_eager, batch, broken, loss_of, parts, trained, zero_first

import qgalore_compile as qg
from qgalore_compile.optim.no_gradient import NoGradientError

# Dynamo looks at .grad of what is no leaf, and hides the warning by a filter that "error" comes before.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


# -- the order of a step ----------------------------------------------------------------------------------------------


def zero_to_zeros(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
    def step(x: Tensor) -> Tensor:
        opt.zero_grad(set_to_none=False)
        loss = loss_of(net, x)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


def in_a_closure(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
    def step(x: Tensor) -> Tensor:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = loss_of(net, x)
            loss.backward()
            return loss.detach()

        return opt.step(closure)  # type: ignore[no-any-return]

    return step


def groups_read_first(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
    def step(x: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for group in opt.param_groups for p in group["params"])
        loss = loss_of(net, x) + 1e-3 * penalty
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step


def cleared_and_read_again(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
    def step(x: Tensor) -> int:
        loss_of(net, x).backward()
        opt.step()
        opt.zero_grad()
        return sum(p.grad is not None for p in net.parameters())

    return step


@pytest.mark.parametrize("make", [zero_first, zero_to_zeros, in_a_closure, groups_read_first, cleared_and_read_again])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_step_trains_whatever_it_begins_with(make: Make, fullgraph: bool) -> None:
    assert_as_eager(make, fullgraph=fullgraph)


def test_backward_passes_over_named_inputs_that_the_loss_does_not_reach() -> None:
    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
        apart = nn.Parameter(torch.ones(2))

        def step(x: Tensor) -> Tensor:
            loss = loss_of(net, x)
            loss.backward(inputs=[apart, *net.parameters()])
            opt.step()
            opt.zero_grad()
            return loss.detach()

        return step

    assert_as_eager(make)


def test_a_whole_step_trains_after_the_update_alone_was_compiled() -> None:
    """Dynamo has marked the parameters then as an optimizer's."""
    net, opt = parts()
    update = torch.compile(opt.step, backend=Traced())
    loss_of(net, batch(0)).backward()
    update()
    step = torch.compile(zero_first(net, opt), backend=Traced(), fullgraph=True)
    before = [p.detach().clone() for p in net.parameters()]
    step(batch(1))
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


# -- graph breaks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "where"),
    [(what, "before backward") for what in BREAKS]
    + [("print", where) for where in ("inside the model", "before the update", "at the end")],
)
def test_a_broken_step_trains_as_eager_does(what: str, where: str) -> None:
    assert_as_eager(broken(what, where), fullgraph=False)


@pytest.mark.parametrize("where", ["inside the model", "before backward"])
def test_a_break_under_fullgraph_is_an_error_and_changes_nothing(where: str) -> None:
    net, opt = parts()
    before = [p.detach().clone() for p in net.parameters()]
    step = torch.compile(broken("print", where)(net, opt), backend=Traced(), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="print"):
        step(batch(0))
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_a_backward_hook_of_a_module_breaks_the_graph_and_acts() -> None:
    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
        net[1].register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
        return zero_first(net, opt)

    assert_as_eager(make, fullgraph=False)


def test_a_loss_from_outside_is_differentiated_by_pytorch() -> None:
    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
        def finish(loss: Tensor) -> None:
            loss.backward()
            opt.step()
            opt.zero_grad()

        finish = torch.compile(finish, backend=Traced())
        return lambda x: finish(loss_of(net, x))

    expected, _ = trained(lambda net, opt: zero_first(net, opt), compiled=False)
    net, opt = parts()
    run = make(net, opt)
    for seed in range(3):
        run(batch(seed))
    torch.testing.assert_close([p.detach() for p in net.parameters()], expected, rtol=0, atol=1e-5)


def test_a_loss_from_outside_is_refused_as_one_graph() -> None:
    def finish(loss: Tensor) -> None:
        loss.backward()

    net, _ = parts()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="computes the loss, calls backward"):
        torch.compile(finish, backend=Traced(), fullgraph=True)(loss_of(net, batch(0)))


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("kind", ["no backward", "detached", "update alone"])
def test_an_update_without_any_gradient_is_an_error(kind: str, fullgraph: bool) -> None:
    net, opt = parts()

    def step(x: Tensor) -> None:
        if kind == "detached":
            net[0](x).detach().requires_grad_().sum().backward()
        opt.step()

    run = torch.compile(opt.step if kind == "update alone" else step, backend=Traced(), fullgraph=fullgraph)
    with pytest.raises(NoGradientError, match=r"Call loss\.backward\(\) before it"):
        run(*([] if kind == "update alone" else [batch(0)]))
    opt.step()  # quiet in eager, as torch's optimizers are


# -- hooks on parameters ----------------------------------------------------------------------------------------------


def mask(gradient: Tensor) -> Tensor:
    return gradient * 0


def look(gradient: Tensor) -> None:
    """Changes nothing, as a hook may."""


def clear(p: Tensor) -> None:
    p.grad.zero_()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "hook",
    [
        lambda p: p.register_hook(mask),
        lambda p: p.register_hook(look),
        lambda p: (p.register_hook(mask), p.register_hook(lambda g: g + 1)),
        lambda p: p.register_post_accumulate_grad_hook(clear),
    ],
    ids=["one", "returns None", "two, in order", "after accumulation"],
)
def test_hooks_on_a_parameter_are_called(hook: Callable[[Tensor], Any]) -> None:
    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
        hook(net[0].weight)
        return zero_first(net, opt)

    assert_as_eager(make)


def test_hooks_come_and_go_between_steps() -> None:
    def train(compiled: bool) -> list[Tensor]:
        net, opt = parts()
        step = zero_first(net, opt)
        step = torch.compile(step, backend=Traced(), fullgraph=True) if compiled else step
        step(batch(0))
        handle = net[0].weight.register_hook(mask)
        step(batch(1))
        handle.remove()
        step(batch(2))
        return [p.detach() for p in net.parameters()]

    torch.testing.assert_close(train(True), train(False), rtol=0, atol=1e-5)


def test_a_hook_that_the_step_registers_is_called() -> None:
    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
        def step(x: Tensor) -> None:
            handle = net[0].weight.register_hook(mask)
            loss_of(net, x).backward()
            opt.step()
            opt.zero_grad()
            handle.remove()

        return step

    assert_as_eager(make)
