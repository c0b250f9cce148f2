"""`qg.check` of any kind of step: what is right is found right, and nothing is changed."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import Interpreted, data, small, snapshot, step_of
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

import qgalore_compile as qg
from qgalore_compile.backend.tracing import step_backend
from qgalore_compile.reports.check import CheckResult, CopyError, check

# Dynamo alone, whose graph is then run as it is: what check itself does needs no more.
quick = functools.partial(check, backend="eager")


def by_name(result: CheckResult) -> dict[str, Any]:
    return {error.name: error for error in result.errors}


# -- what is right is found right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_step_of_several_micro_batches_with_a_refresh_is_ok_tensor_by_tensor(dtype: torch.dtype) -> None:
    model, opt = small(int8=True, dtype=dtype, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5)
    before, generator = snapshot(model, opt), torch.get_rng_state()
    result = check(step_of(model, opt), data(dtype=dtype), data(dtype=dtype) + 1, backend=Interpreted())
    assert result.ok, result
    assert result.precision == str(dtype).removeprefix("torch.")
    errors = by_name(result)
    assert {"result", "batches[1]", "model.0.weight/grad_norm", "model.0.weight/schedule"} <= errors.keys()
    assert {f"model.{name}" for name, _ in model.named_parameters()} <= errors.keys()
    assert errors["model.0.weight/projector"].note == "refreshed: its subspace"
    assert errors["model.0.weight"].codes_differing is not None
    assert errors["model.2.weight"].codes_differing is None
    assert errors["model.2.weight"].moved > 0
    after = snapshot(model, opt)
    assert all(torch.equal(after[name], value) or bool(value.isnan().any()) for name, value in before.items())
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.compiles
def test_the_backend_by_its_name_with_options_in_generated_code() -> None:
    model = nn.Linear(8, 2, bias=False)
    opt = qg.QGaLoreAdamW([{"params": [model.weight], "param_names": ["weight"]}])
    model(data()).square().mean().backward()
    result = check(opt.step, options={"exact": True})
    assert result.ok, result
    assert by_name(result)["weight/exp_avg"].moved > 0


def test_the_update_alone_uses_the_gradients_that_are_there_and_leaves_them() -> None:
    model, opt = small(int8=True)
    model(data()).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = snapshot(model, opt)
    result = quick(opt.step)
    assert result.ok, result
    assert {"0.weight", "0.weight.grad", "0.weight/exp_avg", "0.weight/skipped_steps"} <= by_name(result).keys()
    assert by_name(result)["0.weight"].moved > 0
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert len(gradients) == 4
    assert all(torch.equal(snapshot(model, opt)[name], value) for name, value in before.items() if "sched" not in name)


def test_gradients_that_the_step_leaves_are_compared() -> None:
    result = quick(step_of(*small(), clear=False), data())
    assert result.ok
    assert "model.0.weight.grad" in by_name(result)


def test_gemms_under_autocast_widen_the_tolerance() -> None:
    model, opt = small()

    def forward(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    result = quick(step_of(forward, opt), data())
    assert (result.ok, result.precision) == (True, "bfloat16")
    assert (
        by_name(result)["model.0.weight"].tolerance
        > by_name(quick(step_of(model, opt), data()))["model.0.weight"].tolerance
    )


def test_random_numbers_are_the_same_in_both_and_the_generator_goes_on_as_if_nothing_had_been() -> None:
    model, opt = small()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    result = check(step_of(nn.Sequential(model, nn.Dropout(0.5)), opt), data(), backend="aot_eager")
    assert torch.equal(torch.rand(3), expected)
    assert result.ok, result


class Counter:
    def __init__(self) -> None:
        self.count = 0


COUNTER = Counter()


def test_an_object_among_the_globals_counts_in_each_copy_alone() -> None:
    model, opt = small()

    def step(batch: Tensor) -> Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        COUNTER.count += 1
        if COUNTER.count % 2 == 0:
            opt.step()
            opt.zero_grad()
        return loss.detach()

    result = quick(step, data())
    assert result.ok, result
    assert COUNTER.count == 0


class Momentum(torch.optim.Optimizer):
    """Creates its state in the first step, as PyTorch's own do (those break the graph)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state["momentum"] = state["momentum"] * 0.9 + p.grad if "momentum" in state else p.grad.clone()
                p.sub_(self.param_groups[0]["lr"] * state["momentum"])

    # as QGaLoreAdamW: Dynamo does not trace the wrappers that Optimizer and LRScheduler put around ``step``
    step.hooked = step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def test_state_that_the_first_step_creates_and_a_scheduler_in_the_step() -> None:
    model = nn.Linear(8, 2)
    opt = Momentum(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    update = step_of(model, opt, clear=False)

    def step(batch: Tensor) -> Tensor:
        loss = update(batch)
        opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"] * 0.5
        return loss

    result = quick(step, data())
    assert result.ok, result
    assert {"model.weight/momentum", "group 0/lr"} <= by_name(result).keys()
    assert by_name(result)["group 0/lr"].moved == pytest.approx(0.05)
    assert not opt.state
    assert schedule.get_last_lr() == [0.1]


def test_buffers_and_tied_parameters_and_views_stay_what_they_are() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.ones(16))
            self.view = self.flat.detach()[:8]
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            with torch.no_grad():
                self.flat.add_(1.0)
            return (x * self.view).sum()

    model = Model()
    result = quick(model, data())
    assert result.ok, result
    assert by_name(result)["calls"].moved == 1
    assert by_name(result)["view"].moved == pytest.approx(8**0.5)
    assert float(model.view.sum()) == 8


