"""Tiles that fit, and a model of traffic whose small cases are counted by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
from kernels_support import load, program
from triton_products import decoding, up

from qgalore_compile.kernels.ir.gemm import GemmProgram, Operand
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.triton import tiling as model
from qgalore_compile.kernels.triton.gemm import Matrix, Product, Tiling
from qgalore_compile.kernels.triton.targets import TARGETS, Target
from qgalore_compile.kernels.triton.tiling import (
    NoTilingError,
    place,
    region_blocks,
    registers,
    shared,
    tiling,
    traffic,
)
from qgalore_compile.training.llama import PRESETS

pytestmark = pytest.mark.triton

H100 = Target.named("sm_90")


def plain(m: int | None, n: int | None, k: int, memory: str = "bf16", precision: str = "ieee") -> Product:
    """Both operands as they are."""
    gemm = GemmProgram(Operand(None, False), Operand(None, False))
    return Product(gemm, Matrix(memory, (k, 1)), Matrix(memory, (n or 1, 1)), (m, n, k), memory, precision)


def forward(m: int, n: int, group: int, tokens: int | None) -> Product:
    """A linear layer's output from INT8 weights."""
    right = Operand(decoding(m, n, "int8", min(group, n), "bf16"), True)
    return Product(GemmProgram(Operand(None, False), right), Matrix("bf16", (n, 1)), None, (tokens, m, n), "bf16")


def projected(m: int, n: int, rank: int) -> Product:
    """What is left of a gradient: dY P."""
    right = Operand(decoding(m, rank, "int4", min(256, rank), "bf16"), False)
    return Product(GemmProgram(Operand(None, False), right), Matrix("bf16", (m, 1)), None, (4096, rank, m), "bf16")


def shapes(name: str) -> tuple[list[tuple[int, int]], int]:
    """A preset's projected weights, and its rank."""
    config = PRESETS[name].model
    d, i = config.hidden_size, config.intermediate_size
    return [(d, d), (i, d), (d, i)], PRESETS[name].rank


# -- tiles that fit ---------------------------------------------------------------------------------------------------


def assert_fits(product: Product, target: Target) -> None:
    chosen = tiling(product, target)
    held = target.occupancy(int(registers(product, chosen, target)), int(shared(product, chosen)), chosen.warps)
    assert held.blocks >= 1, (chosen, held)
    assert math.isfinite(model.seconds(product, chosen, target))
    for size in (chosen.m, chosen.n, chosen.k):
        assert size >= 16  # as a tensor core takes them
        assert size & (size - 1) == 0
    width = product.width
    assert width is None or chosen.n % width == 0 or chosen.n >= width


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_product_of_a_preset_has_a_tiling_that_fits(preset: str, target: Target) -> None:
    weights, rank = shapes(preset)
    for m, n in weights:
        for group in (128, 256):
            assert_fits(up(m, n, rank, group), target)
        for tokens in (4096, None):
            assert_fits(forward(m, n, 256, tokens), target)
        assert_fits(projected(m, n, rank), target)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("group", [24, 32, 48, 64, 96, 100])
def test_groups_of_any_width_have_one_too(group: int, target: Target) -> None:
    assert_fits(up(960, 480, 64, group), target)
    assert_fits(up(480, 960, 64, group, "f32"), target)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_float32_products_have_one_with_and_without_tensor_cores(target: Target, precision: str) -> None:
    assert_fits(plain(1000, 1000, 1000, "f32", precision), target)


def test_where_none_fits_the_message_says_what_to_do() -> None:
    with pytest.raises(NoTilingError, match=r"groups of 4096 columns.*choose a smaller group size"):
        tiling(up(8192, 4096, 1024, 4096), H100)


def test_the_tiling_is_the_models_fastest() -> None:
    product = up(4096, 4096, 1024, 256)
    chosen = tiling(product, H100)
    for m, k, stages in ((16, 32, 2), (32, 64, 2), (64, 32, 3)):
        other = Tiling(m, 256, k, 8, stages)
        if registers(product, other, H100) <= 255 and shared(product, other) <= H100.shared_per_block:
            assert model.seconds(product, chosen, H100) <= model.seconds(product, other, H100)


def region(width: int) -> BlockProgram:
    made = program(Space(3, 1 << 20, width), "x f32 element in", "y f32 element out")
    made.store("y", load(made, "x"))
    return made


