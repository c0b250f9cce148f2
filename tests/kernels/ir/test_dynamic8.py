"""bitsandbytes' dynamic 8-bit code as instructions: the codes of ``formats``, or as near ones between two entries; and
as C++, with AVX-512 and without: what the instructions say, bit for bit."""

from __future__ import annotations

import ctypes
import math
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels_support import Tensors, compiled, evaluated, filled, load, program
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler

from qgalore_compile import formats
from qgalore_compile.kernels.cpp import printer as cpp_printer
from qgalore_compile.kernels.ir import dynamic8
from qgalore_compile.kernels.ir.program import DYNAMIC8, BlockProgram, Space
from qgalore_compile.kernels.triton.printer import print_region

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


# -- the two operations -----------------------------------------------------------------------------------------------


@SIGNED
def test_expanded_programs_and_triton_know_nothing_of_the_two_operations(signed: bool) -> None:
    for made in (encoder(700, signed), decoder(700, signed)):
        assert BlockProgram.parse(str(made)) == made
        assert any(each.operation in DYNAMIC8 for each in made.instructions)
        plain = dynamic8.expanded(made)
        assert not any(each.operation in DYNAMIC8 for each in plain.instructions)
        assert dynamic8.expanded(plain) is plain
        assert (plain.buffers, plain.space) == (made.buffers, made.space)
        assert print_region(made, 4) == print_region(plain, 4)


def test_codes_that_are_computed_are_decoded_and_short_groups_of_rows_coded() -> None:
    """Two compiles: what was encoded before, and what 32 bits hold."""
    for name in ("signed", "unsigned"):
        made = program(
            Space(3, 45, 11), "x f32 element inout", "codes i32 element inout", "bytes u8 element inout",
            "largest f32 group out", "back f32 element out",
        )  # fmt: skip
        codes, absmax = dynamic8.encode(made, load(made, "x"), signed=name == "signed")
        made.store("bytes", codes)
        made.store("codes", made.emit("add", (codes, load(made, "codes"))))
        made.store("x", made.emit("dynamic8_value", (codes,), (name,)))
        wide = made.emit("bitand", (load(made, "codes"), made.constant(255, "i32")))
        back = made.emit("dynamic8_value", (wide,), (name,))
        made.store("back", made.emit("add", (back, made.emit("dynamic8_value", (load(made, "bytes"),), (name,)))))
        made.store("largest", absmax)
        tensors = filled(made)
        found, expected = compiled(made, tensors), evaluated(made, tensors)
        for buffer in made.buffers:
            assert torch.equal(found[buffer.name], expected[buffer.name]), buffer.name


# -- dynamic8.inc -----------------------------------------------------------------------------------------------------

