"""The randomised Hadamard rotation of a group: outliers are spread over all of its elements.

y = H D x / √W with D a diagonal of fixed random signs and H Sylvester's Hadamard matrix of size W, a power of two; back
x = D H y / √W.  Both are orthogonal: errors of y are errors of x of the same size.  Signs depend on the place in the
group alone, so that nothing is stored for them.  A short group at the end of a row is left as it is.

Sources: RoLoRA (arXiv 2407.08044), QuIP# (arXiv 2402.04396) for the signs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sign_bit(lane: int) -> int:
    """1 where the sign of a place in the group is negative: a bit of murmur3's finalizer of the place."""
    h = (lane + 0x9E3779B9) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (h ^ (h >> 16)) & 1


def signs(width: int) -> tuple[float, ...]:
    """D: 1.0 or -1.0 for each place of a group."""
    return tuple(1.0 - 2.0 * sign_bit(lane) for lane in range(width))


def is_size(width: int) -> bool:
    """Whether there is a rotation of this size."""
    return width >= 2 and width & (width - 1) == 0


def rotated(x: Tensor, back: bool = False) -> Tensor:
    """Every group of x (..., W), float32, rotated; with ``back`` the inverse.

    Sums of pairs at distance 1, 2, 4, …, in this order, which kernels keep: results are equal bit for bit.
    """
    width = x.shape[-1]
    diagonal = torch.tensor(signs(width), dtype=torch.float32, device=x.device)
    x = x if back else x * diagonal
    distance = 1
    while distance < width:
        pairs = x.reshape(*x.shape[:-1], width // (2 * distance), 2, distance)
        low, high = pairs.unbind(-2)
        x = torch.stack([low + high, low - high], dim=-2).reshape(x.shape)
        distance *= 2
    x = x * (1 / math.sqrt(width))
    return x * diagonal if back else x
