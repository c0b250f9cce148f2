"""bitsandbytes' dynamic 8-bit code as instructions: the codes of ``formats``, or as near ones between two entries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernels_support import Tensors, compiled, evaluated, filled, load, program
from torch import Tensor

from qgalore_compile import formats
from qgalore_compile.kernels import dynamic8
from qgalore_compile.kernels.program import BlockProgram, Space

SIGNED = pytest.mark.parametrize("signed", [True, False])
SIZES = [1, 5, 255, 256, 257, 700, 4096]


def encoder(count: int, signed: bool) -> BlockProgram:
    made = program(
        Space(1, count, formats.BLOCK_SIZE), "x f32 element in", "codes u8 element out", "absmax f32 group out"
    )
    codes, absmax = dynamic8.encode(made, load(made, "x"), signed=signed)
    made.store("codes", codes)
    made.store("absmax", absmax)
    return made


def decoder(count: int, signed: bool) -> BlockProgram:
    space = Space(1, count, formats.BLOCK_SIZE)
    made = program(space, "codes u8 element in", "absmax f32 group in", "x f32 element out")
    made.store("x", dynamic8.decode(made, load(made, "codes"), load(made, "absmax"), signed=signed))
    return made


def values(count: int, signed: bool) -> Tensor:
    """Elements over sixteen decades, with zeros among them, and one block of zeros where there are several."""
    x = torch.randn(count) * 10 ** (torch.rand(count) * 16 - 12)
    x[torch.rand(count) < 0.1] = 0
    if count > 2 * formats.BLOCK_SIZE:
        x[formats.BLOCK_SIZE : 2 * formats.BLOCK_SIZE] = 0
    return x if signed else x.abs()


def assert_codes(x: Tensor, signed: bool, run: Callable[[BlockProgram, Tensors], Tensors] = evaluated) -> None:
    """The program's codes and maxima are those of ``formats``; decoded, too."""
    made = encoder(len(x), signed)
    found = run(made, filled(made, x=x))
    expected = formats.quantize_dynamic8(x, signed=signed)
    codes = found["codes"][0]
    assert torch.equal(found["absmax"][0], expected.absmax)
    # in the middle between two entries a rounding decides, and there alone
    other = codes != expected.codes
    entries, absmax = formats.dynamic_map(signed), expected.absmax.repeat_interleave(formats.BLOCK_SIZE)[: len(x)]
    distances = [(entries[each[other].long()] * absmax[other] - x[other]).abs() for each in (codes, expected.codes)]
    assert ((distances[0] - distances[1]).abs() <= 1e-6 * absmax[other]).all()
    assert ((codes.int() - expected.codes.int()).abs() <= 1).all()
    if run is compiled:  # a third compile, of a few products and selections
        return
    back = decoder(len(x), signed)
    decoded = run(back, filled(back, codes=expected.codes, absmax=expected.absmax))["x"][0]
    wanted = formats.dequantize_dynamic8(expected.codes, expected.absmax, signed)
    torch.testing.assert_close(decoded, wanted, rtol=3e-7, atol=0)


@SIGNED
@pytest.mark.parametrize("count", SIZES)
def test_codes_are_those_of_the_formats(count: int, signed: bool) -> None:
    for _ in range(10):
        assert_codes(values(count, signed), signed)


@SIGNED
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-12, 1.0, 1e20, 1e38])
def test_codes_do_not_depend_on_the_magnitude(size: float, signed: bool) -> None:
    x = torch.randn(700) if signed else torch.rand(700)
    assert_codes(x.clamp(-3, 3) * size, signed)


@SIGNED
def test_zeros_and_a_single_element_are_coded_like_the_formats(signed: bool) -> None:
    assert_codes(torch.zeros(300), signed)
    assert_codes(torch.zeros(300).index_fill(0, torch.tensor([299]), 2.0), signed)
    assert_codes(torch.tensor([-3.0 if signed else 3.0]), signed)


@SIGNED
def test_every_entry_and_every_edge_of_a_decade_is_coded_like_the_formats(signed: bool) -> None:
    entries = formats.dynamic_map(signed)
    middles = (entries[1:] + entries[:-1]) / 2
    powers = 10.0 ** torch.arange(-7, 1, dtype=torch.float32)
    points = torch.cat([entries, middles, powers, *([-powers] if signed else [])])
    near = [torch.nextafter(points, torch.tensor(towards)) for towards in (-2.0, 2.0)]
    points = torch.cat([points, *near]).clamp(-1.0 if signed else 0.0, 1.0)
    blocks = points[: len(points) // 255 * 255].view(-1, 255)
    assert_codes(torch.cat([blocks, torch.ones(len(blocks), 1)], -1).flatten(), signed)


@SIGNED
def test_codes_are_the_nearest_of_bitsandbytes_map(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    entries = functional.create_dynamic_map(signed, max_exponent_bits=7, total_bits=8).numpy().astype(np.float64)
    x = values(4096, signed)
    made = encoder(len(x), signed)
    found = evaluated(made, filled(made, x=x))
    absmax = np.repeat(found["absmax"].numpy().astype(np.float64), formats.BLOCK_SIZE)
    unit = x.numpy() / np.where(absmax > 0, absmax, 1)
    distance = np.abs(unit[:, None] - entries)
    chosen = distance[np.arange(len(x)), found["codes"][0].numpy()]
    assert (chosen <= distance.min(-1) + 1e-7).all()


@SIGNED
def test_compiled_codes_are_those_of_the_formats(signed: bool) -> None:
    assert_codes(values(1500, signed), signed, compiled)
