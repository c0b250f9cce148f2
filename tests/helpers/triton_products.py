"""Operands and a write-back as the tests of Triton's products take them: exact numbers between guards."""

from __future__ import annotations

import torch
from kernels_support import evaluated, load, program
from torch import Tensor

from qgalore_compile import formats
from qgalore_compile.kernels.ir.gemm import VALUE, GemmProgram, Operand
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import BlockProgram, Space
from qgalore_compile.kernels.triton.gemm import Matrix, Product

SURROUNDINGS = 70


class Guarded:
    """A tensor of some strides between memory that belongs to nobody."""

    def __init__(self, value: Tensor, strides: tuple[int, ...] | None = None) -> None:
        strides = value.contiguous().stride() if strides is None else strides
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
        filling = torch.nan if value.is_floating_point() else 1 if value.dtype == torch.bool else 119
        self.memory = torch.full((extent + 2 * SURROUNDINGS,), filling, dtype=value.dtype)
        self.tensor = self.memory.as_strided(value.shape, strides, SURROUNDINGS)
        self.tensor.copy_(value)
        self.before = self.memory.clone()

    def assert_stays(self, *, written: bool) -> None:
        """All of the memory, or all but the tensor where that is ``written``."""
        now, before = self.memory.clone(), self.before.clone()
        for each in (now, before) if written else ():
            each.as_strided(self.tensor.shape, self.tensor.stride(), SURROUNDINGS).zero_()
        assert torch.equal(now.view(torch.uint8), before.view(torch.uint8))


def decoding(rows: int, columns: int, how: str, width: int, memory: str) -> BlockProgram:
    """INT8 or INT4 groups to floats."""
    codes = {"int8": "u8", "int4": "u4"}[how]
    made = program(
        Space(rows, columns, width), f"codes {codes} element in", "scale f32 group in", "offset f32 group in",
        f"{VALUE} {memory} element out",
    )  # fmt: skip
    value = made.emit("mul", (made.emit("f32", (load(made, "codes"),)), load(made, "scale")))
    made.store(VALUE, made.emit("add", (value, load(made, "offset"))))
    return made


class Side:
    """One operand (rows, columns): how it is stored, and the matrix that it stands for."""

    def __init__(
        self, rows: int, columns: int, how: str = "plain", *, transposed: bool = False, width: int = 8,
        memory: str = "f32", pitch: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        size = (columns, rows) if transposed else (rows, columns)
        self.matrix = None
        made = None
        if how == "plain":
            value = torch.randint(-4, 5, size).to(MEMORY[memory].dtype)
            self.guarded = [Guarded(value, pitch)]
            self.matrix = Matrix(memory, self.guarded[0].tensor.stride())  # type: ignore[arg-type]
        else:
            made = decoding(*size, how, width, memory)
            top = {"int8": 256, "int4": 16}[how]
            codes = torch.randint(0, top, size, dtype=torch.uint8)
            scale = 2.0 ** torch.randint(-1, 2, (size[0], made.space.groups))
            tensors = {
                "codes": formats.pack_int4(codes) if how == "int4" else codes, "scale": scale,
                "offset": -scale * (top // 2), VALUE: torch.empty(size, dtype=MEMORY[memory].dtype),
            }  # fmt: skip
            value = evaluated(made, tensors)[VALUE]
            self.guarded = [Guarded(tensors[name]) for name in ("codes", "scale", "offset")]
        self.operand = Operand(made, transposed)
        self.value = (value.t() if transposed else value).double()


def write_back(space: Space, product: str = "f32") -> BlockProgram:
    """An INT8 weight less lr · product, encoded anew with stochastic rounding: ``formats.quantize_int8`` by group."""
    made = program(
        space, f"product {product} element in", "codes u8 element inout", "scale f32 group inout",
        "offset f32 group inout", "lr f32 scalar in", "step i64 scalar in", numbers=("seed", "param"),
    )  # fmt: skip
    emit, constant = made.emit, made.constant
    old = emit("mul", (emit("f32", (load(made, "codes"),)), load(made, "scale")))
    old = emit("add", (old, load(made, "offset")))
    new = emit("sub", (old, emit("mul", (load(made, "lr"), load(made, "product")))))
    low, high = emit("group_min", (new,)), emit("group_max", (new,))
    scale = emit("div", (emit("sub", (high, low)), constant(255.0)))
    divisor = emit("where", (emit("gt", (scale, constant(0.0))), scale, constant(1.0)))
    level = emit("div", (emit("sub", (new, low)), divisor))
    floor = emit("floor", (level,))
    bits = emit("f32", (emit("random_bits", (load(made, "step"),), ("seed", "param")),))
    bar = emit("mul", (emit("sub", (level, floor)), constant(65536.0)))
    up = emit("f32", (emit("lt", (emit("add", (bits, constant(0.5))), bar)),))
    code = emit("minimum", (emit("maximum", (emit("add", (floor, up)), constant(0.0))), constant(255.0)))
    made.store("codes", emit("i32", (code,)))
    made.store("scale", scale)
    made.store("offset", low)
    return made


def up(m: int, n: int, rank: int, group: int, memory: str = "bf16") -> Product:
    """A projected layer's update: P is INT4, the weight INT8."""
    group, plain_matrix = min(group, n), Operand(None, False)
    epilogue = write_back(Space(m, n, group), memory)
    if m >= n:
        right = Operand(decoding(rank, n, "int4", group, memory), False)
        return Product(GemmProgram(plain_matrix, right, epilogue), Matrix(memory, (rank, 1)), None,
                       (m, n, rank), memory)  # fmt: skip
    left = Operand(decoding(m, rank, "int4", min(group, rank), memory), False)
    return Product(GemmProgram(left, plain_matrix, epilogue), None, Matrix(memory, (n, 1)), (m, n, rank), memory)
