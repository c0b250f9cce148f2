"""Dynamic blocks in four bits: bitsandbytes' map."""

from __future__ import annotations

import pytest
import torch
from formats_support import entries, grouped


def test_the_signed_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(True, 3, 4).unique()  # filled up with zeros to 256
    torch.testing.assert_close(entries("dynamic4").float(), theirs, rtol=1e-6, atol=0)


def test_the_unsigned_map_is_that_of_bitsandbytes_with_the_lowest_decade_s_end_in_place_of_zero() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(False, 3, 4).unique()
    assert theirs[0] == 0
    found = entries("dynamic4+unsigned").float()
    torch.testing.assert_close(found[1:], theirs[1:], rtol=1e-6, atol=0)
    assert 0 < float(found[0]) < float(found[1])
    assert float(found[0]) == pytest.approx(1e-3)


@pytest.mark.parametrize("text", ["dynamic4/4", "dynamic4/4+unsigned"])
def test_the_code_is_that_of_the_nearest_entry(text: str) -> None:
    form, table = grouped(text), entries(text)
    unit = torch.linspace(float(table[0]), 1.0, 10_001)
    x = torch.stack([unit, *3 * [torch.ones_like(unit)]], dim=-1)
    codes = form.codes(form.encode(x), x.shape)[:, 0].long()
    distances = (unit.double()[:, None] - table).abs()
    excess = distances.gather(-1, codes[:, None])[:, 0] - distances.amin(-1)
    assert float(excess.max()) < 1e-7  # at a middle either
    assert codes.unique().tolist() == list(range(16))