def test_results_are_compared_wherever_they_are_in_a_structure() -> None:
    result = quick(lambda x: {"a": [x + 1, (x.sum(), 2.5)], "b": None}, data())
    assert {"result['a'][0]", "result['a'][1][0]", "result['a'][1][1]", "x"} == by_name(result).keys()


# -- every kind of step -----------------------------------------------------------------------------------------------


class Run:
    def __init__(self) -> None:
        self.model, self.opt = small()
        self.losses: list[Tensor] = []
        self.count = 0

    def step(self, batch: Tensor) -> Tensor:
        loss = step_of(self.model, self.opt)(batch)
        self.losses.append(loss)
        self.count += 1
        return loss

    __call__ = step


def kinds(run: Run) -> dict[str, Callable[..., Any]]:
    def with_defaults(batch: Tensor, run: Run = run, *, again: Run = run) -> Tensor:
        return run.step(batch) + again.step(batch)

    def with_arguments(run: Run, batch: Tensor) -> Tensor:
        return run.step(batch)

    def through_another_function(batch: Tensor) -> Tensor:
        return with_defaults(batch)

    @torch.enable_grad()
    def decorated(batch: Tensor) -> Tensor:
        return run.step(batch)

    return {
        "bound method": run.step,
        "callable object": run,
        "defaults": with_defaults,
        "partial": functools.partial(with_arguments, run),
        "closure of a closure": through_another_function,
        "decorated": decorated,
        "compiled function": torch.compile(with_defaults, backend="eager"),
        "compiled method": torch.compile(run.step, backend="eager"),
        "calls a compiled one": lambda batch: torch.compile(run.step, backend="eager")(batch),
    }


@pytest.mark.parametrize("kind", kinds(Run()))
def test_a_step_may_be(kind: str) -> None:
    run = Run()
    before = snapshot(run.model, run.opt)
    result = quick(kinds(run)[kind], data())
    assert result.ok, result
    assert sum(error.moved > 0 and "weight" in error.name and "/" not in error.name for error in result.errors) == 2
    after = snapshot(run.model, run.opt)
    assert all(torch.equal(after[name], before[name]) for name in before if "schedule" not in name)
    assert (run.losses, run.count) == ([], 0)


