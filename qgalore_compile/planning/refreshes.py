"""What computing a subspace anew takes, while it is computed.

Counted on the CPU over the calls of ``subspace/finder.py`` at several shapes (``tests/planning/test_refreshes.py`` does
it again): a factor of the larger side k with ``rank + 16`` columns l in float64 twice, and in float32 twice; of the
smaller side d four in float64, with the Gram matrix and its eigenvectors; the gradient in float32 where it is formed,
or the factors, where those are shorter floats.  A first sketch takes 24 bytes for each of its random numbers, which are
drawn in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qgalore_compile.subspace.cost import OVERSAMPLING, factors_are_cheaper


def refresh_bytes(group: Mapping[str, Any], shape: Sequence[int], rank: int, tokens: int, element: int) -> int:
    """The most bytes of a refresh, or of the first step's sketch, above what is given to it.

    Args:
        group: a projected group.
        shape, rank: of the weight, and of its projection.
        tokens: of the gradient's factors.
        element: bytes of an element of theirs.
    """
    (m, n), d, k = shape, min(shape), max(shape)
    columns = min(rank + OVERSAMPLING, d)
    method, iterations = group["refresh"], group["power_iterations"]
    factors = 4 * tokens * (m + n) if element < 4 else 0
    formed = 4 * m * n
    # a sketch, and the first refresh behind it, are those of the range finder whatever comes later
    through = tokens < rank or factors_are_cheaper("randomized", m, n, rank, iterations, tokens)
    found = max(24 * k * columns, 32 * d * columns + 32 * columns**2) + 4 * d * columns
    if method == "svd" and tokens >= rank:
        found, through = max(found, 2 * formed), False
    return max(found, 24 * k * rank) + (factors if through else formed)
