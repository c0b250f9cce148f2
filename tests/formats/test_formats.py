"""INT8 and packed INT4 groups, the published formula and dynamic 8-bit blocks, against NumPy and bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from qgalore_compile import formats
from qgalore_compile.rng import random_bits

Array = NDArray[Any]

EPS = 2.0**-23  # spacing of float32 numbers at 1
DENORMAL = 2.0**-149  # the smallest float32 number: the precision of everything below 1e-38

QUANTISERS: dict[int, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    8: (formats.quantize_int8, formats.dequantize_int8),
    4: (formats.quantize_int4, formats.dequantize_int4),
}

# -- what the properties draw -----------------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 3, 6, 7, 42, 123, 257, 300]) | st.integers(1, 300)
COLUMNS = st.sampled_from([1, 2, 3, 6, 42, 123, 255, 256, 257, 431, 512, 700]) | st.integers(1, 700)
SHAPES = (
    st.tuples(SIZES, COLUMNS)
    | st.tuples(COLUMNS)
    | st.tuples(st.integers(1, 5), st.integers(1, 7), COLUMNS)
    | st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), COLUMNS)
)
GROUP_SIZES = st.sampled_from([1, 2, 3, 5, 16, 64, 100, 128, 256, 256, 257, 1024])
MAGNITUDES = {
    torch.float32: [1.0, 1.0, 0.02, 1e30, 1e-30, 1e-38, 1e-42],
    torch.bfloat16: [1.0, 0.02, 1e30, 1e-38],
    torch.float16: [1.0, 0.02, 1e3, 1e-6],
}
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "uniform": torch.sigmoid,
    "far from zero": lambda x: 3 + x / 10,
    "outliers": lambda x: torch.where(x > 2, 8 * x, x),
    "constant rows": lambda x: x[..., :1].expand(x.shape).clone(),
    "few levels": torch.round,
    "zero": torch.zeros_like,
}


@st.composite
def tensors(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = tuple(MAGNITUDES)) -> Tensor:
    """Values of one kind at one magnitude.  Hypothesis draws what matters, a seeded generator the many numbers."""
    shape, dtype, kind = draw(SHAPES), draw(st.sampled_from(dtypes)), draw(st.sampled_from(list(KINDS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = KINDS[kind](torch.randn(shape, generator=generator))
    return (x * draw(st.sampled_from(MAGNITUDES[dtype]))).to(dtype)


# -- the oracle: groups of rows in NumPy ------------------------------------------------------------------------------


class Affine(NamedTuple):
    """``level`` (x - low) / scale, an element each; a group each: ``scale``, ``low``, ``high``, ``largest`` size."""

    level: Array
    scale: Array
    low: Array
    high: Array
    largest: Array


def starts(columns: int, group_size: int) -> Array:
    return np.arange(0, columns, group_size)


def spread(per_group: Array, columns: int, group_size: int) -> Array:
    """What belongs to a group, for each of its elements."""
    return np.repeat(per_group, np.diff([*starts(columns, group_size), columns]), axis=-1)


def affine(x: Tensor, group_size: int, bits: int, dtype: type = np.float64) -> Affine:
    """Min-max groups, in float64 or, to reproduce every rounding, in float32."""
    values = x.to(torch.float32).numpy().astype(dtype)
    columns = x.shape[-1]
    low = np.minimum.reduceat(values, starts(columns, group_size), axis=-1)
    high = np.maximum.reduceat(values, starts(columns, group_size), axis=-1)
    scale = (high - low) / dtype(2**bits - 1)
    divisor = np.where(scale > 0, scale, dtype(1))
    level = (values - spread(low, columns, group_size)) / spread(divisor, columns, group_size)
    return Affine(level, scale, low, high, np.maximum(np.abs(low), np.abs(high)))


def codes_of(q: Any) -> Array:
    """One code a column, whichever the format."""
    codes = q.codes if isinstance(q, formats.Int8Groups) else formats.unpack_int4(q.packed, q.columns)
    return codes.numpy()  # type: ignore[no-any-return]


# -- INT8 and INT4 groups ---------------------------------------------------------------------------------------------

BITS = pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])


@BITS
@given(x=tensors(), group_size=GROUP_SIZES, seed=st.none() | st.integers(0, 99))
def test_nearest_is_half_a_step_away_at_most_and_stochastic_less_than_one(
    bits: int, x: Tensor, group_size: int, seed: int | None
) -> None:
    quantize, dequantize = QUANTISERS[bits]
    noise = None if seed is None else random_bits(x.shape, seed=seed, step=0, param=0)
    q = quantize(x, group_size, noise=noise)
    back = dequantize(*q)
    oracle, n = affine(x, group_size, bits), x.shape[-1]
    assert (back.shape, back.dtype) == (x.shape, torch.float32)
    assert q.scale.shape == q.offset.shape == oracle.low.shape
    error = np.abs(back.numpy().astype(np.float64) - x.double().numpy())
    bound = oracle.scale * (0.5 if noise is None else 1) * (1 + 1e-5)
    # what float32 adds: the roundings of codes * scale + offset, and of a denormal scale
    bound += 2 * EPS * oracle.largest + 2**bits * DENORMAL
    assert (error <= spread(bound, n, group_size)).all()


@BITS
@given(x=tensors(), group_size=GROUP_SIZES)
def test_codes_differ_from_float64_only_at_near_ties(bits: int, x: Tensor, group_size: int) -> None:
    codes = codes_of(QUANTISERS[bits][0](x, group_size)).astype(np.int64)
    oracle, n = affine(x, group_size, bits), x.shape[-1]
    fine = spread(oracle.scale > 2**20 * DENORMAL, n, group_size)  # a scale that float32 can hold
    away, from_tie = codes - np.rint(oracle.level), np.abs(oracle.level % 1 - 0.5)
    assert np.abs(away[fine]).max(initial=0) <= 1
    assert from_tie[fine & (away != 0)].max(initial=0) < 1e-4


@BITS
@given(x=tensors(), group_size=GROUP_SIZES, seed=st.none() | st.integers(0, 99))
def test_codes_equal_the_float32_rule_bit_by_bit(bits: int, x: Tensor, group_size: int, seed: int | None) -> None:
    """Nearest: ties to even.  Stochastic: up if and only if k + 1/2 < 65536 f, with k the 16-bit draw."""
    noise = None if seed is None else random_bits(x.shape, seed=seed, step=1, param=2)
    q = QUANTISERS[bits][0](x, group_size, noise=noise)
    rule = affine(x, group_size, bits, np.float32)
    if noise is None:
        expected = np.rint(rule.level)
    else:
        floor = np.floor(rule.level)
        k = noise.numpy().astype(np.float32)
        expected = floor + (k + np.float32(0.5) < np.float32(65536) * (rule.level - floor))
    np.testing.assert_array_equal(codes_of(q), np.clip(expected, 0, 2**bits - 1))
    np.testing.assert_array_equal(q.scale.numpy(), rule.scale)
    np.testing.assert_array_equal(q.offset.numpy(), rule.low)


@BITS
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@given(x=tensors(), group_size=GROUP_SIZES)
def test_minimum_and_maximum_get_the_end_codes(bits: int, stochastic: bool, x: Tensor, group_size: int) -> None:
    noise = random_bits(x.shape, seed=3, step=1, param=0) if stochastic else None
    codes = codes_of(QUANTISERS[bits][0](x, group_size, noise=noise))
    oracle, n, top = affine(x, group_size, bits), x.shape[-1], 2**bits - 1
    assert (np.minimum.reduceat(codes, starts(n, group_size), axis=-1) == 0).all()
    highest, wide = np.maximum.reduceat(codes, starts(n, group_size), axis=-1), oracle.high - oracle.low > 1e-35
    # a draw may leave the maximum one below where (max - min) / s, rounded, falls short of the end
    assert (highest[wide] >= top - stochastic).all()
    assert (codes <= top).all()


@BITS
@given(x=tensors(dtypes=(torch.float32,)), group_size=GROUP_SIZES)
def test_quantising_again_changes_no_code(bits: int, x: Tensor, group_size: int) -> None:
    quantize, dequantize = QUANTISERS[bits]
    once = quantize(x, group_size)
    twice = quantize(dequantize(*once), group_size)
    oracle, n = affine(x, group_size, bits), x.shape[-1]
    # where one step is many spacings of float32 at the group's values
    resolved = spread(oracle.scale > 32 * EPS * oracle.largest + 2**20 * DENORMAL, n, group_size)
    np.testing.assert_array_equal(codes_of(once)[resolved], codes_of(twice)[resolved])


@BITS
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7e-5, 1e30, -1e30, 1e-38, 1e-45])
def test_constant_groups_are_exact(bits: int, value: float) -> None:
    quantize, dequantize = QUANTISERS[bits]
    x = torch.full((3, 700), value)
    for noise in (None, random_bits(x.shape, seed=0, step=0, param=0)):
        torch.testing.assert_close(dequantize(*quantize(x, noise=noise)), x, rtol=0, atol=0)


@BITS
def test_short_last_group_is_quantised_like_a_full_one(bits: int) -> None:
    quantize, dequantize = QUANTISERS[bits]
    x = torch.randn(5, 256 + 42)
    q, tail = quantize(x, 256), quantize(x[:, 256:], 256)
    np.testing.assert_array_equal(codes_of(q)[:, 256:], codes_of(tail))
    torch.testing.assert_close(q.scale[:, 1:], tail.scale, rtol=0, atol=0)
    torch.testing.assert_close(dequantize(*q)[:, 256:], dequantize(*tail), rtol=0, atol=0)


@BITS
def test_groups_do_not_see_each_other(bits: int) -> None:
    """A huge, or non-finite, value spoils its own group and leaves it visibly spoilt."""
    quantize, dequantize = QUANTISERS[bits]
    x = torch.randn(4, 96)
    clean = dequantize(*quantize(x, 32))
    for bad in (1e30, float("nan"), float("inf"), -float("inf")):
        x[1, 40] = bad
        back = dequantize(*quantize(x, 32))
        assert not (back[1, 40] - clean[1, 40]).abs() < 1e3
        back[1, 32:64] = clean[1, 32:64]
        torch.testing.assert_close(back, clean, rtol=0, atol=0)


@BITS
def test_a_non_contiguous_tensor_gets_the_codes_of_its_copy(bits: int) -> None:
    quantize, _ = QUANTISERS[bits]
    base = torch.randn(42, 123)
    for x in (base.t(), base[:, ::2], base[:1].expand(7, -1)):
        np.testing.assert_array_equal(codes_of(quantize(x, 16)), codes_of(quantize(x.contiguous(), 16)))


@BITS
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_tensors_come_back_empty(bits: int, shape: tuple[int, ...]) -> None:
    quantize, dequantize = QUANTISERS[bits]
    assert dequantize(*quantize(torch.zeros(shape))).shape == shape


@BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantising_to_another_dtype_rounds_the_float32_values(bits: int, dtype: torch.dtype) -> None:
    quantize, dequantize = QUANTISERS[bits]
    q = quantize(torch.randn(3, 42))
    torch.testing.assert_close(dequantize(*q, dtype=dtype), dequantize(*q).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("quantize", [formats.quantize_int8, formats.quantize_int4])
def test_what_cannot_be_grouped_is_an_error_with_words(quantize: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"int64.*\.float\(\)"):
        quantize(torch.arange(3))
    with pytest.raises(ValueError, match=r"0-d.*reshape\(1\)"):
        quantize(torch.tensor(1.0))
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        quantize(torch.ones(3), 0)
    with pytest.raises(TypeError, match="int32"):
        formats.quantize_dynamic8(torch.arange(3, dtype=torch.int32), signed=True)


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_int4_is_packed_planar(shape: tuple[int, ...], seed: int) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed, n, half = formats.pack_int4(codes), shape[-1], (shape[-1] + 1) // 2
    assert packed.shape == (*shape[:-1], half)
    rows, expected = codes.numpy().reshape(-1, n), np.zeros((codes.numel() // n, half), dtype=np.uint8)
    for column in range(n):  # low nibbles: the first half of the row; high nibbles: the second
        expected[:, column % half] |= rows[:, column] << (4 if column >= half else 0)
    np.testing.assert_array_equal(packed.numpy().reshape(-1, half), expected)
    assert torch.equal(formats.unpack_int4(packed, n), codes)


# -- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [0, 100, 200, 254], ids=lambda k: f"at code {k}")
def test_all_65536_draws_together_are_unbiased(whole: int) -> None:
    """Each fraction j / 65536 goes up in exactly j of the 65536 draws."""
    fractions = torch.tensor([0, 1, 2, 999, 32767, 32768, 40000, 65535], dtype=torch.float32) / 65536
    level = (whole + fractions).repeat_interleave(65536)  # exact: 8 + 16 bits
    noise = torch.arange(65536, dtype=torch.int32).repeat(8)
    x = torch.stack([level, torch.zeros_like(level), torch.full_like(level, 255.0)], dim=-1)  # scale 1, offset 0
    codes = formats.quantize_int8(x, noise=noise[:, None].expand(-1, 3)).codes[:, 0]
    ups = (codes.reshape(8, 65536).long() - whole).sum(-1)
    assert ups.tolist() == (fractions * 65536).tolist()


@BITS
def test_the_mean_over_many_draws_is_the_value_itself(bits: int) -> None:
    top, rows = 2**bits - 1, 20000
    level = torch.arange(top, dtype=torch.float64) + torch.linspace(0.02, 0.98, top, dtype=torch.float64)
    x = torch.cat([level, torch.tensor([0.0, top])]).float().expand(rows, -1)  # scale 1, offset 0
    standard_error = torch.sqrt(level % 1 * (1 - level % 1) / rows)
    for noise in (random_bits(x.shape, seed=11, step=0, param=0), None):
        codes = codes_of(QUANTISERS[bits][0](x, 512, noise=noise))[:, :top]
        unbiased = (torch.from_numpy(codes.mean(0, dtype=np.float64)) - level).abs() < 5 * standard_error + 1e-5
        assert unbiased.all() if noise is not None else unbiased.sum() < 0.1 * top


# -- the published formula --------------------------------------------------------------------------------------------


def published(x: Array, group_size: int, bits: int) -> tuple[Array, Array, Array, Array]:
    """Codes, scales, zero points and values of q_galore_torch's _quantize_tensor, line by line."""
    w = x.reshape(-1, group_size)
    max_int = np.float32(2**bits - 1)
    scales = np.maximum(w.max(1, keepdims=True) - w.min(1, keepdims=True), np.float32(1e-5)) / max_int
    zeros = np.clip(-np.round(w.min(1, keepdims=True) / scales), 0, max_int)
    codes = np.clip(np.round(w / scales) + zeros, 0, max_int)
    return codes.reshape(x.shape), scales, zeros, ((codes - zeros) * scales).reshape(x.shape)


