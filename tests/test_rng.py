"""Philox4x32-10 against Random123's vectors and against Python integers, and the documented layout of random bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qgalore_compile.rng import normal, philox4x32, random_bits

WORD = 2**32 - 1
WORDS = st.integers(0, WORD) | st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**31, WORD])
SEEDS = st.integers(-(2**63), 2**64 - 1) | st.sampled_from([0, -1, 2**32, 2**63, 2**64 - 1, -(2**63)])

# -- the oracle: Python integers --------------------------------------------------------------------------------------


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Salmon et al. (2011), section 4: ten rounds, the key bumped between them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def draw_at(row: int, column: int, *, seed: int, step: int, param: int) -> int:
    """The documented 16 bits of one element."""
    words = philox((column // 8, row, step, param), (seed % 2**32, seed % 2**64 // 2**32))
    return words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF


# -- the generator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
@pytest.mark.parametrize("convert", [int, torch.tensor], ids=["ints", "tensors"])
def test_the_published_vectors_hold(
    counter: list[int], key: list[int], expected: str, convert: Callable[[int], Any]
) -> None:
    words = philox4x32([convert(word) for word in counter], [convert(word) for word in key])
    assert [int(word) for word in words] == [int(word, 16) for word in expected.split()]
    assert philox(counter, key) == tuple(int(word, 16) for word in expected.split())


@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.tuples(WORDS, WORDS))
def test_any_counter_and_key_equal_integer_arithmetic(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    words = philox4x32(counter, key)
    assert all(word.dtype == torch.int64 for word in words)
    assert tuple(word.item() for word in words) == philox(counter, key)


@given(first=WORDS, row=st.lists(WORDS, min_size=1, max_size=5), column=st.lists(WORDS, min_size=1, max_size=5))
def test_words_of_several_shapes_broadcast(first: int, row: list[int], column: list[int]) -> None:
    key = (torch.tensor(row), 7)
    words = philox4x32((first, torch.tensor(column)[:, None], torch.tensor(3, dtype=torch.int32), 4), key)
    for i, second in enumerate(column):
        for j, k0 in enumerate(row):
            assert tuple(int(word[i, j]) for word in words) == philox((first, second, 3, 4), (k0, 7))


def test_another_number_of_words_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 counter words and 2 key words, got 3 and 2"):
        philox4x32((0, 0, 0), (0, 0))
    with pytest.raises(ValueError, match="got 4 and 1"):
        philox4x32((0, 0, 0, 0), (0,))


# -- the layout of random bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 16, 43])
def test_every_element_of_small_tensors_is_where_the_documents_put_it(columns: int) -> None:
    bits = random_bits((5, columns), seed=0x123456789ABCDEF0, step=77, param=3)
    expected = [[draw_at(r, c, seed=0x123456789ABCDEF0, step=77, param=3) for c in range(columns)] for r in range(5)]
    assert bits.tolist() == expected
    assert bits.dtype == torch.int32


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 700))
    | st.tuples(st.integers(1, 700))
    | st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 123)),
    seed=SEEDS,
    step=WORDS,
    param=WORDS,
    where=st.lists(st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)), min_size=3, max_size=3),
)
def test_leading_dimensions_are_rows_and_the_last_one_columns(
    shape: tuple[int, ...], seed: int, step: int, param: int, where: list[tuple[float, float]]
) -> None:
    bits = random_bits(shape, seed=seed, step=step, param=param)
    assert bits.shape == shape
    rows = bits.reshape(-1, shape[-1])
    for down, across in [(0, 0), (0.9999, 0.9999), *where]:
        row, column = int(down * len(rows)), int(across * shape[-1])
        assert rows[row, column] == draw_at(row, column, seed=seed, step=step, param=param)


@pytest.mark.parametrize("shape", [(131, 8003), (2, 8 * 65536 + 5), (70001, 6)], ids=["wide", "very wide", "tall"])
def test_tensors_larger_than_a_chunk_have_no_seam(shape: tuple[int, int]) -> None:
    bits = random_bits(shape, seed=-7, step=5, param=1)
    assert int(bits.min()) >= 0
    assert int(bits.max()) <= 0xFFFF
    rows, columns = shape
    # wherever chunks begin: every row of a wide tensor, and of a tall one rows around the powers of two
    sample = (
        range(rows) if rows < 1000 else [*range(0, rows, 997), *(2**k + i for k in range(2, 17) for i in (-1, 0, 1))]
    )
    for row in sample:
        for column in (0, 5, columns // 2, columns - 1):
            assert bits[row, column] == draw_at(row, column, seed=-7, step=5, param=1), (row, column)
    assert len(set(map(tuple, bits[:, :6].tolist()))) == rows  # no row twice


def test_an_element_keeps_its_bits_when_the_tensor_grows() -> None:
    small = random_bits((6, 42), seed=1, step=2, param=3)
    assert torch.equal(small, random_bits((431, 123), seed=1, step=2, param=3)[:6, :42])
    assert torch.equal(small, random_bits((2, 3, 42), seed=1, step=2, param=3).reshape(6, 42))


@pytest.mark.parametrize(("seed", "same"), [(-1, 2**64 - 1), (-(2**63), 2**63), (-5, 2**64 - 5)])
def test_negative_seeds_count_down_from_the_top(seed: int, same: int) -> None:
    assert torch.equal(
        random_bits((3, 42), seed=seed, step=0, param=0), random_bits((3, 42), seed=same, step=0, param=0)
    )


def test_both_halves_of_the_seed_the_step_and_the_parameter_matter() -> None:
    default = {"seed": 1, "step": 2, "param": 3}
    seen = [random_bits((16, 64), **default)]
    for change in ({"seed": 2}, {"seed": 1 + 2**32}, {"seed": 1 - 2**63}, {"step": 3}, {"param": 2}):
        seen.append(random_bits((16, 64), **{**default, **change}))  # noqa: PERF401
    for i, bits in enumerate(seen):
        for other in seen[:i]:
            assert (bits == other).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64])
def test_step_may_be_a_tensor_of_any_dtype(dtype: torch.dtype) -> None:
    bits = random_bits((5, 43), seed=9, step=torch.tensor(100, dtype=dtype), param=0)
    assert torch.equal(bits, random_bits((5, 43), seed=9, step=100, param=0))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty_shapes_give_empty_tensors(shape: tuple[int, ...]) -> None:
    bits = random_bits(shape, seed=0, step=0, param=0)
    assert (bits.shape, bits.dtype) == (shape, torch.int32)


def test_torch_seed_and_grad_mode_change_nothing() -> None:
    torch.manual_seed(1)
    bits = random_bits((4, 9), seed=0, step=0, param=0)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert torch.equal(random_bits((4, 9), seed=0, step=0, param=0), bits)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_an_error(seed: int) -> None:
    with pytest.raises(ValueError, match=f"64 bits, got {seed}"):
        random_bits((3,), seed=seed, step=0, param=0)


def test_a_shape_without_dimensions_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one dimension"):
        random_bits((), seed=0, step=0, param=0)


def test_draws_are_uniform_and_neighbours_independent() -> None:
    bits = random_bits((1024, 1024), seed=2024, step=1, param=0)
    n = bits.numel()
    # chi-square over 256 bins of each byte: mean 255, standard deviation sqrt(510)
    for byte in (bits & 0xFF, bits >> 8):
        counts = torch.bincount(byte.flatten(), minlength=256).double()
        assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * math.sqrt(510)
    centred = (bits.double() - 32767.5) / math.sqrt((2**32 - 1) / 12)
    for a, b in [
        (centred[:, 1:], centred[:, :-1]),
        (centred[:, 8:], centred[:, :-8]),
        (centred[1:], centred[:-1]),
        (centred, (random_bits((1024, 1024), seed=2024, step=2, param=0).double() - 32767.5) / 18918.6),
    ]:
        assert abs((a * b).mean()) < 5 / math.sqrt(n)


# -- in traced programs -----------------------------------------------------------------------------------------------


def calls(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def bits_at(step: Tensor) -> Tensor:
    return random_bits((7, 43), seed=2**63 + 5, step=step, param=2)


def test_it_is_one_node_of_an_aten_graph() -> None:
    gm = make_fx(bits_at, tracing_mode="fake")(torch.tensor(3))
    assert calls(gm) == [torch.ops.qgalore.random_bits.default]
    assert torch.equal(gm(torch.tensor(4)), bits_at(torch.tensor(4)))


def test_it_is_one_node_to_dynamo_and_to_autograd_and_no_step_recompiles() -> None:
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[Any]] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(calls(gm))
        return gm

    def keep_both(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        keep(gm, example_inputs)
        return aot_autograd(fw_compiler=keep)(gm, example_inputs)

    compiled = torch.compile(bits_at, backend=keep_both, fullgraph=True)
    for step in (0, 1, 2**32 - 1):
        assert torch.equal(compiled(torch.tensor(step)), bits_at(torch.tensor(step)))
    assert graphs == [[torch.ops.qgalore.random_bits.default]] * 2


def test_the_op_has_a_right_schema_and_fake() -> None:
    for shape in ([7, 43], [3], [2, 0], [2, 3, 9]):
        torch.library.opcheck(
            torch.ops.qgalore.random_bits.default,
            (torch.tensor(3), shape, -5, 2),
            test_utils=("test_schema", "test_faketensor"),
        )


# -- normal numbers ---------------------------------------------------------------------------------------------------


def test_normal_numbers_are_box_muller_of_a_stream_of_their_own() -> None:
    numbers = normal((3, 7), seed=-3, step=6, param=2).flatten()
    assert numbers.dtype == torch.float32
    for index in range(21):
        words = philox((index // 4, 0, 6, 2 + 2**31), ((-3) % 2**32, (-3) % 2**64 // 2**32))
        u, v = ((word + 0.5) / 2**32 for word in words[index % 4 // 2 * 2 :][:2])
        turn = math.sin if index % 2 else math.cos
        expected = math.sqrt(-2 * math.log(u)) * turn(2 * math.pi * v)
        assert float(numbers[index]) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_normal_numbers_have_the_moments_of_a_standard_normal() -> None:
    x = normal((431, 431), seed=0, step=0, param=0).double()
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs((x**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0, 3)], ids=str)
def test_normal_numbers_come_in_any_shape(shape: tuple[int, ...]) -> None:
    assert normal(shape, seed=0, step=0, param=0).shape == shape
