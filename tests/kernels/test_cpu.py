"""Compiling a program: what is missing is said before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernels_support import load, program
from torch._inductor import config as inductor_config

from qgalore_compile.kernels import cpu
from qgalore_compile.kernels.program import BlockProgram, Space


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
