"""Steps as Dynamo traces them: what trains in eager trains in a graph, and steps of other backends are left alone.

Most run Dynamo's own graph, without a compiler behind it: what is tested here has happened by then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from support import Interpreted
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import qgalore_compile as qg
import qgalore_compile.backend  # which teaches Dynamo
from qgalore_compile.tracing import NoGradientError, is_ours, step_backend

# Dynamo looks at .grad of what is no leaf, and hides the warning by a filter that "error" comes before.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@step_backend
class Traced:
    """A backend that runs the graph as it is, traced as a step of "qgalore"; ``sizes`` are those of its inputs."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.sizes: list[list[Any]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        given = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
        self.sizes.append([size for x in given if isinstance(x, Tensor) for size in x.shape])
        return gm.forward


def parts(width: int = 6, **keys: Any) -> tuple[nn.Module, qg.QGaLoreAdamW]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))
    return net, qg.QGaLoreAdamW(qg.param_groups(net, rank=2, refresh="svd", **keys), lr=0.01, moments="32bit")


def batch(seed: int, rows: int = 5) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()  # type: ignore[no-any-return]


Make = Callable[[nn.Module, qg.QGaLoreAdamW], Callable[[Tensor], Any]]


def trained(
    make: Make, *, fullgraph: bool = True, backend: Any = None, compiled: bool = True
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and gradients after three steps."""
    net, opt = parts()
    step = make(net, opt)
    run = torch.compile(step, backend=backend or Traced(), fullgraph=fullgraph) if compiled else step
    for seed in range(3):
        run(batch(seed))
    return [p.detach() for p in net.parameters()], [p.grad for p in net.parameters()]


def assert_as_eager(make: Make, **how: Any) -> None:
    expected, expected_grads = trained(make, compiled=False)
    found, found_grads = trained(make, **how)
    start = [p.detach() for p in parts()[0].parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(expected, start, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [g is None for g in found_grads] == [g is None for g in expected_grads]
    for mine, theirs in zip(found_grads, expected_grads, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


# -- the order of a step ----------------------------------------------------------------------------------------------


def zero_first(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
    def step(x: Tensor) -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


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

BREAKS: dict[str, Callable[[Tensor], Any]] = {
    "print": lambda loss: print("loss"),
    "item": lambda loss: loss.item(),
    "branch": lambda loss: 1 if torch.isnan(loss) else 0,
    "graph_break": lambda loss: torch._dynamo.graph_break(),
}


def broken(what: str, where: str) -> Make:
    breaks = BREAKS[what]

    def make(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
        def step(x: Tensor) -> None:
            hidden = net[0](x)
            if where == "inside the model":
                breaks(hidden.sum())
            loss = net[2](net[1](hidden)).square().mean()
            if where == "before backward":
                breaks(loss)
            loss.backward()
            if where == "before the update":
                breaks(loss)
            opt.step()
            opt.zero_grad()
            if where == "at the end":
                breaks(loss)

        return step

    return make


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


# -- other steps in the process ---------------------------------------------------------------------------------------


def others_step() -> tuple[Callable[[Tensor], float], list[float]]:
    """Plain SGD under another backend, with a break before ``backward()``; a code object of its own."""
    scope: dict[str, Any] = {"torch": torch}
    exec(
        "def step(x):\n    loss = net(x).square().mean()\n    losses.append(loss.item())\n"
        "    loss.backward()\n    opt.step()\n    opt.zero_grad()\n",
        scope,
    )
    torch.manual_seed(0)
    net, losses = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), []
    scope.update(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.5), losses=losses)
    return torch.compile(scope["step"], backend="eager"), losses


def assert_learns() -> None:
    step, losses = others_step()
    for _ in range(3):
        step(batch(0))
    assert losses[0] > losses[1] > losses[2]


def test_steps_of_other_backends_learn_before_between_and_after_ours() -> None:
    torch._dynamo.lookup_backend("qgalore")
    assert_learns()
    trained(zero_first)
    assert_learns()
    trained(broken("print", "before backward"), fullgraph=False)
    assert_learns()
    assert not torch._dynamo.config.trace_autograd_ops


def test_a_step_of_another_backend_learns_inside_one_of_ours() -> None:
    inner, losses = others_step()
    net, opt = parts()

    def step(x: Tensor) -> None:
        torch._dynamo.graph_break()
        inner(x)
        loss_of(net, x).backward()
        opt.step()
        opt.zero_grad()

    run = torch.compile(step, backend=Traced())
    for _ in range(3):
        run(batch(0))
    assert losses[0] > losses[1] > losses[2]


def test_a_step_is_compiled_in_another_thread() -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(trained(zero_first)[0])
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    expected, _ = trained(zero_first, compiled=False)
    torch.testing.assert_close(found, [expected], rtol=0, atol=1e-5)


def test_a_step_compiles_after_one_with_two_rounds() -> None:
    def rounds(net: nn.Module, opt: qg.QGaLoreAdamW) -> Callable[[Tensor], Any]:
        critic, optimizer = net, opt

        def step(x: Tensor) -> None:
            for power in (1, 2):
                critic(x).abs().pow(power).mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        return step

    assert_as_eager(rounds)
    assert_as_eager(zero_first)
    assert_as_eager(broken("print", "at the end"), fullgraph=False)


# -- one function, several models -------------------------------------------------------------------------------------


def test_a_factory_makes_more_steps_than_one_function_may_be_recompiled() -> None:
    for seed in range(12):
        net, opt = parts(width=4 + seed)
        torch.compile(zero_first(net, opt), backend=Traced(), fullgraph=True)(batch(seed))


def test_sizes_of_weights_and_states_are_numbers_whatever_was_compiled_before() -> None:
    """By one compiled function: its arguments are what differs, so that Dynamo would make symbols of their sizes."""
    backend = Traced()

    def step(net: nn.Module, opt: qg.QGaLoreAdamW, x: Tensor) -> None:
        loss_of(net, x).backward()
        opt.step()
        opt.zero_grad()

    run = torch.compile(step, backend=backend, fullgraph=True)
    for width in (4, 9, 16):
        run(*parts(width), batch(0))
    assert backend.sizes
    assert all(isinstance(size, int) for sizes in backend.sizes for size in sizes)


def test_sizes_of_gradients_are_numbers_where_the_update_alone_is_compiled() -> None:
    backend = Traced()
    for width in (4, 9, 16):
        net, opt = parts(width)
        loss_of(net, batch(0)).backward()
        torch.compile(opt.step, backend=backend)()
    assert len(backend.sizes) == 3
    assert all(isinstance(size, int) for sizes in backend.sizes for size in sizes)


def test_a_number_of_tokens_may_become_a_symbol() -> None:
    backend = Traced()
    step = torch.compile(zero_first(*parts()), backend=backend, fullgraph=True)
    for rows in (5, 7, 9, 11):
        step(batch(0, rows))
    assert len(backend.graphs) == 2
    assert [size for size in backend.sizes[1] if not isinstance(size, int)]


def test_reports_of_two_steps_of_one_factory_are_apart() -> None:
    steps = [
        torch.compile(zero_first(*parts(width)), backend=Interpreted(), fullgraph=True) for width in (4, 9)
    ]  # fmt: skip
    for step in (*steps, *steps):
        step(batch(0))
    for step, width in zip(steps, (4, 9), strict=True):
        report = qg.report(step)
        assert (len(report.compilations), report.recompiles) == (1, 0)
        assert width in report.layers[0]["shape"]
        assert [each.region for each in qg.report(step._torchdynamo_orig_callable).compilations] == [  # type: ignore[attr-defined]
            each.region for each in report.compilations
        ]


def test_recompilations_of_one_step_are_counted_as_before() -> None:
    step = torch.compile(zero_first(*parts()), backend=Interpreted(), fullgraph=True)
    step(batch(0, 5))
    step(batch(0, 6))
    assert qg.report(step).recompiles == 1


def test_layers_that_were_met_through_the_optimizer_have_the_model_s_names() -> None:
    step = torch.compile(zero_first(*parts()), backend=Interpreted(), fullgraph=True)
    step(batch(0))
    assert sorted(layer["name"] for layer in qg.report(step).layers) == ["0.weight", "2.weight"]


# -- which steps are ours ---------------------------------------------------------------------------------------------


def test_a_backend_of_ones_own_is_traced_as_ours_where_it_says_so() -> None:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return gm.forward

    assert not is_ours(backend)
    assert is_ours(step_backend(backend))
    counters.clear()
    trained(zero_first, backend=backend)
    assert counters["stats"]["unique_graphs"] == 1
