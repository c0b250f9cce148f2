"""One optimizer step in float64 NumPy, written from the documents and from nothing in the package."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_WORD = np.uint64(0xFFFFFFFF)


def philox4x32(counter: list[Array], key: tuple[int, int]) -> list[Array]:
    """Ten rounds of Philox4x32 on uint64 arrays that hold uint32 values."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _WORD,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def random_bits(shape: tuple[int, int], *, seed: int, step: int, param: int) -> Array:
    """The documented 16 bits an element of a (rows, columns) tensor."""
    rows, columns = np.indices(shape)
    step_word, param_word = np.full(shape, step), np.full(shape, param)
    words = np.stack(philox4x32([columns // 8, rows, step_word, param_word], (seed % 2**32, seed >> 32)), axis=-1)
    word = np.take_along_axis(words, (columns % 8 // 2)[..., None], axis=-1)[..., 0]
    return np.where(columns % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16)).astype(np.int64)


def dynamic_map(*, signed: bool) -> Array:
    """bitsandbytes' create_dynamic_map(signed, max_exponent_bits=7, total_bits=8), ascending."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *(-middles if signed else [])]
    return np.sort(np.array(values))


def blocks_of(flat: Array) -> list[Array]:
    """Views of 256 elements, the last one shorter."""
    return [flat[start : start + 256] for start in range(0, flat.size, 256)]


def decode_dynamic8(codes: Array, absmax: Array, *, signed: bool) -> Array:
    values = dynamic_map(signed=signed)[codes].reshape(-1)
    for block, scale in zip(blocks_of(values), absmax, strict=True):
        block *= float(scale)
    return values.reshape(codes.shape)


def encode_dynamic8(x: Array, *, signed: bool) -> tuple[Array, Array, Array]:
    """Codes of the nearest entries, absmax, and where two entries are equally near (bf16 gradients do that often)."""
    entries = dynamic_map(signed=signed)
    middles = (entries[:-1] + entries[1:]) / 2
    absmax = np.array([np.abs(block).max() for block in blocks_of(x.reshape(-1))])
    scale = np.repeat(np.where(absmax > 0, absmax, 1.0), 256)[: x.size]
    unit = x.reshape(-1) / scale
    codes = np.searchsorted(middles, unit)
    near = np.abs(unit[:, None] - middles[np.stack([codes - 1, codes], axis=1).clip(0, 254)]).min(axis=1)
    return codes.reshape(x.shape), absmax, (near < 1e-7 * np.abs(unit)).reshape(x.shape)


def spread(per_group: Array, columns: int, group_size: int) -> Array:
    """(rows, groups) → (rows, columns)."""
    return np.repeat(per_group, min(group_size, columns), axis=1)[:, :columns]


def decode_groups(codes: Array, scale: Array, offset: Array, group_size: int, dtype: Any = np.float64) -> Array:
    """codes · scale + offset; in float32 the same bits as float32 arithmetic gives."""
    scale, offset = (spread(part.astype(dtype), codes.shape[1], group_size) for part in (scale, offset))
    return codes.astype(dtype) * scale + offset


def unpack_int4(packed: Array, columns: int) -> Array:
    """Planar: low nibbles are the first half of a row."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)[:, :columns]


def encode_groups_sr(w: Array, group_size: int, bits: Array) -> tuple[Array, Array, Array]:
    """INT8 codes by stochastic rounding, scale and offset."""
    n = w.shape[1]
    width = min(group_size, n)
    parts = [w[:, start : start + width] for start in range(0, n, width)]
    offset = np.stack([part.min(axis=1) for part in parts], axis=1)
    scale = np.stack([part.max(axis=1) - part.min(axis=1) for part in parts], axis=1) / 255
    x = (w - spread(offset, n, width)) / spread(np.where(scale > 0, scale, 1.0), n, width)
    fraction = x - np.floor(x)
    codes = np.floor(x) + (bits + 0.5 < 65536 * fraction)
    return np.clip(codes, 0, 255).astype(np.int64), scale, offset


def adam(
    m: Array, v: Array, grad: Array, *, step: int, betas: tuple[float, float], eps: float, coded: bool = False
) -> tuple[Array, Array, Array]:
    """m, v and the normalised step N, with bias correction; ``coded``: v held to what float moments obey."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    if coded:
        v = np.maximum(v, least_square(betas) * m**2)
    return m, v, (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)


def least_square(betas: tuple[float, float]) -> float:
    """The least v / m² that gradients make, those in proportion to (β1 / β2)ᵏ, k steps back: by Cauchy and Schwarz the
    inverse of the sum of ((1 - β1) β1ᵏ)² / ((1 - β2) β2ᵏ); 0 where that sum is infinite."""
    beta1, beta2 = betas
    ratio = beta1**2 / beta2 if beta2 else np.inf
    k = np.arange(200_000)
    return 0.0 if ratio >= 1 else float(1 / ((1 - beta1) ** 2 / (1 - beta2) * ratio**k).sum())


def canonical_signs(columns: Array) -> Array:
    """Each column with its entry of largest magnitude positive."""
    return columns * np.where(np.take_along_axis(columns, np.abs(columns).argmax(0)[None], 0) < 0, -1.0, 1.0)


def projection_matrix(gradient: Array, rank: int) -> Array:
    """PPᵀ (PᵀP on the right side) of the exact leading subspace, in float64."""
    m, n = gradient.shape
    u, _, vh = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
    return vh[:rank].T @ vh[:rank] if m >= n else u[:, :rank] @ u[:, :rank].T


def assert_codes_close(actual: Array, expected: Array, what: str, *, ties: Array | None = None) -> None:
    """Off by at most one, in fewer than 0.2 % of the places that are no ties; one place of a small tensor."""
    difference = np.abs(actual.astype(np.int64) - expected.astype(np.int64))
    assert difference.max(initial=0) <= 1, f"{what}: codes are off by {difference.max()}"
    places = np.count_nonzero(difference if ties is None else difference[~ties])
    assert places <= max(1, 0.002 * difference.size), f"{what}: {places} of {difference.size} codes differ"
