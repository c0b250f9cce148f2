"""docs/formats.md tells of every name and every modifier that there is, with the group and the bits that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qgalore_compile as qg
from qgalore_compile.formats import FORMATS, Format
from qgalore_compile.formats.base import Grouped
from qgalore_compile.formats.registry import MODIFIERS

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


def rows(heading: str) -> dict[str, list[str]]:
    """Cells of the first table behind a heading, by the name in the first one."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*$", section, re.M)]
    return {each[0].strip("`+"): each[1:] for each in cells[2:]}


NAMES, WORDS = rows("Names"), rows("Modifiers")


def test_the_table_of_names_is_the_registry() -> None:
    assert list(NAMES) == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_group_and_the_bits_of_its_format(name: str) -> None:
    form = FORMATS[name]
    group, bits = NAMES[name][:2]
    assert group == (str(form.width) if isinstance(form, Grouped) else "–")
    assert float(bits) == pytest.approx(form.bits, abs=5e-4)


def test_the_table_of_modifiers_is_what_parse_takes() -> None:
    assert set(WORDS) == {*MODIFIERS, "double"}


@pytest.mark.parametrize("text", sorted(set(re.findall(r"`([a-z0-9]+/\d+(?:\+[a-z0-9]+)*)`", PAGE))))
def test_a_text_on_the_page_is_a_format_and_reads_as_itself(text: str) -> None:
    assert str(Format.parse(text)) == text


def test_the_snippet_runs_and_its_optimizer_takes_a_step() -> None:
    code = re.search(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert code is not None
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    names: dict[str, object] = {"model": model}
    exec(code[1], names)
    opt = names["opt"]
    assert isinstance(opt, qg.QGaLoreAdamW)
    before = model(torch.ones(1, 64)).square().sum()
    before.backward()
    opt.step()
    assert model(torch.ones(1, 64)).square().sum() < before