@BITS
@given(rows=SIZES, groups=st.integers(1, 5), group_size=st.sampled_from([1, 3, 16, 100, 256]), x=st.data())
def test_official_equals_the_published_formula(bits: int, rows: int, groups: int, group_size: int, x: Any) -> None:
    generator = torch.Generator().manual_seed(x.draw(st.integers(0, 99)))
    shift, magnitude = x.draw(st.sampled_from([0.0, 0.0, 3.0, -3.0])), x.draw(st.sampled_from([1.0, 0.02, 1e-7, 1e30]))
    value = (torch.randn(rows, groups * group_size, generator=generator) + shift) * magnitude
    q = formats.quantize_official(value, group_size, bits=bits)
    codes, scales, zeros, values = published(value.numpy(), group_size, bits)
    np.testing.assert_array_equal(q.codes.numpy(), codes)
    np.testing.assert_array_equal(q.scale.numpy().reshape(-1, 1), scales)
    np.testing.assert_array_equal(q.zero.numpy().reshape(-1, 1), zeros)
    np.testing.assert_array_equal(formats.dequantize_official(*q).numpy(), values)


@BITS
@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_a_group_far_from_zero_saturates_in_the_published_formula_and_not_in_ours(bits: int, shift: float) -> None:
    x = torch.linspace(-0.5, 0.5, 256)[None] + shift
    quantize, dequantize = QUANTISERS[bits]
    official = formats.dequantize_official(*formats.quantize_official(x, bits=bits))
    assert (official - x).abs().min() > 3  # a range of 1 kept as if it began or ended at zero
    assert (dequantize(*quantize(x)) - x).abs().max() < 0.51 / (2**bits - 1)


