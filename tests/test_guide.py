"""Every Python block of docs/guide.md runs, and the optimizer that it builds, if any, takes a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import qgalore_compile as qg
from qgalore_compile.training.llama import Llama, LlamaConfig

GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")
HEADINGS = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SNIPPETS = {
    heading: code
    for heading, section in HEADINGS.findall(GUIDE)
    for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
}
EXPORT = SNIPPETS.pop("Exporting a model")  # the one that builds no optimizer


def test_there_is_a_snippet_for_each_place_to_come_from() -> None:
    assert len(SNIPPETS) == 8


@pytest.mark.parametrize("code", SNIPPETS.values(), ids=SNIPPETS.keys())
def test_a_snippet_runs_and_its_optimizer_takes_a_step(code: str) -> None:
    model = Llama(LlamaConfig(32, 56, 2, 2, vocab_size=19))
    names: dict[str, object] = {"model": model}
    exec(code, names)
    opt = names["opt"]
    assert isinstance(opt, qg.QGaLoreAdamW)
    assert len(opt.schedule()) == 14  # the projected weights of two blocks
    assert sum(len(group["params"]) for group in opt.param_groups) == len(list(model.parameters()))
    tokens = torch.randint(19, (2, 9))
    before = model(tokens[:, :-1], tokens[:, 1:])
    before.backward()
    opt.step()
    assert model(tokens[:, :-1], tokens[:, 1:]) != before.detach()


def test_the_export_writes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = qg.quantize_(Llama(LlamaConfig(32, 56, 2, 2, vocab_size=19)))
    names: dict[str, object] = {"model": model}
    exec(EXPORT, names)
    assert (tmp_path / "exported" / "model.safetensors").exists()
    weights = names["weights"]
    assert isinstance(weights, dict)
    assert weights.keys() == model.state_dict().keys()
