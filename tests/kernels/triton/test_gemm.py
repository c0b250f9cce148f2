"""Products as Triton kernels, in Triton's interpreter.

Operands hold small integers and halves, whose products any order of summation has exactly: a kernel's results are then
right bit for bit, or wrong.  Every tensor stands between NaN, or codes that mean something: what lies outside of it
must not count, and must stay.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from kernels_support import evaluated, load, program, shape_of
from torch import Tensor
from triton_products import Guarded, Side, write_back

pytest.importorskip("triton")

import interpreted

from qgalore_compile import formats, rng
from qgalore_compile.kernels.ir.gemm import Factors, GemmProgram, Operand
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton import looked_at
from qgalore_compile.kernels.triton.gemm import Further, Matrix, Product, Tiling, needs_groups, print_gemm
from qgalore_compile.kernels.triton.kernels import Kernel, product_kernel
from qgalore_compile.kernels.triton.targets import Target
from qgalore_compile.kernels.triton.tiling import place

pytestmark = pytest.mark.triton

M, N, K = 19, 45, 27
TILING = Tiling(16, 32, 16, 4, 2)


def plain_step(space: Space) -> BlockProgram:
    """w ← w - lr · product, and the sign that each moved in: no group is asked for."""
    made = program(
        space, "w f32 element inout", "product f32 element in", "lr f32 scalar in", "up bool element out",
        "decay f32 row in", "mask bf16 column in", "s f32 group in",
    )  # fmt: skip
    moved = made.emit("mul", (load(made, "lr"), load(made, "product")))
    moved = made.emit("mul", (made.emit("mul", (moved, load(made, "decay"))), load(made, "mask")))
    made.store("up", made.emit("gt", (moved, made.constant(0.0))))
    made.store("w", made.emit("sub", (made.emit("mul", (load(made, "w"), load(made, "s"))), moved)))
    return made


def kernel_of(product: Product, tiling: Tiling) -> Kernel:
    with mock.patch.object(triton_kernels, "tiling", return_value=tiling):
        return product_kernel(product, Target.named("sm_80"))


def ran(
    left: Side, right: Side, tiling: Tiling = TILING, *, epilogue: BlockProgram | None = None,
    own: dict[str, Tensor] | None = None, numbers: dict[str, int] | None = None, unknown: str = "", memory: str = "f32",
    precision: str = "ieee",
) -> dict[str, Tensor]:  # fmt: skip
    """What the kernel leaves in the epilogue's buffers, or "product"; all else must stay."""
    (m, k), n = left.value.shape, right.value.shape[1]
    sizes = (None if "m" in unknown else m, None if "n" in unknown else n, k)
    gemm = GemmProgram(left.operand, right.operand, epilogue)
    product = Product(gemm, left.matrix, right.matrix, sizes, memory, precision)
    outputs = {name: Guarded(tensor) for name, tensor in (own or {}).items()}
    if epilogue is None:
        outputs["product"] = Guarded(torch.zeros(m, n, dtype=MEMORY[memory].dtype))
    read = [*left.guarded, *right.guarded]
    tensors, values, written = triton_kernels.bind(
        gemm,
        [outputs[each.name].tensor for each in epilogue.written()] if epilogue else [],
        [each.tensor for each in read]
        + [outputs[each.name].tensor for each in (epilogue.buffers if epilogue else [])
           if each.access == "in" and each.name != "product"],
        [(numbers or {})[name] for name in (epilogue.numbers if epilogue else [])],
    )  # fmt: skip
    if epilogue is None:
        tensors["product"], written = outputs["product"].tensor, ["product"]
    interpreted.launch(kernel_of(product, tiling), tensors, values, m, n)
    changed = [id(tensors[name]) for name in written]
    for each in [*read, *outputs.values()]:
        each.assert_stays(written=id(each.tensor) in changed)
    return {name: each.tensor.clone() for name, each in outputs.items()}


def assert_product(left: Side, right: Side, **how: Any) -> None:
    found = ran(left, right, **how)["product"]
    assert torch.equal(found, (left.value @ right.value).to(found.dtype))


# -- operands ---------------------------------------------------------------------------------------------------------

# narrower than a tile, as wide, wider, and of widths that no tile is made of
WIDTHS = [4, 8, 16, 32, 64, 5, 24, 27, 48]


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoded_operand_is_what_it_stands_for_whatever_its_groups(side: str, transposed: bool, how: str) -> None:
    """All of m, n, k and the codes a row are odd, and the last group is short."""
    for width in WIDTHS:
        coded = {"how": how, "transposed": transposed, "width": width}
        left = Side(M, K, **(coded if side == "left" else {}))  # type: ignore[arg-type]
        right = Side(K, N, **(coded if side == "right" else {}))  # type: ignore[arg-type]
        assert_product(left, right)