@pytest.fixture
def module() -> Iterator[Any]:
    """A user's module with model, optimizer and step as globals."""
    module = types.ModuleType("users_training")
    sys.modules["users_training"] = module
    module.small = small  # type: ignore[attr-defined]
    source = """
model, opt = small()
count = 0
losses = []

def loss_of(batch):
    return model(batch).square().mean()

def step(batch):
    global count
    loss = loss_of(batch)
    loss.backward()
    opt.step()
    opt.zero_grad()
    count += 1
    losses.append(loss.detach())
    return loss.detach()
"""
    exec(compile(source, "users_training.py", "exec"), vars(module))
    yield module
    del sys.modules["users_training"]


def test_globals_are_replaced_for_the_copied_functions_alone(module: Any) -> None:
    held, before = dict(vars(module)), snapshot(module.model, module.opt)
    result = quick(module.step, data())
    assert result.ok, result
    assert {"model.0.weight", "model.0.weight/exp_avg", "losses[0]"} <= by_name(result).keys()
    assert vars(module).keys() == held.keys()
    assert all(vars(module)[name] is value for name, value in held.items())
    after = snapshot(module.model, module.opt)
    assert all(torch.equal(after[name], before[name]) for name in before if "schedule" not in name)
    assert (module.count, module.losses) == (0, [])


def test_state_in_another_module_is_refused_by_its_name(module: Any) -> None:
    source = compile("def step(batch): return module.loss_of(batch)", "another.py", "exec")
    exec(source, scope := {"module": module})
    with pytest.raises(CopyError, match=r"reads it as module\.loss_of, from a module that is not copied"):
        quick(scope["step"], data())


def test_what_dynamo_has_compiled_for_the_user_stays_and_is_not_compiled_again() -> None:
    compiled = []

    @step_backend
    def counting(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    step = step_of(*small())
    fast = torch.compile(step, backend=counting, fullgraph=True)
    fast(data())
    entries = len(_debug_get_cache_entry_list(step.__code__))
    for batch in (data(), data()[:3]):
        assert quick(fast, batch).ok
    fast(data())
    assert len(compiled) == 1
    assert len(_debug_get_cache_entry_list(step.__code__)) == entries == 1


def test_hooks_of_optimizer_and_tensors_run_on_the_copies() -> None:
    model, opt = small()
    seen: list[torch.optim.Optimizer] = []
    calls = torch.zeros(())

    def counts(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        calls.add_(optimizer is opt)

    opt.register_step_pre_hook(counts)
    model[0].register_forward_hook(lambda module, args, output: seen.append(opt) or output * 2)
    result = quick(step_of(model, opt), data())
    assert result.ok, result
    assert (seen, float(calls)) == ([], 0.0)
    assert any(error.moved == 1 and error.largest == 0 for error in result.errors if "calls" in error.name)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_copied_is_named_with_the_remedy() -> None:
    run, model = types.SimpleNamespace(lock=threading.Lock()), nn.Linear(8, 2)

    def step(batch: Tensor) -> Tensor:
        with run.lock:
            return model(batch)

    with pytest.raises(CopyError, match=r"run\.lock \(lock\) has none: .*a function of the model, the optimizer and"):
        quick(step, data())


def test_a_tensor_with_a_history_is_refused() -> None:
    weight = torch.ones(8, requires_grad=True)
    with pytest.raises(CopyError, match=r"batch \(Tensor\) has none: .*detach\(\) it"):
        quick(lambda batch: batch.sum(), data() * weight)


def test_an_error_in_eager_is_the_users_own_and_leaves_the_generator() -> None:
    model = nn.Linear(8, 2)

    def step(batch: Tensor) -> Tensor:
        torch.rand(3)
        raise KeyError("the user's")

    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="the user's"):
        quick(step, model(data()).detach())
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_without_tensors_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match="reaches none; pass a step that has model and optimizer"):
        quick(lambda: None)
