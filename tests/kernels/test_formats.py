"""Every format means the same to PyTorch, to the evaluator, in C++ and in Triton: codes and values bit for bit.

To add a format, add its text to ``WRITTEN`` in ``tests/helpers/formats_support.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from formats_support import READ, draws
from formats_support import WRITTEN as FORMATS
from formats_support import grouped as parsed
from kernels_support import Tensors, compiled, evaluated, program
from torch import Tensor

from qgalore_compile.formats.base import Grouped
from qgalore_compile.kernels.ir.arithmetic import InProgram, Value
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import BlockProgram, Space

SHAPES = ((3, 160), (2, 77), (5, 24), (1, 1))


def space_of(form: Grouped, shape: tuple[int, int]) -> Space:
    rows, columns = shape if form.axis == "rows" else (1, shape[0] * shape[1])
    return Space(rows, columns, min(form.width, columns))


def numbers(shape: tuple[int, int], signed: bool) -> Tensor:
    """Over several decades, with zeros, a group of zeros, and both signs."""
    x = torch.randn(shape) * torch.pow(10.0, torch.randint(-4, 2, shape))
    x = torch.where(torch.rand(shape) < 0.1, 0.0, x)
    x[0, :32] = 0.0
    return x if signed else x.abs()


def buffers(form: Grouped, access: str) -> list[str]:
    return [f"{part.name} {part.memory} {part.extent} {access}" for part in form.parts]


def loads(made: BlockProgram, *names: str) -> list[Value]:
    return [Value(made, made.emit("load", names=(name,))) for name in names]


def decoding(form: Grouped, shape: tuple[int, int]) -> BlockProgram:
    made = program(space_of(form, shape), *buffers(form, "in"), "out f32 element out")
    parts = loads(made, *(part.name for part in form.parts))
    made.store("out", form.load(InProgram(made, form.width), parts).number)
    return made


def encoding(form: Grouped, shape: tuple[int, int], noisy: bool) -> BlockProgram:
    extra = ["noise i32 element in"] if noisy else []
    made = program(space_of(form, shape), "x f32 element in", *extra, *buffers(form, "out"))
    x, *noise = loads(made, "x", *(["noise"] if noisy else []))
    for part, value in zip(form.parts, form.store(InProgram(made, form.width), x, *(noise or [None])), strict=True):
        made.store(part.name, value.number)
    return made


def everything(form: Grouped, shape: tuple[int, int], encoded: Iterable[str]) -> BlockProgram:
    """Decode what is given to ``out``, and encode ``x`` to buffers of each prefix, of "drawn_" by ``noise``."""
    made = program(
        space_of(form, shape), *buffers(form, "in"), "x f32 element in", "noise i32 element in",
        "out f32 element out", *(f"{prefix}{each}" for prefix in encoded for each in buffers(form, "out")),
    )  # fmt: skip
    on = InProgram(made, form.width)
    made.store("out", form.load(on, loads(made, *(part.name for part in form.parts))).number)
    x, noise = loads(made, "x", "noise")
    for prefix in encoded:
        for part, value in zip(form.parts, form.store(on, x, noise if prefix == "drawn_" else None), strict=True):
            made.store(f"{prefix}{part.name}", value.number)
    return made


def interpreted(made: BlockProgram, tensors: Tensors) -> Tensors:
    pytest.importorskip("triton")
    from interpreted import ran

    return ran(made, tensors)


HOW: dict[str, Callable[[BlockProgram, Tensors], Tensors]] = {"evaluator": evaluated, "triton": interpreted}


def stored_as(form: Grouped, parts: Sequence[Tensor], prefix: str = "") -> Tensors:
    return {f"{prefix}{part.name}": each.contiguous() for part, each in zip(form.parts, parts, strict=True)}


def assert_decoded(found: Tensor, expected: Tensor, text: str) -> None:
    """Equal; the dynamic map of eight bits has two spellings within a rounding (kernels/ir/dynamic8.py)."""
    torch.testing.assert_close(found, expected, rtol=2e-6 if "dynamic8" in text else 0, atol=0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("text", [*FORMATS, *READ])
def test_a_program_decodes_as_the_format_does(text: str, how: str) -> None:
    form = parsed(text)
    for shape in SHAPES:
        made, parts = decoding(form, shape), form.encode(numbers(shape, "unsigned" not in text))
        found = HOW[how](made, {**stored_as(form, parts), "out": torch.empty(shape)})["out"]
        assert_decoded(found, form.decode(parts, shape), text)


@pytest.mark.parametrize(
    ("text", "noisy"),
    [(text, noisy) for text in FORMATS for noisy in ((False, True) if parsed(text).rounds else (False,))],
)
@pytest.mark.parametrize("how", HOW)
def test_a_program_encodes_as_the_format_does(text: str, how: str, noisy: bool) -> None:
    form = parsed(text)
    for shape in SHAPES:
        x = numbers(shape, "unsigned" not in text)
        noise = draws(shape) if noisy else None
        made, expected = encoding(form, shape, noisy), stored_as(form, form.encode(x, noise))
        given = {"x": x, **({"noise": noise} if noise is not None else {})}
        found = HOW[how](made, {**given, **{name: torch.full_like(each, 77) for name, each in expected.items()}})
        for name, each in expected.items():
            assert torch.equal(found[name], each), (shape, name)


@pytest.mark.parametrize("text", [*FORMATS, *READ])
def test_a_compiled_program_decodes_and_encodes_as_the_format_does(text: str) -> None:
    """All three in one program and at one odd shape, since compiling is what takes the time."""
    form, shape = parsed(text), (2, 77)
    x, noise = numbers(shape, "unsigned" not in text), draws(shape)
    stored = form.encode(numbers(shape, "unsigned" not in text))
    encoded = {"nearest_": None, **({"drawn_": noise} if form.rounds else {})} if text in FORMATS else {}
    made = everything(form, shape, encoded)
    expected = {name: each for prefix, draw in encoded.items()
                for name, each in stored_as(form, form.encode(x, draw), prefix).items()}  # fmt: skip
    empty = {name: torch.full_like(each, 77) for name, each in expected.items()}
    found = compiled(made, {**stored_as(form, stored), "x": x, "noise": noise, "out": torch.empty(shape), **empty})
    assert_decoded(found["out"], form.decode(stored, shape), text)
    for name, each in expected.items():
        assert torch.equal(found[name], each), name


@pytest.mark.parametrize("text", FORMATS)
def test_memory_is_what_the_parts_say(text: str) -> None:
    form = parsed(text)
    for part, each in zip(form.parts, form.encode(torch.randn(5, 77).abs()), strict=True):
        assert each.dtype == MEMORY[part.memory].dtype
        assert tuple(each.shape) == form.shape_of(part, (5, 77))