# -- dynamic 8-bit blocks ---------------------------------------------------------------------------------------------

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def bitsandbytes_map(signed: bool) -> Array:
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.create_dynamic_map(signed, max_exponent_bits=7, total_bits=8).numpy().astype(np.float64)  # type: ignore[no-any-return]


def unit_values(x: Tensor) -> tuple[Array, Array]:
    """Elements divided by the largest of their block of 256, in float64; and that largest, a block each."""
    flat = np.abs(x.double().numpy()).reshape(-1)
    absmax = np.maximum.reduceat(flat, np.arange(0, flat.size, 256))
    divisor = np.repeat(np.where(absmax > 0, absmax, 1), 256)[: flat.size]
    return x.double().numpy().reshape(-1) / divisor, absmax


@SIGNED
def test_dynamic_map_is_that_of_bitsandbytes(signed: bool) -> None:
    ours = formats.dynamic_map(signed).numpy()
    np.testing.assert_allclose(ours, bitsandbytes_map(signed), rtol=1e-6, atol=0)
    assert (np.diff(ours) > 0).all()


@SIGNED
@given(x=tensors(), moment=st.booleans())
def test_dynamic_code_is_the_nearest_entry_of_the_map(signed: bool, x: Tensor, moment: bool) -> None:
    if moment:  # many decades inside a block, as in Adam's second moment
        x = (x.float() * 1e3).clamp(-1e6, 1e6) ** 3 * 1e-12
    x = x if signed else x.abs()
    entries = bitsandbytes_map(signed)
    middles = (entries[1:] + entries[:-1]) / 2
    q = formats.quantize_dynamic8(x, signed=signed)
    unit, absmax = unit_values(x)
    np.testing.assert_array_equal(q.absmax.numpy(), absmax)
    assert q.codes.shape == x.shape
    codes = q.codes.numpy().reshape(-1).astype(np.int64)
    nearest = np.searchsorted(middles, unit)
    assert np.abs(codes - nearest).max() <= 1
    wrong = codes != nearest
    tie = middles[np.minimum(codes, nearest)[wrong]]
    np.testing.assert_allclose(unit[wrong], tie, rtol=1e-6, atol=0)
    back = formats.dequantize_dynamic8(*q)
    expected = entries[codes] * np.repeat(absmax, 256)[: codes.size]
    assert back.shape == x.shape
    np.testing.assert_allclose(back.numpy().reshape(-1), expected, rtol=2e-6, atol=DENORMAL)


