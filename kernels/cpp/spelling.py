"""How C++ spells types and operations, and what stands above every kernel."""

from __future__ import annotations

from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import TYPES

CPP_TYPES = {kind: MEMORY[kind].cpp for kind in TYPES}

SPELLING = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}",
    "minimum": "{0} != {0} ? {0} : ({0} < {1} ? {0} : {1})", "maximum": "{0} != {0} ? {0} : ({0} > {1} ? {0} : {1})",
    # a number, not NaN, is on the right: a comparison fewer, and GCC 12 vectorises two of these in a row
    "minimum constant": "!({0} >= {1}) ? {0} : {1}", "maximum constant": "!({0} <= {1}) ? {0} : {1}",
    # GCC 12 narrows a selection by a condition from outside the loop, where bytes or halves of what is chosen are
    # stored, into one that it cannot vectorise
    "where invariant": "({1} & -static_cast<int32_t>({0})) | ({2} & (static_cast<int32_t>({0}) - 1))",
    "where invariant bf16": "float_of((bits_of({1}) & -static_cast<int32_t>({0})) | "
                            "(bits_of({2}) & (static_cast<int32_t>({0}) - 1)))",
    "f32 of bool": "{0} ? 1.0f : 0.0f",
    "abs": "std::abs({0})", "sign": "({0} > 0) - ({0} < 0)", "sqrt": "std::sqrt({0})",
    "rsqrt": "1.0f / std::sqrt({0})", "pow": "std::pow({0}, {1})", "sigmoid": "1.0f / (1.0f + std::exp(-{0}))",
    "round": "std::rint({0})", "exp f32": "exp_f32({0})",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "eq": "{0} == {1}",
    "ne": "{0} != {1}", "and": "{0} && {1}", "or": "{0} || {1}", "not": "!{0}",
    "bitand": "{0} & {1}", "bitor": "{0} | {1}", "bitxor": "{0} ^ {1}", "shl": "{0} << {1}", "shr": "{0} >> {1}",
    "where": "{0} ? {1} : {2}", "bool": "{0} != 0",
    **{kind: f"static_cast<{CPP_TYPES[kind]}>({{0}})" for kind in ("f32", "f64", "i32", "i64")},
    "round_bf16": "load_bf16(store_bf16({0}))", "round_bf16 exact": "{0}",
    "round_f16": "static_cast<float>(static_cast<c10::Half>({0}))", "as_i32": "bits_of({0})", "as_f32": "float_of({0})",
    **{name: f"std::{name}({{0}})" for name in (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "tanh", "erf", "sin", "cos", "floor", "ceil", "trunc",
    )},
}  # fmt: skip
# Signed integers that overflow are undefined in C++, and wrap around in PyTorch.
for _kind, _unsigned in (("i32", "uint32_t"), ("i64", "uint64_t")):
    for _name, _sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
        SPELLING[f"{_name} {_kind}"] = (
            f"static_cast<{CPP_TYPES[_kind]}>(static_cast<{_unsigned}>({{0}}) {_sign} static_cast<{_unsigned}>({{1}}))"
        )
    SPELLING[f"neg {_kind}"] = f"static_cast<{CPP_TYPES[_kind]}>(-static_cast<{_unsigned}>({{0}}))"

PRELUDE = """\
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
{more}
static inline float load_bf16(uint16_t bits) {{
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}}

// to nearest, ties to even; NaN stays NaN
static inline uint16_t store_bf16(float value) {{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}}

static inline int32_t bits_of(float value) {{
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}}

static inline float float_of(int32_t bits) {{
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}}
"""


def literal(value: float, kind: str) -> str:
    """A float of a program's type."""
    if value != value:
        return f"std::numeric_limits<{CPP_TYPES[kind]}>::quiet_NaN()"
    if value in (float("inf"), float("-inf")):
        return f"{'-' if value < 0 else ''}std::numeric_limits<{CPP_TYPES[kind]}>::infinity()"
    return f"static_cast<{CPP_TYPES[kind]}>({float(value).hex()})"


def integer(value: int, kind: str) -> str:
    """An integer of a program's type."""
    if value == -(1 << 63):  # a literal has no sign of its own
        return "std::numeric_limits<int64_t>::min()"
    return f"{CPP_TYPES[kind]}({value})"
