"""Kernels that a generated module asks for, several to one run of the compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile

from qgalore_compile.kernels.cpp import units

TYPES = ["const float*", "float*", "int64_t"]


def source(expression: str, helper: str = "") -> str:
    """A kernel as Inductor writes them, y[i] of x[i]."""
    return (
        f'#include <torch/csrc/inductor/cpp_prefix.h>\n{helper}\nextern "C" void kernel(const float* x, float* y, '
        f"int64_t n) {{\n    for (int64_t i = 0; i < n; ++i) {{ y[i] = {expression}; }}\n}}\n"
    )


SOURCES = [
    source("x[i] + 1.0f"),
    source("helped(x[i])", "static inline float helped(float value) { return 3.0f * value; }"),
    source("helped(x[i])", "#include <cmath>\nstatic inline float helped(float value) { return std::sqrt(value); }"),
]
EXPECTED: list[Callable[[Tensor], Tensor]] = [lambda x: x + 1, lambda x: 3 * x, torch.sqrt]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels each unit has that is begun."""
    found: list[int] = []
    begin = units._begun

    def counted(kernels: Any) -> Any:
        found.append(len(kernels))
        return begin(kernels)

    monkeypatch.setattr(units, "_begun", counted)
    return found


def asked(*sources: str) -> list[Any]:
    module = AsyncCompile()
    return [module.cpp_pybinding(TYPES, each) for each in sources]


def run(kernel: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    kernel(x, y, x.numel())
    return y


@pytest.mark.compiles
def test_kernels_of_one_name_with_helpers_of_one_name_are_one_unit(begun: list[int]) -> None:
    with units.together():
        futures = asked(*SOURCES)
        assert not begun
        kernels = [each.result() for each in futures]
    assert begun == [3]
    x = torch.rand(7)
    for kernel, expected in zip(kernels, EXPECTED, strict=True):
        torch.testing.assert_close(run(kernel, x), expected(x))


@pytest.mark.compiles
def test_many_are_several_units_and_one_that_comes_late_is_compiled_alone(
    begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT", 2)
    with units.together():
        module = AsyncCompile()
        futures = [module.cpp_pybinding(TYPES, each) for each in SOURCES[:2]]
        x = torch.rand(5)
        torch.testing.assert_close(run(futures[1].result(), x), 3 * x)
        late = module.cpp_pybinding(TYPES, SOURCES[2])
        torch.testing.assert_close(run(late.result(), x), x.sqrt())
        assert begun == [2]
        assert all(each.result() for each in asked(*SOURCES))
    assert begun == [2, 2, 1]


@pytest.mark.compiles
def test_a_unit_that_is_not_full_takes_none_that_comes_late() -> None:
    with units.together():
        module = AsyncCompile()
        x = torch.rand(5)
        for source_, expected in zip(SOURCES, EXPECTED, strict=True):
            torch.testing.assert_close(run(module.cpp_pybinding(TYPES, source_).result(), x), expected(x))


@pytest.mark.compiles
@pytest.mark.parametrize("threads", [1, 2])
def test_a_module_has_kernels_behind_its_wait_however_many_threads_compile(threads: int) -> None:
    with units.together(), inductor_config.patch(compile_threads=threads):
        module = AsyncCompile()
        scope: dict[str, Any] = {"kernel": module.cpp_pybinding(TYPES, SOURCES[0]), "other": 1}
        module.wait(scope)
    x = torch.rand(3)
    torch.testing.assert_close(run(scope["kernel"], x), x + 1)
    assert scope["other"] == 1


@pytest.mark.compiles
def test_a_unit_that_does_not_compile_is_told_and_its_kernels_are_compiled_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(units, "text_of", lambda kernels: "no C++")
    with units.together(), caplog.at_level(logging.WARNING, units.__name__):
        (future,) = asked(SOURCES[0])
        x = torch.rand(3)
        torch.testing.assert_close(run(future.result(), x), x + 1)
    assert "one by one" in caplog.text


@pytest.mark.compiles
def test_an_error_of_a_kernel_is_inductors() -> None:
    with units.together(), pytest.raises(Exception, match="undeclared_name"):
        asked(source("undeclared_name"))[0].result()


@pytest.mark.compiles
def test_what_is_asked_for_elsewhere_is_compiled_as_before(begun: list[int]) -> None:
    with units.together():
        pass
    x = torch.rand(3)
    (found,) = asked(SOURCES[0])
    kernel = found.result() if hasattr(found, "result") else found  # where one kernel is compiled at a time
    torch.testing.assert_close(run(kernel, x), x + 1)
    assert not begun


def test_a_text_includes_each_file_once_and_outside_of_namespaces() -> None:
    text = units.text_of([(TYPES, each) for each in SOURCES])
    lines = [line.strip() for line in text.splitlines()]
    included = [line for line in lines if line.startswith("#include")]
    assert len(included) == len(set(included))
    assert "#include <cmath>" in included
    assert lines.index(included[-1]) < next(at for at, line in enumerate(lines) if line.startswith("namespace"))
    assert "PyInit_kernel_2" in text
