"""Hooks around the step, around loading and around saving run as those of torch.optim.AdamW, which runs beside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import Interpreted, assert_within_contract, snapshot, tokens, toy, training_step
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import qgalore_compile as qg

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OURS: Make = lambda params: qg.QGaLoreAdamW(params, lr=0.5)  # noqa: E731
ADAMW: Make = lambda params: torch.optim.AdamW(params, lr=0.5, weight_decay=0.0)  # noqa: E731


class Log(list[Any]):
    """What hooks saw: their name, their arguments, and the parameter's first element."""

    def __init__(self, p: nn.Parameter) -> None:
        super().__init__()
        self.p = p

    def hook(self, name: str) -> Callable[..., None]:
        def note(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shown = ["self" if arg is optimizer else "closure" if callable(arg) else arg for arg in args]
            self.append((name, shown, sorted(kwargs), round(float(self.p.detach()[0]), 4)))

        return note


@pytest.fixture
def handles() -> Iterator[list[Any]]:
    """Handles of hooks of all optimizers, removed afterwards."""
    found: list[Any] = []
    yield found
    for handle in found:
        handle.remove()


CALLS: dict[str, Callable[[torch.optim.Optimizer, Callable[[], Any]], Any]] = {
    "no closure": lambda opt, closure: opt.step(),
    "a closure": lambda opt, closure: opt.step(closure),
    "a closure by name": lambda opt, closure: opt.step(closure=closure),
}


def stepped(make: Make, how: str, handles: list[Any]) -> tuple[Any, list[float], list[Any]]:
    p = nn.Parameter(torch.ones(3))
    opt, log = make([p]), Log(p)
    handles.append(register_optimizer_step_pre_hook(log.hook("before all")))
    handles.append(register_optimizer_step_post_hook(log.hook("after all")))
    for index in range(2):
        opt.register_step_post_hook(log.hook(f"after {index}"))
        opt.register_step_pre_hook(log.hook(f"before {index}"))

    def closure() -> Tensor:
        log.append("closure")
        loss = p.square().sum()
        loss.backward()
        return loss

    p.grad = torch.ones(3)
    result = CALLS[how](opt, closure)
    while handles:
        handles.pop().remove()
    CALLS[how](opt, closure)
    return None if result is None else float(result.detach()), p.tolist(), list(log)


@pytest.mark.parametrize("how", CALLS)
def test_hooks_run_in_adamw_s_order_with_adamw_s_arguments(how: str, handles: list[Any]) -> None:
    result, values, log = stepped(OURS, how, handles)
    right_result, right_values, right_log = stepped(ADAMW, how, handles)
    assert log == right_log
    names = [each[0] for each in log if each != "closure"]
    assert names[:6] == ["before all", "before 0", "before 1", "after 0", "after 1", "after all"]
    assert result == right_result
    assert values == pytest.approx(right_values, abs=1e-5)


def replaced(make: Make) -> tuple[float, list[str], list[float]]:
    p = nn.Parameter(torch.ones(3))
    opt, calls = make([p]), []

    def closure(name: str) -> Callable[[], float]:
        def call() -> float:
            calls.append(name)
            p.grad = torch.ones(3)
            return 4.0

        return call

    opt.register_step_pre_hook(lambda o, args, kwargs: ((args[0],), {"closure": closure("second")}))
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append(str(sorted(kwargs))))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append(f"{len(args)} {sorted(kwargs)}"))
    result: Any = opt.step(closure("first"))
    return result, calls, p.tolist()


def test_what_a_hook_before_the_step_returns_takes_the_place_of_its_arguments() -> None:
    result, calls, values = replaced(OURS)
    assert (result, calls) == replaced(ADAMW)[:2] == (4.0, ["['closure']", "second", "1 ['closure']"])
    assert values == pytest.approx(replaced(ADAMW)[2], abs=1e-5)


@pytest.mark.parametrize("returned", [3, (1, 2, 3)])
def test_another_thing_that_a_hook_returns_is_an_error_before_anything_changes(returned: Any) -> None:
    for make in (OURS, ADAMW):
        p = nn.Parameter(torch.ones(3))
        opt = make([p])
        opt.register_step_pre_hook(lambda o, args, kwargs: returned)
        p.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\)"):
            opt.step()
        assert p.tolist() == [1, 1, 1]


