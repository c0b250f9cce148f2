"""When an operand is decoded before its product: where the H100 was faster so, and where a model expects it."""

from __future__ import annotations

import dataclasses

import pytest
from kernels_support import load, program
from triton_products import decoding, write_back

from qgalore_compile.kernels.ir.gemm import VALUE, GemmProgram, Operand
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.triton.decode_first import decoded, decoded_program, decodes_first, value_of
from qgalore_compile.kernels.triton.gemm import Matrix, Product
from qgalore_compile.kernels.triton.targets import TARGETS, Target
from qgalore_compile.kernels.triton.tiling import NoTilingError, tilings

pytestmark = pytest.mark.triton

H100 = Target.named("sm_90")
PLAIN = Operand(None, False)


def linear(m: int, n: int, tokens: int | None, memory: str = "bf16") -> Product:
    """The output of an INT8 linear layer: (tokens, n) by (m, n) transposed."""
    right = Operand(decoding(m, n, "int8", min(256, n), memory), True)
    return Product(GemmProgram(PLAIN, right), Matrix(memory, (n, 1)), None, (tokens, m, n), memory)


def update(m: int, n: int, rank: int) -> Product:
    """The write-back of an INT8 weight with an INT4 projector on the right."""
    right = Operand(decoding(rank, n, "int4", 256, "bf16"), False)
    program = GemmProgram(PLAIN, right, write_back(Space(m, n, 256), "bf16"))
    return Product(program, Matrix("bf16", (rank, 1)), None, (m, n, rank), "bf16")


@pytest.mark.parametrize("product", [linear(4096, 4096, 4096), update(4096, 4096, 1024)], ids=["linear", "update"])
def test_large_products_have_it_decoded_before_as_an_h100_was_faster_with(product: Product) -> None:
    assert decodes_first(product, H100)


@pytest.mark.parametrize("product", [linear(64, 64, 7), linear(512, 512, 16), update(256, 256, 32)])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_small_products_decode_it_in_tiles(product: Product, target: Target) -> None:
    assert not decodes_first(product, target)


def test_it_pays_more_the_more_tiles_decode_it_again() -> None:
    found = [decodes_first(linear(2048, 2048, tokens), H100) for tokens in (16, 256, 1024, 4096, 16384)]
    assert found == sorted(found)
    assert found[-1]


def test_an_unknown_number_of_tokens_counts_as_a_usual_one() -> None:
    assert decodes_first(linear(4096, 4096, None), H100) == decodes_first(linear(4096, 4096, 4096), H100)


def test_rows_that_begin_anywhere_stay_in_tiles() -> None:
    """A library reads them an element at a time."""
    assert not decodes_first(linear(4096, 4097, 4096), H100)
    product = linear(4096, 4096, 4096)
    assert not decodes_first(product._replace(left=Matrix("bf16", (4097, 1))), H100)


def test_strides_that_are_not_known_are_no_obstacle() -> None:
    assert decodes_first(linear(4096, 4096, None)._replace(left=None), H100)


def test_a_product_without_anything_to_decode_stays() -> None:
    plain = decoded(linear(4096, 4096, 4096))
    assert decoded(plain) == plain
    assert not decodes_first(plain, H100)


def test_where_no_tile_fits_it_is_decoded_before() -> None:
    product = linear(4096, 4096, 64)
    nowhere = dataclasses.replace(H100, shared_per_block=1 << 10, shared_per_multiprocessor=1 << 10)
    assert decodes_first(product, nowhere)
    assert not decodes_first(update(4096, 4096, 1024), nowhere)  # whose product itself needs a tile


@pytest.mark.parametrize("columns", [64, 61])
@pytest.mark.parametrize("tokens", [7, None])
def test_what_is_rotated_back_is_decoded_before_whatever_the_sizes(tokens: int | None, columns: int) -> None:
    """A group is rotated as a whole, and a tile takes k in parts."""
    product = linear(32, columns, tokens)
    made = program(Space(32, columns, 32), "codes u8 element in", f"{VALUE} bf16 element out")
    made.store(VALUE, made.emit("rotate", (made.emit("f32", (load(made, "codes"),)),), ("back",)))
    rotated = product._replace(program=dataclasses.replace(product.program, right=Operand(made, True)))
    assert not decodes_first(product, H100)
    assert decodes_first(rotated, H100)
    with pytest.raises(NoTilingError, match="whole groups"):
        tilings(rotated, H100)


def test_what_has_been_decoded_is_stored_row_by_row_in_its_prologues_format() -> None:
    product = linear(40, 64, 8, "f16")
    found = decoded(product)
    assert found.right == Matrix("f16", (64, 1))
    assert (found.left, found.sizes, found.memory) == (product.left, product.sizes, product.memory)
    prologue = product.program.right.prologue
    assert isinstance(prologue, BlockProgram)
    assert value_of(prologue) == "f16"


def test_the_program_keeps_its_transposes_and_its_epilogue() -> None:
    program = dataclasses.replace(update(64, 64, 8).program, right=linear(64, 64, 8).program.right)
    found = decoded_program(program)
    assert (found.left, found.right) == (PLAIN, Operand(None, True))
    assert found.epilogue is program.epilogue
    assert GemmProgram.parse(str(found)) == found
