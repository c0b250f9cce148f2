"""What a refresh takes while it runs: the formula, and the storages that a real one makes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qgalore_compile.planning.refreshes import refresh_bytes
from qgalore_compile.subspace.finder import leading_subspace


class Ledger(TorchDispatchMode):
    """The most bytes of new storages that live at a time."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in given}
        self.live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                size = tensor.untyped_storage().nbytes()
                self.known.add(key)
                self.live += size
                self.most = max(self.most, self.live)
                weakref.finalize(tensor.untyped_storage(), self.free, key, size)
        return result

    def free(self, key: int, size: int) -> None:
        """A storage has gone."""
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize(
    ("m", "n", "rank", "tokens"), [(512, 512, 128, 256), (1376, 512, 128, 1024), (512, 1376, 128, 4096)]
)
def test_it_is_within_a_quarter_of_a_range_finder_s(m: int, n: int, rank: int, tokens: int) -> None:
    factors = [torch.randn(tokens, m), torch.randn(tokens, n)]
    with Ledger(factors) as ledger:
        leading_subspace(factors, rank, "right" if m >= n else "left", method="randomized")
    foreseen = refresh_bytes({"refresh": "randomized", "power_iterations": 1}, (m, n), rank, tokens, 4)
    assert foreseen == pytest.approx(ledger.most, rel=0.25)
