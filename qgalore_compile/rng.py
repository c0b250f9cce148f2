"""Philox4x32-10, and the random bits of stochastic rounding.

Random bits are a pure function of (seed, step, parameter, row, column): the same in eager PyTorch, in generated C++
and Triton, on every rank, and after a resume.  Layout, for a tensor seen as rows × columns (rows: all leading
dimensions flattened):

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (column // 8, row, step, parameter)
    draw    = half of word (column % 8) // 2 of the four, the low half where column is even: 16 bits an element

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); test vectors of Random123.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qgalore_compile._ops import define, numbered

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_WORD = 0xFFFFFFFF
_ROUNDS = 10
SEEDS = range(-(1 << 63), 1 << 64)  # what 64 bits hold, signed or not
MOMENT_STREAM = 1 << 30
"""Bit of the counter's parameter word by which draws for √v are others than those for the weight."""
PROJECTOR_STREAM = 1 << 29
"""Likewise of draws for a projector, of rules that draw them."""
_DRAWS = 8  # 16-bit draws in one counter's four words
# Counters at a time on a CPU: below PyTorch's grain of 32,768 elements, so that no thread waits for another.  16 M
# draws take 0.20 s on two cores; 1 << 16 takes 0.145 s on idle ones, and on busy ones twice as long as this.
_CHUNK = 1 << 14

Word: TypeAlias = Tensor | int


def _rounds(counter: Sequence[Word], key: Sequence[Word]) -> list[Any]:
    """Ten rounds on words as they come, ints or int64 tensors; of the results only the low 32 bits count.

    Nothing is broadcast before it must be: with a row vector, a column vector and two scalars for a counter, the first
    two rounds cost next to nothing.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 wraps around, which keeps all 64 bits of a product of two words; what stands above a word after the
        # shift goes with the mask, so the low words need none
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ (c1 ^ k0)) & _WORD, product1
        c2, c3 = ((product0 >> 32) ^ (c3 ^ k1)) & _WORD, product0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def philox4x32(counter: Sequence[Word], key: Sequence[Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four integer tensors or ints with uint32 values, of shapes that broadcast.
        key: two of the same.

    Returns:
        Four int64 tensors of the broadcast shape, holding uint32 values.

    Raises:
        ValueError: another number of words.
    """
    if len(counter) != 4 or len(key) != 2:
        raise ValueError(f"Philox4x32 takes 4 counter words and 2 key words, got {len(counter)} and {len(key)}")
    devices = [word.device for word in (*counter, *key) if isinstance(word, Tensor)]
    device = next(iter(devices), torch.device("cpu"))
    words = [torch.as_tensor(word, dtype=torch.int64, device=device) for word in (*counter, *key)]
    r0, r1, r2, r3 = torch.broadcast_tensors(*_rounds(words[:4], words[4:]))
    return r0 & _WORD, r1 & _WORD, r2 & _WORD, r3 & _WORD


def _random_bits(step: Tensor, shape: Sequence[int], seed: int, param: int) -> Tensor:
    *leading, columns = shape
    rows = math.prod(leading)
    device = step.device
    out = torch.empty((rows, columns), dtype=torch.int32, device=device)
    blocks = -(-columns // _DRAWS)
    key = (seed & _WORD, (seed >> 32) & _WORD)
    at = step.to(torch.int64) & _WORD
    chunk = _CHUNK if device.type == "cpu" else max(1, rows * blocks)
    rows_at_a_time = max(1, chunk // max(1, blocks))
    for first, begin in product(range(0, rows, rows_at_a_time), range(0, blocks, chunk)):
        row = torch.arange(first, min(first + rows_at_a_time, rows), dtype=torch.int64, device=device)
        column = torch.arange(begin, min(begin + chunk, blocks), dtype=torch.int64, device=device)
        words = torch.broadcast_tensors(*_rounds((column, row[:, None], at, param), key))
        # on a little-endian machine, as all of PyTorch's are, the halves of a word lie low half first already
        draws = torch.stack([word.to(torch.int32) for word in words], dim=-1).view(torch.int16)
        place = slice(_DRAWS * begin, min(_DRAWS * (begin + chunk), columns))
        out[first : first + len(row), place] = draws.reshape(len(row), -1)[:, : columns - _DRAWS * begin]
    return out.bitwise_and_(0xFFFF).reshape(list(shape))


def _random_bits_fake(step: Tensor, shape: Sequence[int], seed: int, param: int) -> Tensor:
    return torch.empty(list(shape), dtype=torch.int32, device=step.device)


_random_bits_op = define(
    "random_bits(Tensor step, SymInt[] shape, int seed, int param) -> Tensor", _random_bits, _random_bits_fake
)
numbered(_random_bits_op, "param", _random_bits, _random_bits_fake)


def signed_seed(seed: int) -> int:
    """``seed`` as the signed 64-bit number that an operator takes; ValueError where 64 bits do not hold it."""
    if seed not in SEEDS:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def random_bits(shape: Sequence[int], *, seed: int, step: Tensor | int, param: int) -> Tensor:
    """16 random bits an element.

    Args:
        shape: shape of the result; at least one dimension.
        seed: 64 bits; negative values count from 2**64 down.
        step: the step's number, a 0-d tensor of any dtype (its device is the result's) or an int.
        param: position of the parameter over the optimizer's groups in order.

    Returns:
        int32 tensor with values in 0..65535, laid out as in the module's docstring.

    Raises:
        ValueError: an empty ``shape``, or a seed outside of 64 bits.
    """
    if len(shape) == 0:
        raise ValueError("random_bits needs a shape of at least one dimension, got ()")
    if isinstance(step, int):
        step = torch.tensor(step, dtype=torch.int64, device="cpu")
    return _random_bits_op(step, list(shape), signed_seed(seed), param)  # type: ignore[no-any-return]


def normal(shape: Sequence[int], *, seed: int, step: int, param: int, stream: int = 0) -> Tensor:
    """Standard normal numbers, float32 on the CPU, from streams of their own: independent of each other.

    Stream 0 is that of :func:`random_bits` with the top bit of the counter's parameter word set, and its numbers are
    counted by the first two words; another stream (0 to 15) has its number in the top four bits of the second.  Two
    words make two numbers by the Box-Muller transform.  Not traced: it runs inside the refresh op.
    """
    count = math.prod(shape)
    blocks = -(-count // 4)
    key = (seed & _WORD, seed >> 32 & _WORD)
    uniform = torch.empty((4, blocks), dtype=torch.float64, device="cpu")
    for first in range(0, blocks, _CHUNK):
        block = torch.arange(first, min(first + _CHUNK, blocks), dtype=torch.int64, device="cpu")
        words = philox4x32((block & _WORD, block >> 32 | stream << 28, step & _WORD, param | 1 << 31), key)
        for row, word in zip(uniform, words, strict=True):
            row[first : first + len(block)] = word
    uniform.add_(0.5).div_(2.0**32)
    # in place, and all at once: PyTorch's logarithm waits for every thread once for each 2,048 elements of a call
    length, turn = uniform[::2].log_().mul_(-2).sqrt_(), uniform[1::2].mul_(2 * torch.pi)
    pairs = torch.stack([length * turn.cos(), length * turn.sin()], dim=-1).to(torch.float32)  # (two, blocks, 2)
    return pairs.transpose(0, 1).reshape(-1)[:count].reshape(list(shape))
