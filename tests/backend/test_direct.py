"""Generated code calls the operators' functions, which do what the operators do."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from support import assert_unchanged, data, small, snapshot, step_of
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from qgalore_compile._ops import DIRECT, NUMBERED, called_directly, calls
from qgalore_compile.kernels import ops
from qgalore_compile.subspace.refresh import REFRESHES

PRODUCT = "gemm product\nleft straight\nright straight\n"
OPERATOR = r"torch\.ops\.qgalore\.(refresh_|run_program|run_gemm|gemm)\.default\("
NAMES = {"refresh_", "refresh__moments", "run_program", "run_gemm", "run_rows", "run_loss", "gemm"}


def test_the_operators_of_every_step_have_functions_and_so_have_those_that_take_numbers_as_tensors() -> None:
    every = (*REFRESHES, ops.run_program, ops.run_gemm, ops.run_rows, ops.run_loss, ops.gemm)
    assert {DIRECT[op] for op in every} == NAMES
    overloads = {NUMBERED[op].overload for op in every if op in NUMBERED}
    assert len(overloads) == 6
    assert set(DIRECT) == {*every, *overloads}
    assert set(vars(calls)) == set(DIRECT.values())


def events(run: profile) -> set[str]:
    return {event.name for event in run.events() or ()}


def test_a_profiler_sees_the_operators() -> None:
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        found = calls.gemm(PRODUCT, [left, right])
    assert torch.equal(found, left @ right)
    assert "qgalore::gemm" in events(run)


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_them_too() -> None:
    with _Dispatched() as mode:
        calls.gemm(PRODUCT, [torch.ones(3, 4), torch.ones(4, 5)])
    assert "qgalore::gemm" in mode.seen
    with FakeTensorMode() as fake:
        left, right = (fake.from_tensor(torch.ones(size)) for size in ((3, 4), (4, 5)))
        assert calls.gemm(PRODUCT, [left, right]).shape == (3, 5)


class _Unseen:
    """An operator that nobody is to call."""

    def name(self) -> str:
        return "qgalore::of_this_test"


def test_where_nobody_looks_on_the_function_is_called() -> None:
    with mock.patch.dict(vars(calls)), mock.patch.dict(DIRECT):
        called_directly(_Unseen(), lambda left, right: left + right)  # type: ignore[arg-type]
        assert calls.of_this_test(2, 3) == 5


@contextmanager
def counted() -> Iterator[list[str]]:
    """The functions that generated code calls, one by one."""
    found: list[str] = []

    def counting(name: str, call: object) -> object:
        def count(*given: object) -> object:
            found.append(name)
            return call(*given)  # type: ignore[operator]

        return count

    with mock.patch.dict(vars(calls), {name: counting(name, call) for name, call in vars(calls).items()}):
        yield found


@pytest.mark.compiles
@inductor_config.patch(fx_graph_cache=False)  # the run's cache has no code to show
def test_a_step_calls_functions_and_ends_with_the_same_bits() -> None:
    torch.manual_seed(0)
    model, opt = small(int8=True, update_proj_gap=2)
    step = step_of(model, opt)
    step(data())
    other, opt_too = copy.deepcopy((model, opt))
    compiled = torch.compile(step, backend="qgalore", fullgraph=True, options={"strict": True})
    with counted() as found:
        _, (code,) = run_and_get_code(compiled, data())
    with mock.patch.dict(DIRECT, clear=True):
        through = torch.compile(step_of(other, opt_too), backend="qgalore", fullgraph=True)
        _, (plain,) = run_and_get_code(through, data())
    assert_unchanged(snapshot(other, opt_too), snapshot(model, opt))
    assert set(found) >= {"refresh_", "run_gemm"}
    assert re.findall(r"qgalore_calls\.(\w+)\(", code) == found
    assert re.findall(OPERATOR, plain) == found
    assert not re.findall(OPERATOR, code)
