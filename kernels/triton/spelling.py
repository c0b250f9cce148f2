"""How Triton spells types and operations, and the functions of our own that kernels call."""

from __future__ import annotations

from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import TYPES

TRITON_TYPES = {kind: MEMORY[kind].triton for kind in TYPES}

SPELLING = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "tl.div_rn({0}, {1})", "neg": "{0} * -1",
    "abs": "tl.abs({0})", "sqrt": "tl.sqrt_rn({0})", "rsqrt": "tl.div_rn(1.0, tl.sqrt_rn({0}))",
    "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "log2": "tl.log2({0})",
    "log10": "tl.log2({0}) * 0.30102999566398120", "erf": "tl.erf({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})",
    "sigmoid": "tl.div_rn(1.0, 1.0 + tl.exp(-{0}))", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
    "trunc": "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))",
    "round": "_round({0})", "expm1": "_expm1({0})", "log1p": "_log1p({0})", "tanh": "_tanh({0})",
    "pow": "_pow({0}, {1})",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "eq": "{0} == {1}",
    "ne": "{0} != {1}", "and": "{0} & {1}", "or": "{0} | {1}", "not": "{0} == 0",
    "bitand": "{0} & {1}", "bitor": "{0} | {1}", "bitxor": "{0} ^ {1}", "shl": "{0} << {1}", "shr": "{0} >> {1}",
    "where": "tl.where({0}, {1}, {2})", "bool": "{0} != 0",
    **{kind: f"({{0}}).to({TRITON_TYPES[kind]})" for kind in ("f32", "f64", "i32", "i64")},
    "round_bf16": "({0}).to(tl.bfloat16).to(tl.float32)",
    "round_f16": "({0}).to(tl.float16).to(tl.float32)", "as_i32": "({0}).to(tl.int32, bitcast=True)",
    "as_f32": "({0}).to(tl.float32, bitcast=True)",
}  # fmt: skip
IN_F64 = {
    "div": "{0} / {1}", "sqrt": "tl.sqrt({0})", "rsqrt": "1.0 / tl.sqrt({0})", "expm1": "_expm1_f64({0})",
    "log1p": "_log1p_f64({0})", "pow": "_pow_f64({0}, {1})",
}  # fmt: skip
"""Where Triton has an operation to nearest for float32 alone, or a function of ours calls one."""

HELPERS = {
    "_least": "    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)",
    "_most": "    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)",
    "_sum": "    return a + b",
    # 2**23 pushes the fraction out of the significand, where the hardware rounds to even
    "_round": "    high = tl.where(a < 0, -8388608.0, 8388608.0)\n"
              "    return tl.where(tl.abs(a) < 8388608.0, (a + high) - high, a)",
    # Kahan's: what 1 + x or exp(x) lost to rounding cancels in the quotient
    "_log1p": "    u = 1.0 + a\n"
              "    return tl.where((u == 1.0) | (u == float('inf')), a, tl.log(u) * tl.div_rn(a, u - 1.0))",
    "_expm1": "    u = tl.exp(a)\n"
              "    small = (u - 1.0) * tl.div_rn(a, tl.log(u))\n"
              "    return tl.where(u == 1.0, a, tl.where(tl.abs(a) > 1.0, u - 1.0, small))",
    "_tanh": "    u = _expm1(2.0 * tl.minimum(tl.abs(a), 20.0, propagate_nan=tl.PropagateNan.ALL))\n"
             "    size = tl.div_rn(u, u + 2.0)\n"
             "    return tl.where(a < 0, -size, size)",
    "_pow": "    size = tl.exp2(b * tl.log2(tl.abs(a)))\n"
            "    size = tl.where((tl.abs(a) == 1.0) & (b == b), 1.0, size)\n"
            "    odd = (tl.floor(b) == b) & (tl.floor(b * 0.5) * 2.0 != b)\n"
            "    signed = tl.where(odd & ((a < 0) | (tl.div_rn(1.0, a) < 0)), size * -1.0, size)\n"
            "    root = (a < 0) & (a != -float('inf')) & (tl.floor(b) != b)\n"
            "    return tl.where((b == 0.0) | (a == 1.0), 1.0, tl.where(root, float('nan'), signed))",
    "_sign": "    # of a place in a group: a bit of murmur3's finalizer (formats/rotation.py)\n"
             "    h = a.to(tl.uint32) + 0x9E3779B9\n"
             "    h = (h ^ (h >> 16)) * 0x85EBCA6B\n"
             "    h = (h ^ (h >> 13)) * 0xC2B2AE35\n"
             "    return tl.where(((h ^ (h >> 16)) & 1) != 0, -1.0, 1.0)",
    "_philox": "    # Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3)\n"
               "    for _ in tl.static_range(10):\n"
               "        b0 = c0\n"
               "        b2 = c2\n"
               "        c0 = tl.umulhi(b2, 0xCD9E8D57) ^ c1 ^ k0\n"
               "        c2 = tl.umulhi(b0, 0xD2511F53) ^ c3 ^ k1\n"
               "        c1 = b2 * 0xCD9E8D57\n"
               "        c3 = b0 * 0xD2511F53\n"
               "        k0 += 0x9E3779B9\n"
               "        k1 += 0xBB67AE85\n"
               "    return c0, c1, c2, c3",
}  # fmt: skip
# a division of float64 is to nearest, and tl.div_rn takes none
HELPERS |= {f"{name}_f64": HELPERS[name].replace("tl.div_rn(", "_quotient(") for name in ("_expm1", "_log1p", "_pow")}
HELPERS["_quotient"] = "    return a / b"
PARAMETERS = {
    "_philox": "c0, c1, c2, c3, k0, k1",
    **dict.fromkeys(("_expm1", "_expm1_f64", "_log1p", "_log1p_f64", "_tanh", "_round", "_sign"), "a"),
}
NEEDS = {"tanh": ("_expm1", "_tanh"), "random_bits": ("_philox",), "group_min": ("_least",), "group_max": ("_most",),
          "group_sum": ("_sum",), "expm1": ("_expm1",), "log1p": ("_log1p",), "pow": ("_pow",),
          "round": ("_round",), "rotate": ("_sign",)}  # fmt: skip

SPREAD = {
    "tasks": {("row", "group"): "", ("row", "element"): "[:, None]", ("group", "element"): "[:, None]",
              ("column", "element"): ""},
    "part": {("row", "group"): "", ("row", "element"): "[:, None]", ("group", "element"): "[:, None]",
             ("column", "element"): "[None, :]"},
    "groups": {("row", "group"): "[:, None]", ("row", "element"): "[:, None, None]",
               ("group", "element"): "[:, :, None]", ("column", "element"): "[None, :, :]"},
    "free": {("row", "group"): "[:, None]", ("row", "element"): "[:, None]", ("group", "element"): "",
             ("column", "element"): "[None, :]"},
}  # fmt: skip
