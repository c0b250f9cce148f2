"""Tables of sixteen entries: which one a number gets, and that every one is found again."""

from __future__ import annotations

import pytest
import torch
from formats_support import codebook, grouped

from qgalore_compile.formats.arithmetic import OnTensors

TEXTS = pytest.mark.parametrize("text", ["nf4", "dynamic4", "dynamic4+unsigned", "moment4", "moment4+unsigned"])


@TEXTS
def test_there_are_sixteen_ascending_entries_and_the_last_is_one(text: str) -> None:
    entries = codebook(text).entries
    assert len(entries) == 16
    assert list(entries) == sorted(set(entries))
    assert entries[-1] == 1.0
    assert entries[0] >= -1.0


@TEXTS
def test_each_entry_gets_its_own_code_to_nearest_and_by_every_draw(text: str) -> None:
    form, codes = codebook(text), torch.arange(16, dtype=torch.int32)
    entries = torch.tensor(form.entries)
    assert torch.equal(form.entry(OnTensors(), codes), entries)
    for draw in (None, 0, 1, 32768, 65535):
        noise = None if draw is None else torch.full((16,), draw, dtype=torch.int32)
        assert torch.equal(form.code(OnTensors(), entries, noise), codes)


@TEXTS
@pytest.mark.parametrize("draw", [None, 0, 65535])
def test_beyond_the_ends_are_the_end_codes(text: str, draw: int | None) -> None:
    form, x = codebook(text), torch.tensor([-1.5, -1.0001, 1.0001, 1.5])
    noise = None if draw is None else torch.full((4,), draw, dtype=torch.int32)
    assert form.code(OnTensors(), x, noise).tolist() == [0, 0, 15, 15]


@TEXTS
def test_a_draw_takes_one_of_the_two_entries_beside_a_number(text: str) -> None:
    form = codebook(text)
    entries = torch.tensor(form.entries)
    x = torch.rand(4096) * (1 - entries[0]) + entries[0]
    above = torch.searchsorted(entries, x)
    lowest, highest = (form.code(OnTensors(), x, torch.full(x.shape, draw, dtype=torch.int32)) for draw in (65535, 0))
    between = (x - entries[above - 1]) / (entries[above] - entries[above - 1])
    inside = (between > 2.0**-15) & (between < 1 - 2.0**-15)
    assert torch.equal(lowest[inside], above.int()[inside] - 1)
    assert torch.equal(highest[inside], above.int()[inside])


@pytest.mark.parametrize("text", ["dynamic4/128+unsigned", "moment4/128+unsigned"])
def test_a_block_of_the_second_moment_has_no_zero_unless_it_is_all_zeros(text: str) -> None:
    form = grouped(text)
    x = torch.zeros(3, 128)
    x[0, 5] = 7.0
    x[1] = torch.logspace(-12, 0, 128)
    back = form.decode(form.encode(x), x.shape)
    assert back[:2].gt(0).all()
    assert not back[2].any()