_WRAPPER = """
#include <cmath>
#include <cstdint>
{included}
extern "C" void codes(bool is_signed, const float* values, float divisor, int64_t count, uint8_t* codes) {{
    is_signed ? dynamic8_codes<true>(values, divisor, count, codes)
              : dynamic8_codes<false>(values, divisor, count, codes);
}}
extern "C" void values(bool is_signed, const uint8_t* codes, int64_t count, float* values) {{
    is_signed ? dynamic8_values<true>(codes, count, values) : dynamic8_values<false>(codes, count, values);
}}
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """``dynamic8.inc`` as this machine runs it, and without AVX-512; two compiles."""
    folder, made = tmp_path_factory.mktemp("dynamic8"), []
    source = folder / "dynamic8.cpp"
    included = Path(cpp_printer.__file__).with_name("dynamic8.inc").read_text()
    source.write_text(_WRAPPER.format(included=included))
    x86 = platform.machine() in ("x86_64", "AMD64")
    for index, flags in enumerate(([], ["-mno-avx512f"] if x86 else [])):
        library = folder / f"{index}.so"
        options = ["-std=c++20", "-O2", "-march=native", *flags, "-fopenmp-simd", "-ffp-contract=off", "-w"]
        command = [get_cpp_compiler(), *options, "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        made.append(ctypes.CDLL(str(library)))
    return made


def coded(library: Any, x: Tensor, divisor: float, signed: bool) -> Tensor:
    room = -(-len(x) // 64) * 64
    padded, codes = torch.nn.functional.pad(x, (0, room - len(x))), torch.empty(room, dtype=torch.uint8)
    library.codes(
        ctypes.c_bool(signed), ctypes.c_void_p(padded.data_ptr()), ctypes.c_float(divisor), ctypes.c_int64(len(x)),
        ctypes.c_void_p(codes.data_ptr()),
    )  # fmt: skip
    return codes[: len(x)]


def expected_codes(x: Tensor, divisor: float, signed: bool) -> Tensor:
    """What the expansion makes of values over a divisor, which need not be their largest."""
    made = program(Space(1, len(x), len(x)), "x f32 element in", "by f32 group in", "codes u8 element out")
    name = "signed" if signed else "unsigned"
    made.store("codes", made.emit("dynamic8_code", (load(made, "x"), load(made, "by")), (name,)))
    return evaluated(made, filled(made, x=x, by=torch.tensor([[divisor]])))["codes"][0]


def around(points: Tensor, neighbours: int) -> Tensor:
    """The floats next to some."""
    return (
        (points.view(torch.int32)[:, None] + torch.arange(-neighbours, neighbours + 1).int())
        .view(-1)
        .view(torch.float32)
    )


def edges(signed: bool) -> Tensor:
    """Entries, midpoints of entries and edges of decades, above zero."""
    entries = formats.dynamic_map(signed)
    middles = (entries[1:] + entries[:-1]) / 2
    points = torch.cat([entries, middles, 10.0 ** torch.arange(-7, 1, dtype=torch.float32)])
    return points[points > 0]


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, -1.0, 2.0, -2.0, 3e38, math.inf, -math.inf, math.nan, -math.nan]


@SIGNED
def test_printed_values_are_those_of_the_expansion(signed: bool, libraries: list[Any]) -> None:
    made, codes = decoder(256, signed), torch.arange(256, dtype=torch.uint8)
    expected = evaluated(made, filled(made, codes=codes, absmax=torch.ones(1)))["x"][0]
    for library in libraries:
        for count in (256, 17, 1):
            found = torch.full((272,), 7.0)
            library.values(
                ctypes.c_bool(signed), ctypes.c_void_p(codes.data_ptr()), ctypes.c_int64(count),
                ctypes.c_void_p(found.data_ptr()),
            )  # fmt: skip
            assert torch.equal(found[:count].view(torch.int32), expected[:count].view(torch.int32))


@SIGNED
def test_printed_codes_are_those_of_the_expansion_next_to_every_edge(signed: bool, libraries: list[Any]) -> None:
    """All 2^32 floats were compared once."""
    dense, coarse = around(edges(signed), 64), torch.arange(-(2**31), 2**31, 40009).int().view(torch.float32)
    x = torch.cat([dense, -dense, coarse, torch.tensor(SPECIAL)])
    expected = expected_codes(x, 1.0, signed)
    for library in libraries:
        assert torch.equal(coded(library, x, 1.0, signed), expected)
    if not signed:
        dense = dense.clamp(max=1.0)
    blocks = torch.nn.functional.pad(dense, (0, -len(dense) % 255)).view(-1, 255).clamp(-1, 1)
    blocks = torch.cat([blocks, torch.ones(len(blocks), 1)], -1)
    stored = formats.quantize_dynamic8(blocks, signed=signed).codes.flatten().int()
    difference = (expected_codes(blocks.flatten(), 1.0, signed).int() - stored).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.05  # of what lies within 64 floats of an edge


@SIGNED
@given(bits=st.integers(0, 2**31 - 1), of_block=st.booleans())
def test_printed_codes_divide_to_nearest(signed: bool, libraries: list[Any], bits: int, of_block: bool) -> None:
    """The quotient decides next to an edge; whatever the divisor, though blocks have none but finite ones above 0."""
    divisor = torch.tensor(bits % (0x7F800000 if of_block else 2**31), dtype=torch.int32).view(torch.float32)
    points = edges(signed) * divisor
    x = torch.cat([around(points, 3), torch.tensor(SPECIAL), 2 * divisor[None]])
    x = torch.cat([x, -x])
    expected = expected_codes(x, float(divisor), signed)
    for library in libraries:
        assert torch.equal(coded(library, x, float(divisor), signed), expected)