def test_both_operands_may_be_decoded() -> None:
    assert_product(Side(M, K, "int4", transposed=True, width=24), Side(K, N, "int8", width=16))


@pytest.mark.parametrize("sizes", [(16, 32, 16), (32, 64, 32), (1, 1, 1), (16, 33, 17), (5, 64, 40), (48, 20, 64)])
@pytest.mark.parametrize("how", ["plain", "int8", "int4"])
def test_sizes_that_fill_tiles_and_that_do_not(sizes: tuple[int, int, int], how: str) -> None:
    m, n, k = sizes
    assert_product(Side(m, k), Side(k, n, how, width=8))
    assert_product(Side(m, k), Side(k, n, how, width=8, transposed=True))
    assert_product(Side(m, k, how, width=16, transposed=True), Side(k, n))


@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("pitch", ["rows", "columns", "wide", "both"])
def test_a_plain_operand_may_have_any_strides(pitch: str, transposed: bool) -> None:
    def side(rows: int, columns: int) -> Side:
        height, width = (columns, rows) if transposed else (rows, columns)
        strides = {"rows": (width, 1), "columns": (1, height), "wide": (width + 11, 1), "both": (2 * width + 3, 2)}
        return Side(rows, columns, transposed=transposed, pitch=strides[pitch])

    assert_product(side(M, K), side(K, N))