@SIGNED
def test_every_dynamic_entry_and_the_middles_between_them_are_coded_right(signed: bool) -> None:
    entries = bitsandbytes_map(signed)
    middles = (entries[1:] + entries[:-1]) / 2
    for values, codes in [
        (entries, range(256)),
        (middles - 1e-5 * np.abs(middles), range(255)),
        (middles + 1e-5 * np.abs(middles), range(1, 256)),
    ]:
        x = torch.ones(len(values), 256)  # a block each, scaled by the 1.0 that it holds
        x[:, 0] = torch.from_numpy(values)
        assert formats.quantize_dynamic8(x, signed=signed).codes[:, 0].tolist() == list(codes)


@SIGNED
@given(x=tensors(dtypes=(torch.float32,)))
def test_dynamic_is_never_farther_away_than_bitsandbytes_on_the_cpu(signed: bool, x: Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = x if signed else x.abs()
    entries = bitsandbytes_map(signed)
    codes, state = functional.quantize_blockwise(x, code=torch.from_numpy(entries).float(), blocksize=256)
    q = formats.quantize_dynamic8(x, signed=signed)
    unit, _ = unit_values(x)
    torch.testing.assert_close(q.absmax, state.absmax, rtol=0, atol=0)
    error = np.abs(entries[q.codes.numpy().reshape(-1)] - unit)
    assert (error <= np.abs(entries[codes.numpy().reshape(-1)] - unit) + 1e-6 * np.abs(unit)).all()


@SIGNED
@given(x=tensors(dtypes=(torch.float32,)))
def test_quantising_moments_again_changes_no_code(signed: bool, x: Tensor) -> None:
    x = x.reshape(-1).abs() if not signed else x.reshape(-1)
    x = x[: x.numel() // 256 * 256].reshape(-1, 256).clone()
    x[:, 7] = 2 * x.abs().amax(-1)  # the signed map has no -1.0: a block whose largest is negative shrinks
    x = x[(x[:, 7] > 1e-30) & (x[:, 7] < 1e37)]
    once = formats.quantize_dynamic8(x, signed=signed)
    twice = formats.quantize_dynamic8(formats.dequantize_dynamic8(*once), signed=signed)
    torch.testing.assert_close(tuple(twice), tuple(once), rtol=0, atol=0)


@SIGNED
@pytest.mark.parametrize("shape", [(3, 700), (1,), (), (0,), (0, 3), (256,), (257,)], ids=str)
def test_zero_moments_stay_zero_at_any_shape(signed: bool, shape: tuple[int, ...]) -> None:
    q = formats.quantize_dynamic8(torch.zeros(shape), signed=signed)
    torch.testing.assert_close(formats.dequantize_dynamic8(*q), torch.zeros(shape), rtol=0, atol=0)
    assert (q.codes == (127 if signed else 0)).all()


# -- in traced programs -----------------------------------------------------------------------------------------------

ROUND_TRIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda x: formats.dequantize_int8(*formats.quantize_int8(x, 16)),
    "int4": lambda x: formats.dequantize_int4(*formats.quantize_int4(x, 16)),
    "official": lambda x: formats.dequantize_official(*formats.quantize_official(x, 16, bits=8)),
    "signed moments": lambda x: formats.dequantize_dynamic8(*formats.quantize_dynamic8(x, signed=True)),
    "unsigned moments": lambda x: formats.dequantize_dynamic8(*formats.quantize_dynamic8(x.abs(), signed=False)),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_format_traces_into_one_graph_with_equal_results(name: str) -> None:
    x = torch.randn(7, 43)
    compiled = torch.compile(ROUND_TRIPS[name], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ROUND_TRIPS[name](x), rtol=0, atol=0)


@SIGNED
def test_the_dynamic_ops_have_right_schemas_and_fakes(signed: bool) -> None:
    checks = ("test_schema", "test_faketensor")
    for x in (torch.rand(7, 43), torch.rand(43, 7).t(), torch.rand(0, 3)):
        torch.library.opcheck(torch.ops.qgalore.quantize_dynamic8.default, (x, signed), test_utils=checks)
        q = formats.quantize_dynamic8(x, signed=signed)
        torch.library.opcheck(torch.ops.qgalore.dequantize_dynamic8.default, tuple(q), test_utils=checks)
