"""One kernel for all calls that agree, its arguments in order, and what graphs are told to make kernels for."""

from __future__ import annotations

import inspect
import re
from typing import Any
from unittest import mock

import pytest
import torch
from kernels_support import evaluated, filled, load, program
from torch import Tensor
from torch._inductor.utils import fresh_cache
from triton_products import Side, decoding, write_back

pytest.importorskip("triton")

import interpreted

from qgalore_compile import formats, rng
from qgalore_compile.kernels.ir.gemm import GemmProgram, Operand
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton.gemm import Matrix
from qgalore_compile.kernels.triton.kernels import (
    bind,
    called,
    is_made_for,
    kernel_of,
    made_for,
    matrix,
    of_call,
    region_of,
    target_of,
)
from qgalore_compile.kernels.triton.targets import Target
from qgalore_compile.kernels.triton.tiling import NoTilingError

pytestmark = pytest.mark.triton

SM_80, SM_90 = Target.named("sm_80"), Target.named("sm_90")
M, N, RANK, GROUP = 19, 40, 6, 8


def region() -> BlockProgram:
    """Buffers of every access, in no order, and numbers."""
    made = program(
        Space(5, 24, 8), "r f32 element in", "m bf16 element inout", "out u8 element out", "step i64 scalar in",
        "s f32 group inout", numbers=("seed", "param"),
    )  # fmt: skip
    value = made.emit("add", (load(made, "r"), load(made, "m")))
    bits = made.emit("random_bits", (load(made, "step"),), ("seed", "param"))
    made.store("m", value)
    made.store("s", made.emit("mul", (load(made, "s"), made.emit("group_max", (value,)))))
    made.store("out", made.emit("bitand", (bits, made.constant(255, "i32"))))
    return made


def product(memory: str = "f32") -> GemmProgram:
    """An update on the right side: N as it is, P decoded, the weight written back."""
    right = Operand(decoding(RANK, N, "int4", GROUP, memory), False)
    return GemmProgram(Operand(None, False), right, write_back(Space(M, N, GROUP), memory))


# -- signatures -------------------------------------------------------------------------------------------------------


def test_a_regions_arguments_are_its_buffers_then_its_numbers() -> None:
    kernel = region_of(str(region()))
    assert kernel.signature == {
        "r": "*fp32", "m": "*bf16", "out": "*u8", "step": "*i64", "s": "*fp32", "seed": "i64", "param": "*i32",
    }  # fmt: skip
    assert kernel.params == {"param"}
    assert kernel.instances() == kernel.grid == 1


@pytest.mark.parametrize(
    ("memory", "pointer"),
    [("f32", "*fp32"), ("bf16", "*bf16"), ("f16", "*fp16"), ("u8", "*u8"), ("i8", "*i8"), ("i16", "*i16"),
     ("i32", "*i32"), ("i64", "*i64"), ("bool", "*i1")],
)  # fmt: skip
def test_a_pointer_has_the_type_of_its_buffer(memory: str, pointer: str) -> None:
    made = program(Space(2, 8, 8), f"x {memory} element in", f"y {memory} element out")
    made.store("y", load(made, "x"))
    assert region_of(str(made)).signature == {"x": pointer, "y": pointer}


def test_packed_nibbles_are_bytes() -> None:
    made = program(Space(2, 8, 8), "x u4 element in", "y u8 element out")
    made.store("y", load(made, "x"))
    assert region_of(str(made)).signature == {"x": "*u8", "y": "*u8"}


def test_a_products_arguments_are_its_operands_then_its_epilogues() -> None:
    kernel = kernel_of(str(product("bf16")), Matrix("bf16", (RANK, 1)), None, (M, N, RANK), "bf16", "ieee", SM_80)
    assert kernel.signature == {
        "left": "*bf16", "r_codes": "*u8", "r_scale": "*fp32", "r_offset": "*fp32", "e_codes": "*u8",
        "e_scale": "*fp32", "e_offset": "*fp32", "e_lr": "*fp32", "e_step": "*i64", "e_seed": "i64", "e_param": "*i32",
    }  # fmt: skip
    assert kernel.params == {"e_param"}


