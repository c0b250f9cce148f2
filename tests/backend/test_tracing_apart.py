"""Steps beside each other: those of other backends are left alone, and those of one function are kept apart."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from support import Interpreted
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from tracing_support import Traced, assert_as_eager, batch, broken, loss_of, parts, trained, zero_first

import qgalore_compile as qg
from qgalore_compile.backend import tracing
from qgalore_compile.backend.tracing import is_ours, step_backend

# Dynamo looks at .grad of what is no leaf, and hides the warning by a filter that "error" comes before.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


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
    steps = [torch.compile(zero_first(*parts(width)), backend=Interpreted(), fullgraph=True) for width in (4, 9)]
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


def test_thresholds_of_garbage_collection_come_back_though_threads_leave_in_another_order() -> None:
    before = gc.get_threshold()
    one, other = tracing._rare_collections(True), tracing._rare_collections(True)
    one.__enter__()
    assert gc.get_threshold()[0] > before[0]
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold()[0] > before[0]
    other.__exit__(None, None, None)
    assert gc.get_threshold() == before
