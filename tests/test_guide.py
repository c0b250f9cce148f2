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
# those that build no optimizer
EXPORT = SNIPPETS.pop("Exporting a model")
NEVER_IN_FLOAT = SNIPPETS.pop("A model that is never in float")
TRAINER = SNIPPETS.pop("Transformers' Trainer")  # tests/integrations/test_trainer.py
SAVING = SNIPPETS.pop("Saving, and going on")
WILL_IT_FIT = SNIPPETS.pop("Will it fit?")


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


def test_a_model_is_loaded_and_another_drawn_in_int8(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    names: dict[str, object] = {"folder": tmp_path, "config": config}
    exec(NEVER_IN_FLOAT.split("\n\nwith")[0], names)
    loaded = names["model"]
    exec(NEVER_IN_FLOAT, names)
    for model in (loaded, names["model"]):
        assert isinstance(model.lm_head.weight, torch.nn.Parameter)  # type: ignore[attr-defined]
        assert isinstance(model.model.layers[1].mlp.up_proj.weight, qg.Int8Weight)  # type: ignore[attr-defined]


def test_what_a_step_will_hold_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"model": Llama(LlamaConfig(32, 56, 2, 2, vocab_size=19))}
    exec(WILL_IT_FIT, names)
    assert (tmp_path / "plan.svg").exists()
    assert isinstance(names["plan"], qg.MemoryPlan)


def test_the_trainer_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2
    )
    model = qg.quantize_(transformers.LlamaForCausalLM(config))
    names: dict[str, object] = {"model": model, "data": []}
    exec(TRAINER.replace("trainer.train()", ""), names)
    assert isinstance(names["trainer"].create_optimizer(), qg.QGaLoreAdamW)  # type: ignore[attr-defined]


def test_what_was_saved_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = qg.quantize_(Llama(LlamaConfig(32, 56, 2, 2, vocab_size=19)))
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=4))
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt)
    names: dict[str, object] = {"model": model, "opt": opt, "scheduler": scheduler, "step": 3}
    exec(SAVING, names)
    assert names["extra"]["step"] == 3  # type: ignore[index]
