"""Stochastic rounding to bfloat16 and float16 in a program, as :mod:`qgalore_compile.formats.rounding` defines it."""

from __future__ import annotations

import math

import torch

from qgalore_compile.formats import rounding
from qgalore_compile.kernels.ir.program import BlockProgram


def spell(program: BlockProgram, number: int, noise: int, dtype: torch.dtype) -> int:
    """f32 elements that ``dtype`` holds as they are, from f32 elements and 16 random bits (i32) of each."""
    emit, constant = program.emit, program.constant
    most = torch.finfo(dtype).max
    inside = emit("minimum", (emit("maximum", (number, constant(-most))), constant(most)))
    bits = emit("as_i32", (inside,))
    if dtype == torch.bfloat16:
        rounded = emit("as_f32", (emit("bitand", (emit("add", (bits, noise)), constant(rounding.CUT, "i32"))),))
        other = emit("round_bf16", (number,))
    else:
        power = emit("as_f32", (emit("bitand", (bits, constant(rounding.EXPONENT, "i32"))),))
        step = emit("mul", (emit("maximum", (power, constant(rounding.LEAST_NORMAL))), constant(rounding.STEP)))
        level = emit("div", (inside, step))
        floor = emit("floor", (level,))
        draw = emit("add", (emit("f32", (noise,)), constant(0.5)))
        up = emit("lt", (draw, emit("mul", (emit("sub", (level, floor)), constant(65536.0)))))
        rounded = emit("mul", (emit("add", (floor, emit("f32", (up,)))), step))
        other = number
    finite = emit("lt", (emit("abs", (number,)), constant(math.inf)))
    return emit("where", (finite, rounded, other))