@pytest.mark.parametrize("memory", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("how", ["plain", "int8", "int4"])
def test_a_product_is_rounded_once_to_its_own_type(how: str, memory: str) -> None:
    left = Side(M, K, memory=memory)
    right = Side(K, N, how, width=8, memory=memory)
    found = ran(left, right, memory=memory)["product"]
    assert found.dtype == MEMORY[memory].dtype
    assert torch.equal(found, (left.value @ right.value).to(found.dtype))


def test_products_of_any_numbers_are_within_float32s_rounding() -> None:
    left, right = Side(M, 200), Side(200, N)
    for side in (left, right):
        side.guarded = [Guarded(torch.randn_like(side.guarded[0].tensor))]
        side.value = side.guarded[0].tensor.double()
    found, exact = ran(left, right)["product"].double(), left.value @ right.value
    assert bool(((found - exact).abs() <= 200 * 2.0**-24 * (left.value.abs() @ right.value.abs())).all())


@pytest.mark.parametrize("unknown", ["m", "n", "mn"])
def test_sizes_may_be_known_only_when_the_step_runs(unknown: str) -> None:
    left, right = Side(M, K), Side(K, N)
    assert_product(left, right, unknown=unknown)
    kernel = kernel_of(
        Product(GemmProgram(left.operand, right.operand), left.matrix, right.matrix,
                (None if "m" in unknown else M, None if "n" in unknown else N, K), "f32"), TILING,
    )  # fmt: skip
    assert kernel.grid is None
    assert {name: kind for name, kind in kernel.signature.items() if name in "mn"} == dict.fromkeys(unknown, "i32")
    assert [kernel.instances(m, 45) for m in (16, 17)] == [2, 4]


def test_an_unknown_number_of_tokens_meets_a_decoded_weight() -> None:
    assert_product(Side(M, K), Side(K, N, "int8", width=16, transposed=True), unknown="m")
    assert_product(Side(M, K, "int4", width=24, transposed=True), Side(K, N), unknown="n")


# -- epilogues --------------------------------------------------------------------------------------------------------

TILES = {  # by a group's width: tiles of one group, of several, and of one that fills no tile
    4: [16, 32], 8: [16, 32], 16: [16, 32], 32: [32, 64], 24: [32], 12: [16], 48: [64], 45: [64], 13: [16],
}  # fmt: skip


def weight(n: int, width: int) -> dict[str, Tensor]:
    codes, scale, offset, _ = formats.quantize_int8(torch.randn(M, n), width)
    return {"codes": codes, "scale": scale, "offset": offset, "lr": torch.tensor(0.01), "step": torch.tensor(41)}


@pytest.mark.parametrize(
    ("width", "n"), [*((width, n) for width in TILES for n in (N, 96)), (8, 20), (24, 20), (24, 48), (12, 48)]
)
def test_an_int8_weight_is_written_back_as_eager_does_it(width: int, n: int) -> None:
    width = min(width, n)
    left, right, own = Side(M, K), Side(K, n), weight(n, width)
    value = formats.dequantize_int8(own["codes"], own["scale"], own["offset"], width)
    value = value - own["lr"] * (left.value @ right.value).float()
    noise = rng.random_bits((M, n), seed=-5, step=41, param=3)
    expected = formats.quantize_int8(value, width, noise=noise)
    for tile in TILES.get(width, [32]):
        found = ran(
            left, right, Tiling(16, tile, 16, 4, 2), epilogue=write_back(Space(M, n, width)), own=own,
            numbers={"seed": -5, "param": 3},
        )  # fmt: skip
        for name, one in zip(("codes", "scale", "offset"), expected[:3], strict=True):
            assert torch.equal(found[name], one), (name, tile)


@pytest.mark.parametrize("projector", [8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize(("width", "n"), [(24, 64), (24, 96), (48, 96), (20, 60)])
def test_groups_of_the_projector_and_of_the_weight_need_not_agree(width: int, n: int, projector: int) -> None:
    """Tiles then begin within a group of the projector, or where its second nibbles begin within the tile."""
    tile = {24: 32, 48: 64, 20: 32}[width]
    left, own = Side(M, K), weight(n, width)
    right = Side(K, n, "int4", width=projector)
    value = formats.dequantize_int8(own["codes"], own["scale"], own["offset"], width)
    value = value - own["lr"] * (left.value @ right.value).float()
    expected = formats.quantize_int8(value, width, noise=rng.random_bits((M, n), seed=1, step=41, param=0))
    found = ran(
        left, right, Tiling(32, tile, 32, 4, 2), epilogue=write_back(Space(M, n, width)), own=own,
        numbers={"seed": 1, "param": 0},
    )  # fmt: skip
    for name, one in zip(("codes", "scale", "offset"), expected[:3], strict=True):
        assert torch.equal(found[name], one), name


@pytest.mark.parametrize("width", [8, 32, 24, 45])
@pytest.mark.parametrize("unknown", ["", "m"])
def test_an_epilogue_that_asks_for_no_group_takes_any_tile(width: int, unknown: str) -> None:
    made = plain_step(Space(M, N, width))
    assert not needs_groups(made)
    left, right = Side(M, K), Side(K, N)
    own = {buffer.name: torch.randn(shape_of(buffer, made.space)).to(MEMORY[buffer.memory].dtype)
           for buffer in made.buffers if buffer.name != "product"}  # fmt: skip
    expected = evaluated(made, {**own, "product": (left.value @ right.value).float()})
    for tiling in (TILING, Tiling(32, 16, 32, 4, 2)):
        found = ran(left, right, tiling, epilogue=made, own=own, unknown=unknown)
        assert torch.equal(found["w"], expected["w"])
        assert torch.equal(found["up"], expected["up"])


def test_the_product_reaches_the_epilogue_in_float32() -> None:
    """One that is rounded to bfloat16 first would have lost eight bits of it."""
    made = program(Space(M, N, 8), "product bf16 element in", "out f32 element out")
    made.store("out", load(made, "product"))
    left, right = (Side(*size, memory="bf16") for size in ((M, K), (K, N)))
    found = ran(left, right, epilogue=made, own={"out": torch.zeros(M, N)}, memory="bf16")["out"]
    assert torch.equal(found.double(), left.value @ right.value)


def test_every_tiling_gives_the_same_bits() -> None:
    left, right, own = Side(M, K, "int4", transposed=True), Side(K, N), weight(N, 8)
    results = [
        ran(left, right, tiling, epilogue=write_back(Space(M, N, 8)), own=own, numbers={"seed": 9, "param": 1})
        for tiling in (Tiling(16, 16, 16, 4, 2), Tiling(64, 32, 32, 4, 2, 1), Tiling(16, 64, 32, 4, 3, 2))
    ]
    for other in results[1:]:
        for name, one in results[0].items():
            assert torch.equal(one, other[name]), name


# -- several products -------------------------------------------------------------------------------------------------


def sum_of_two(space: Space) -> BlockProgram:
    """w ← w - lr · (product + scale ∘ gradient), the scale a number for each column, and each group's largest."""
    made = program(
        space, "w f32 element inout", "product f32 element in", "gradient f32 element in", "lr f32 scalar in",
        "scale f32 column in", "most f32 group out",
    )  # fmt: skip
    total = made.emit("add", (load(made, "product"), made.emit("mul", (load(made, "gradient"), load(made, "scale")))))
    new = made.emit("sub", (load(made, "w"), made.emit("mul", (load(made, "lr"), total))))
    made.store("w", new)
    made.store("most", made.emit("group_max", (new,)))
    return made


@pytest.mark.parametrize("how", ["plain", "int4"])
@pytest.mark.parametrize(("width", "tokens"), [(16, 5), (32, 27), (48, 1), (64, 40)])
def test_an_epilogue_may_read_products_of_other_lengths(width: int, tokens: int, how: str) -> None:
    """P N over the rank, decoded or not, and dYᵀ X over the tokens."""
    projector, update = Side(M, K, how, width=8), Side(K, N)
    grad_output, inputs = Side(M, tokens, transposed=True), Side(tokens, N)
    epilogue = sum_of_two(Space(M, N, width))
    gemm = GemmProgram(
        projector.operand, update.operand, epilogue, "product",
        (Factors(grad_output.operand, inputs.operand, "gradient"),),
    )  # fmt: skip
    known = Further(grad_output.matrix, inputs.matrix, tokens)
    product = Product(gemm, projector.matrix, update.matrix, (M, N, K), "f32", "ieee", (known,))
    w, lr, scale = torch.randint(-8, 8, (M, N)).float(), torch.tensor(0.5), torch.randint(1, 4, (N,)).float()
    most = torch.zeros(M, -(-N // width))
    expected = w - lr * (projector.value @ update.value + grad_output.value @ inputs.value * scale)
    sides = (projector, update, grad_output, inputs)
    reads = [each.tensor for side in sides for each in side.guarded]
    tensors, values, _ = triton_kernels.bind(gemm, [w, most], [*reads, lr, scale], [])
    tiling = TILING._replace(n=max(32, 1 << (width - 1).bit_length()))
    interpreted.launch(kernel_of(product, tiling), tensors, values, M, N)
    assert torch.equal(w, expected)
    padded = torch.nn.functional.pad(expected, (0, -N % width), value=-torch.inf)
    assert torch.equal(most, padded.view(M, -1, width).amax(-1))


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_every_product_of_a_write_back_has_a_tile_without_spills_and_runs_on_tensor_cores(name: str) -> None:
    epilogue = sum_of_two(Space(512, 512, 256))
    plain = Operand(None, False)
    gemm = GemmProgram(plain, plain, epilogue, "product", (Factors(Operand(None, True), plain, "gradient"),))
    known = Further(Matrix("bf16", (512, 1)), Matrix("bf16", (512, 1)), 1024)
    sides = Matrix("bf16", (128, 1)), Matrix("bf16", (512, 1))
    product = Product(gemm, *sides, (512, 512, 128), "bf16", "ieee", (known,))
    target = Target.named(name)
    kernel = product_kernel(product, target, look=True)
    binary = looked_at.compiled(kernel, target)
    assert looked_at.spills(binary) == 0
    assert kernel.source.count("tl.dot(") == 2
    assert {"left", "right", "left1", "right1"} <= kernel.signature.keys()
    assert sum(binary.tensor.values()) >= 2


# -- order of tiles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("down", "across", "band"), [(3, 3, 1), (3, 2, 2), (1, 4, 8), (5, 1, 4), (4, 3, 8)])
def test_instances_compute_the_tiles_that_the_model_says(down: int, across: int, band: int) -> None:
    tiling = Tiling(16, 16, 16, 4, 2, band)
    left, right = Side(16 * down, 16), Side(16, 16 * across)
    product = Product(GemmProgram(left.operand, right.operand), left.matrix, right.matrix,
                      (16 * down, 16 * across, 16), "f32")  # fmt: skip
    kernel = kernel_of(product, tiling)
    assert kernel.grid == down * across
    out = torch.full((16 * down, 16 * across), torch.nan)
    given = {"left": left.guarded[0].tensor, "right": right.guarded[0].tensor, "product": out}
    for count in range(1, kernel.grid + 1):  # one instance more each time
        out.fill_(torch.nan)
        interpreted.run(kernel, given, count)
        done = {(row, column) for row in range(down) for column in range(across)
                if not out[16 * row, 16 * column].isnan()}  # fmt: skip
        assert done == {place(tile, down, across, band) for tile in range(count)}
    assert not out.isnan().any()


# -- the source -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "product"])
def test_offsets_that_32_bits_do_not_hold_are_computed_in_64(side: str) -> None:
    large, larger = 1 << 15, (1 << 16) + 16
    m, n, k = {"left": (larger, 16, large), "right": (16, large, larger), "product": (larger, large, 16)}[side]

    def source(m: int | None, n: int, k: int) -> str:
        tight = Matrix("bf16", (k, 1)), Matrix("bf16", (n, 1))
        gemm = GemmProgram(Operand(None, False), Operand(None, False))
        return print_gemm(Product(gemm, *tight, (m, n, k), "bf16"), TILING)

    assert "int64" in source(m, n, k)
    assert "int64" not in source(m // 4, n // 4, k // 4)
    assert "int64" in source(None, n // 4, k // 4)


def test_precision_of_float32_products_is_what_the_user_has_set() -> None:
    left, right = Side(M, K), Side(K, N)
    for precision, memory, expected in (("ieee", "f32", 'input_precision="ieee"'), ("tf32", "f32", '"tf32"')):
        product = Product(
            GemmProgram(left.operand, right.operand), left.matrix, right.matrix, (M, N, K), memory, precision
        )
        assert expected in print_gemm(product, TILING)