@pytest.mark.parametrize("width", [1, 8, 24, 100, 256, 4096, 8192])
def test_a_block_of_a_region_has_sixteen_elements_a_thread_and_whole_groups(width: int) -> None:
    padded = {24: 32, 100: 128}.get(width, width)
    rows, warps = region_blocks(region(width))[0]
    assert rows == max(1, 2048 // padded)
    assert warps == max(4, padded // 512)
    assert rows * padded == 16 * 32 * warps


def test_what_comes_next_for_a_region_has_fewer_elements_a_thread() -> None:
    blocks = region_blocks(region(256))
    assert blocks == [(8, 4), (4, 4), (2, 4), (1, 4), (1, 8), (1, 16)]


def test_a_group_that_is_too_wide_for_a_region_is_refused_with_what_to_do() -> None:
    assert region_blocks(region(16384)) == [(1, 16)]
    with pytest.raises(NoTilingError, match=r"groups of 16385 columns are too wide.*choose a smaller group size"):
        region_blocks(region(16385))


# -- traffic ----------------------------------------------------------------------------------------------------------

TILE = Tiling(16, 32, 16, 4, 2, band=2)
FOUR = plain(32, 64, 48)
"""Two tiles by two: panels of 16 · 48 and 32 · 48 numbers of two bytes."""


def with_cache(size: int, multiprocessors: int = 1) -> Target:
    return dataclasses.replace(H100, l2_bytes=size, multiprocessors=multiprocessors)


def test_each_tile_asks_for_its_two_panels_and_writes_itself() -> None:
    found = traffic(FOUR, TILE, with_cache(1 << 20))
    left, right, product = 32 * 48 * 2, 48 * 64 * 2, 32 * 64 * 2
    assert found.least == left + right + product
    assert found.issued == 2 * left + 2 * right + product


def test_memory_is_read_once_where_everything_fits_the_cache() -> None:
    found = traffic(FOUR, TILE, with_cache(1 << 20))
    assert found.dram == found.least
    assert found.wave == (16 + 32) * 48 * 2  # one tile at a time


def test_memory_is_read_for_every_tile_where_nothing_does() -> None:
    """But for the right panel, the last that a tile touched, which the next one down shares."""
    found = traffic(FOUR, TILE, with_cache(1))
    assert found.dram == found.issued - 2 * 32 * 48 * 2
    assert found.least < found.dram


def test_a_wave_shares_its_panels() -> None:
    found = traffic(FOUR, TILE, with_cache(1, multiprocessors=2), held=2)
    assert found.dram == found.least
    assert found.wave == (32 + 64) * 48 * 2


def test_bands_share_more_than_rows_do() -> None:
    """Eight tiles at a time: two rows of four need six panels, one row of eight needs nine."""
    product, target = plain(64, 256, 512), with_cache(1, multiprocessors=8)
    tile = Tiling(16, 16, 16, 4, 2)
    rows, bands = (traffic(product, tile._replace(band=band), target) for band in (1, 2))
    assert rows.issued == bands.issued
    assert bands.dram < rows.dram
    assert (rows.wave, bands.wave) == (9 * 16 * 512 * 2, 6 * 16 * 512 * 2)


def test_the_bytes_of_an_update_are_those_of_its_formats() -> None:
    """N in bf16, P in half a byte with 8 bytes a group, the weight in one byte with 8 a group, there and back."""
    m, n, rank, group = 64, 32, 16, 16
    found = traffic(up(m, n, rank, group), Tiling(16, 16, 16, 4, 2), H100)
    groups = n // group
    numbers = 4 + 8 + 4  # lr, step; and nothing for seed and parameter
    p, weight = rank * n // 2 + rank * groups * 8, m * n + m * groups * 8
    assert found.least == pytest.approx(m * rank * 2 + p + 2 * weight, abs=numbers)
    assert found.dram == found.least


def test_an_unknown_number_of_tokens_counts_as_a_usual_one() -> None:
    chosen = Tiling(64, 64, 32, 4, 3)
    assert traffic(plain(None, 64, 64), chosen, H100) == traffic(plain(model.TOKENS, 64, 64), chosen, H100)


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", [1, 2, 3, 8])
@pytest.mark.parametrize(("down", "across"), [(1, 1), (1, 7), (7, 1), (5, 4), (8, 3), (9, 2)])
def test_every_tile_has_one_instance(down: int, across: int, band: int) -> None:
    places = [place(tile, down, across, band) for tile in range(down * across)]
    assert sorted(places) == [(row, column) for row in range(down) for column in range(across)]
    first = places[: min(band, down) * across]
    assert {row for row, _ in first} == set(range(min(band, down)))  # a band, then the next


def test_a_write_back_that_packs_codes_into_bytes_has_fewer_sums_a_thread() -> None:
    """In tiles of 64 sums a thread those of e2m1 and int6 spill on sm_80, sm_90 and sm_100."""
    product = up(4096, 4096, 1024, 128)
    assert product.program.epilogue is not None
    buffers = [
        each._replace(memory="p4") if each.name == "codes" else each for each in product.program.epilogue.buffers
    ]
    epilogue = dataclasses.replace(product.program.epilogue, buffers=buffers)
    packed = product._replace(program=dataclasses.replace(product.program, epilogue=epilogue))
    for name in ("sm_80", "sm_90", "sm_100"):
        found = tiling(packed, Target.named(name))
        assert found.m * found.n <= 48 * 32 * found.warps
        assert_fits(packed, Target.named(name))
    own = tiling(product, H100)
    assert own.m * own.n > 48 * 32 * own.warps
