"""Compiling a program: on another thread, and what is missing or wrong is said before anything is written."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from kernels_support import load, program
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.exc import CppCompileError

from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.kernels.ir.program import BlockProgram, Space


def adding(number: float) -> BlockProgram:
    """x ← x + number."""
    made = program(Space(2, 8, 8), "x f32 element inout")
    made.store("x", made.emit("add", (load(made, "x"), made.constant(number))))
    return made


@pytest.mark.parametrize("exists", [False, True], ids=["absent", "not executable"])
def test_without_a_compiler_the_error_names_what_was_looked_for_and_what_to_install(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "g++"
    if exists:
        compiler.touch()
    monkeypatch.setattr("sys.platform", "linux")
    with inductor_config.patch({"cpp.cxx": (None, str(compiler))}), pytest.raises(cpu.NoCompilerError) as caught:
        cpu.kernel(str(adding(0.5)))
    message = str(caught.value)
    assert f"looked for '{compiler}', which the environment variable CXX sets" in message
    assert "`apt install g++` on Debian and Ubuntu" in message


def test_a_compiler_that_was_installed_meanwhile_is_found() -> None:
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(cpu.NoCompilerError):
        cpu.check_compiler()
    cpu.check_compiler()


def test_a_kernel_compiles_while_its_maker_goes_on_and_is_waited_for_where_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pick_vec_isa()  # compiles, the first time
    go_on, compilers = threading.Event(), list[str]()
    build = cpp_builder.CppBuilder.build

    def wait_and_build(builder: cpp_builder.CppBuilder) -> None:
        assert go_on.wait(60)
        compilers.append(threading.current_thread().name)
        build(builder)

    monkeypatch.setattr(cpp_builder.CppBuilder, "build", wait_and_build)
    kernel, x = cpu.kernel(str(adding(1.5))), torch.zeros(2, 8)
    assert compilers == []
    go_on.set()
    kernel({"x": x})
    assert torch.equal(x, torch.full((2, 8), 1.5))
    assert compilers  # and of kernels that earlier tests began
    assert all(name.startswith("qgalore-compiler") for name in compilers)


def test_what_cannot_be_compiled_is_an_error_with_the_compilers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "print_cpp", lambda program: "this is no C++")
    kernel, x = cpu.Kernel(adding(2.5)), torch.zeros(2, 8)
    with pytest.raises(CppCompileError, match=r"error: .*this"):
        kernel.wait()
    with pytest.raises(CppCompileError):
        kernel({"x": x})
    assert torch.equal(x, torch.zeros(2, 8))