class Counted(qg.QGaLoreAdamW):
    """Overrides step, as wrappers with a scaler or a logger do."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = super().step(closure)
        return result if result is None else 2 * result


class CountedTwice(Counted):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class Inherits(CountedTwice):
    pass


@pytest.mark.parametrize("cls", [Counted, CountedTwice, Inherits])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_each_hook_runs_once_where_subclasses_override_step(cls: Any, compiled: bool, handles: list[Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    opt, seen = cls([p], lr=0.5), []
    handles += [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("before all")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("after all")),
    ]
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    p.grad = torch.ones(3)
    if compiled:
        torch.compile(opt.step, backend=Interpreted(), fullgraph=True)()
    else:
        opt.step()
    assert seen == ["before all", "before", "after", "after all"]
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))


def test_a_subclass_s_own_step_is_what_runs() -> None:
    p = nn.Parameter(torch.ones(3))
    assert CountedTwice([p]).step(lambda: 3.0) == 6.0


def test_hooks_take_part_in_a_compiled_step_and_those_of_later_are_seen(handles: list[Any]) -> None:
    """A hook that scales gradients, as clipping by value does, in a whole step."""

    def halve(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5)

    found, expected = [], []
    for compiled, into in ((True, found), (False, expected)):
        model, opt = toy(int8=False, quant=False, eps=1e-3, stagger=False)
        step = training_step(model, opt)
        step = torch.compile(step, backend=Interpreted(), fullgraph=True) if compiled else step
        step(tokens())
        into.append(snapshot(model, opt))
        handle = register_optimizer_step_pre_hook(halve)
        step(tokens(seed=2))
        handle.remove()
        into.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert_within_contract(
        {k: v for k, v in found[0].items() if "bias" in k}, {k: v for k, v in expected[0].items() if "bias" in k}
    )
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=2e-5)


# -- around loading and saving ----------------------------------------------------------------------------------------


def loaded(make: Make) -> tuple[list[Any], float]:
    """What hooks around loading saw, and the lr after it."""
    p = nn.Parameter(torch.ones(3))
    opt, seen = make([p]), []
    saved = copy.deepcopy(opt.state_dict())

    def first(optimizer: Any, state: dict[str, Any]) -> None:
        seen.append(("first", optimizer is opt, state is saved, sorted(state)))
        state["extra"] = 1

    def second(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(("second", sorted(state)))
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.25
        return state

    opt.register_load_state_dict_pre_hook(second)
    opt.register_load_state_dict_pre_hook(first, prepend=True)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("after", o is opt, float(o.param_groups[0]["lr"]))))
    opt.load_state_dict(saved)
    assert "extra" not in saved
    return seen, float(opt.param_groups[0]["lr"])


def test_hooks_around_loading_run_as_adamw_s_and_what_they_return_is_loaded() -> None:
    assert loaded(OURS) == loaded(ADAMW)
    assert loaded(OURS)[1] == 0.25


def test_hooks_after_loading_do_not_run_where_it_fails() -> None:
    for make in (OURS, ADAMW):
        opt = make([nn.Parameter(torch.ones(3))])
        seen: list[Any] = []
        opt.register_load_state_dict_post_hook(seen.append)
        with pytest.raises(ValueError, match="groups"):
            opt.load_state_dict({"state": {}, "param_groups": []})
        assert seen == []


class Loads(qg.QGaLoreAdamW):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))


def test_hooks_around_loading_run_once_where_a_subclass_overrides_it() -> None:
    seen, lr = loaded(lambda params: Loads(params, lr=0.5))
    assert [each[0] for each in seen] == ["first", "second", "after"]
    assert lr == 0.25


def saved(make: Make) -> tuple[list[str], list[str]]:
    opt, seen = make([nn.Parameter(torch.ones(3))]), []
    opt.register_state_dict_pre_hook(lambda o: seen.append("before"))

    def after(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("after")
        return {**state, "extra": 1}

    opt.register_state_dict_post_hook(after)
    keys = sorted(opt.state_dict())
    return seen, keys


def test_hooks_around_saving_run_as_adamw_s() -> None:
    assert saved(OURS)[1] == saved(ADAMW)[1] == ["extra", "param_groups", "state"]
    assert saved(OURS)[0] == saved(ADAMW)[0] == ["before", "after"]