def test_a_product_that_is_read_is_an_argument_and_so_are_unknown_sizes() -> None:
    text = str(GemmProgram(Operand(None, True), Operand(None, False)))
    kernel = kernel_of(text, Matrix("f16", (1, 8)), Matrix("f16", (N, 1)), (None, N, 8), "f16", "ieee", SM_80)
    assert kernel.signature == {"left": "*fp16", "right": "*fp16", "product": "*fp16", "m": "i32"}
    assert kernel.grid is None
    down, across = kernel.tile
    assert kernel.instances(down + 1, N) == 2 * -(-N // across)


# -- caching ----------------------------------------------------------------------------------------------------------


def test_the_source_of_a_function_is_in_the_cache_of_the_moment() -> None:
    kernel = region_of(str(region()))
    for _ in range(2):  # Inductor reads it when it compiles a call, also after a cache has been cleared
        with fresh_cache():
            assert f"def {kernel.name}" in inspect.getsource(triton_kernels.load(kernel).fn)


def test_equal_texts_are_one_kernel_and_one_function() -> None:
    one, other = (region_of(str(region())) for _ in range(2))
    assert one is other
    assert triton_kernels.tuned(one) is triton_kernels.tuned(other)
    made = region()
    made.numbers = ["seed", "position"]
    made.instructions = [each._replace(names=("seed", "position")) if each.operation == "random_bits" else each
                         for each in made.instructions]  # fmt: skip
    assert region_of(str(made)) is not one


def test_a_products_kernel_follows_from_its_text_its_memory_and_its_target() -> None:
    text = str(GemmProgram(Operand(None, False), Operand(None, False)))

    def kernel(target: Target = SM_80, strides: tuple[int, int] = (8, 1), precision: str = "ieee") -> Any:
        return kernel_of(text, Matrix("f32", strides), Matrix("f32", (N, 1)), (M, N, 8), "f32", precision, target)

    assert kernel() is kernel()
    assert len({kernel(), kernel(SM_90), kernel(strides=(1, M)), kernel(precision="tf32")}) == 4


def test_parameters_share_a_kernel_and_draw_other_bits() -> None:
    made = region()
    kernel = region_of(str(made))
    tensors = filled(made, step=torch.tensor(3))
    found = []
    for param in (0, 7):
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        interpreted.launch(kernel, copies, {"seed": 2**40, "param": param})
        found.append(copies["out"])
        assert torch.equal(copies["out"].int(), rng.random_bits((5, 24), seed=2**40, step=3, param=param) & 255)
    assert not torch.equal(*found)


# -- what is known of a call ------------------------------------------------------------------------------------------


def test_sizes_strides_and_type_of_a_call_are_read_from_its_tensors() -> None:
    gemm = GemmProgram(Operand(None, True), Operand(None, False))
    left, right = torch.empty(8, M, dtype=torch.bfloat16), torch.empty(N, 8, dtype=torch.bfloat16).t()
    kernel, sizes = of_call(gemm, str(gemm), [left, right], SM_80, "ieee")
    assert sizes == (M, N)
    made = kernel.work
    assert (made.left, made.right) == (Matrix("bf16", (M, 1)), Matrix("bf16", (1, 8)))
    assert (made.sizes, made.memory) == ((M, N, 8), "bf16")
    assert matrix(right) == Matrix("bf16", (1, 8))


def test_sizes_of_a_decoded_operand_are_its_programs() -> None:
    gemm = GemmProgram(Operand(decoding(RANK, M, "int4", GROUP, "bf16"), True), Operand(None, False))
    stored = formats.quantize_int4(torch.randn(RANK, M), GROUP)[:3]
    kernel, sizes = of_call(gemm, str(gemm), [*stored, torch.empty(RANK, N).bfloat16()], SM_80, "ieee")
    assert sizes == (M, N)
    assert kernel.work.left is None
    assert kernel.work.sizes == (M, N, RANK)


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_precision_is_that_of_pytorchs_own_products(setting: str, expected: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert triton_kernels.precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


# -- binding ----------------------------------------------------------------------------------------------------------


def test_a_regions_tensors_are_bound_written_ones_first() -> None:
    tensors, numbers, written = bind(region(), ["M", "OUT", "S"], ["R", "STEP"], [11, 2])
    assert tensors == {"m": "M", "out": "OUT", "s": "S", "r": "R", "step": "STEP"}
    assert numbers == {"seed": 11, "param": 2}
    assert written == ["m", "out", "s"]


def test_a_products_tensors_are_bound_by_part() -> None:
    tensors, numbers, written = bind(
        product(), ["W", "WS", "WO"], ["L", "P", "PS", "PO", "LR", "STEP"], [11, 2]
    )  # fmt: skip
    assert tensors == {
        "left": "L", "r_codes": "P", "r_scale": "PS", "r_offset": "PO", "e_codes": "W", "e_scale": "WS",
        "e_offset": "WO", "e_lr": "LR", "e_step": "STEP",
    }  # fmt: skip
    assert numbers == {"e_seed": 11, "e_param": 2}
    assert written == ["e_codes", "e_scale", "e_offset"]


def test_a_product_without_an_epilogue_writes_what_the_caller_makes() -> None:
    gemm = GemmProgram(Operand(decoding(RANK, M, "int8", GROUP, "f32"), True), Operand(None, False))
    assert bind(gemm, [], ["C", "S", "O", "R"], []) == (
        {"l_codes": "C", "l_scale": "S", "l_offset": "O", "right": "R"}, {}, []
    )  # fmt: skip


# -- running, as the operators do -------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu() -> Any:
    function = mock.patch.object(triton_kernels, "tuned", interpreted.interpreted)
    with function, interpreted.interpreter_put_right(), made_for(SM_80):
        yield


def test_a_region_runs_on_the_operators_tensors(on_cpu: None) -> None:
    made = region()
    tensors = filled(made, step=torch.tensor(3))
    expected = evaluated(made, tensors, {"seed": -1, "param": 2})
    triton_kernels.run_region(
        str(made), [tensors["m"], tensors["out"], tensors["s"]], [tensors["r"], tensors["step"]], [-1, 2]
    )
    for name in ("m", "out", "s"):
        assert torch.equal(tensors[name], expected[name]), name


def test_a_product_with_an_epilogue_runs_on_the_operators_tensors(on_cpu: None) -> None:
    left, right = Side(M, RANK), Side(RANK, N, "int4", width=GROUP)
    stored = list(formats.quantize_int8(torch.randn(M, N), GROUP)[:3])
    lr, step = torch.tensor(0.1), torch.tensor(5)
    weight = formats.dequantize_int8(*stored, GROUP) - lr * (left.value @ right.value).float()
    noise = rng.random_bits((M, N), seed=3, step=5, param=4)
    expected = formats.quantize_int8(weight, GROUP, noise=noise)[:3]
    read = [each.tensor for each in (*left.guarded, *right.guarded)]
    triton_kernels.run_product(str(product()), stored, [*read, lr, step], [3, 4])
    for one, other in zip(stored, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("decoded", ["left", "right"])
def test_a_product_that_is_read_is_returned(decoded: str, on_cpu: None) -> None:
    left = Side(M, RANK, *(["int8"] if decoded == "left" else []), memory="bf16")
    right = Side(RANK, N, *(["int8"] if decoded == "right" else []), memory="bf16")
    gemm = GemmProgram(left.operand, right.operand)
    found: Tensor = triton_kernels.product(str(gemm), [each.tensor for each in (*left.guarded, *right.guarded)])
    assert torch.equal(found, (left.value @ right.value).bfloat16())


# -- targets ----------------------------------------------------------------------------------------------------------


def test_kernels_are_made_for_a_target_and_counted_only_inside() -> None:
    cpu, one, other = torch.device("cpu"), region_of(str(region())), Space(1, 8, 8)
    made = program(other, "x f32 element in", "y f32 element out")
    made.store("y", load(made, "x"))
    assert not is_made_for()
    with made_for(SM_90) as kernels:
        assert is_made_for()
        assert target_of(cpu) is SM_90
        called(one)
        called(region_of(str(made)))
        assert called(one) is triton_kernels.tuned(one)
    assert list(kernels.values()) == [2, 1]
    called(one)
    assert kernels[one] == 2
    assert not is_made_for()


def test_an_error_inside_leaves_nothing_behind() -> None:
    with pytest.raises(NoTilingError), made_for(SM_90):
        raise NoTilingError("a tile that does not fit")
    assert not is_made_for()


def test_targets_nest() -> None:
    cpu = torch.device("cpu")
    with made_for(SM_90) as outer:
        with made_for(SM_80) as inner:
            assert target_of(cpu) is SM_80
            called(region_of(str(region())))
        assert target_of(cpu) is SM_90
    assert (len(outer), len(inner)) == (0, 1)


def test_places_of_a_matrix_of_two_to_the_31_elements_and_more_are_counted_in_64_bits() -> None:
    def blocks(columns: int) -> str:
        made = program(Space(1, columns, 256), "x u8 element in", "y u8 element out")
        made.store("y", load(made, "x"))
        (line,) = re.findall(r"^ +at = (.*)$", region_of(str(made)).source, re.MULTILINE)
        return line

    assert blocks((1 << 31) - 256).startswith("tl.program_id(0) * 8 +")
    assert blocks(1 << 31).startswith("tl.program_id(0).to(tl.int64) * 8 +")
