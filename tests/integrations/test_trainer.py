"""Transformers' Trainer around one graph: the losses of its own loop, and resumed with the same bits."""

from __future__ import annotations

import copy
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Interpreted
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qgalore_compile as qg

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from qgalore_compile.integrations import QGaLoreTrainer  # noqa: E402
from qgalore_compile.integrations.trainer import FILE, _tell_float  # noqa: E402

KEYS: dict[str, Any] = {"rank": 4, "update_proj_gap": 3}


class Traced(QGaLoreTrainer):
    """Through all passes, and without a C++ compiler."""

    backend = Interpreted()


def make() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return qg.quantize_(transformers.LlamaForCausalLM(config), group_size=8)


def arguments(folder: Path | str, **keys: Any) -> Any:
    own: dict[str, Any] = {
        "learning_rate": 5e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**own, **keys})


def texts(count: int, *, vary: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        length = int(torch.randint(5, 14, (), generator=generator)) if vary else 12
        tokens = torch.randint(40, (length,), generator=generator)
        found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()})
    return found


def padded(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """To the longest, labels with −100."""
    length = max(len(each["labels"]) for each in batch)

    def stacked(key: str, value: int) -> Tensor:
        return torch.stack([nn.functional.pad(each[key], (0, length - len(each[key])), value=value) for each in batch])

    return {"input_ids": stacked("input_ids", 0), "attention_mask": stacked("attention_mask", 0),
            "labels": stacked("labels", -100)}  # fmt: skip


def losses(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def stored(model: nn.Module) -> list[Tensor]:
    return [part for each in model.state_dict().values()
            for part in (each.parts if isinstance(each, qg.Int8Weight) else [each])]  # fmt: skip


class Plain(transformers.Trainer):  # type: ignore[misc,name-defined]
    """Transformers' own loop with the eager optimizer, which clips."""

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self.optimizer.optimizer.last_grad_norm


def plain(folder: Path, data: list[dict[str, Tensor]], **keys: Any) -> Any:
    """A run of it."""
    model = make()
    groups = qg.param_groups(model, weight_decay=0.0, **KEYS)
    optimizer = qg.QGaLoreAdamW(groups, lr=5e-3, max_grad_norm=1.0)
    trainer = Plain(model, arguments(folder, **keys), train_dataset=data, data_collator=padded,
                    optimizers=(optimizer, None))  # fmt: skip
    trainer.train()
    return trainer


def test_losses_norms_and_rates_are_those_of_transformers_own_loop_with_two_graphs(tmp_path: Path) -> None:
    """Lengths vary from batch to batch, and the last step of each epoch has one micro-batch."""
    data = texts(36, vary=True)
    before = counters["stats"]["unique_graphs"]
    trainer = Traced(make(), arguments(tmp_path, num_train_epochs=1), train_dataset=data, data_collator=padded,
                     qgalore=KEYS)  # fmt: skip
    trainer.train()
    expected = plain(tmp_path, data, num_train_epochs=1)
    assert len(losses(trainer)) == 5
    for key in ("loss", "grad_norm", "learning_rate"):
        assert losses(trainer, key) == pytest.approx(losses(expected, key), rel=1e-4), key
    assert counters["stats"]["unique_graphs"] - before <= 3  # one, one for all lengths, one for the last step
    assert trainer._whole is not None
    assert losses(trainer, "refreshes")[-1] > 0
    assert losses(trainer, "skipped_steps") == [0] * 5


PROGRAM = """
import sys
sys.path[:0] = {path!r}
from test_trainer import *
trainer = resumable({folder!r})
trainer.train(resume_from_checkpoint={folder!r} + "/checkpoint-3")
torch.save((losses(trainer), losses(trainer, "grad_norm"), stored(trainer.model)), {folder!r} + "/found.pt")
"""


def resumable(folder: str) -> Any:
    """Six steps with all that a resume has to bring back: accumulation, bf16, clipping, cosine, shuffled data."""
    return Traced(make(), arguments(folder, max_steps=6, bf16=True, save_strategy="steps", save_steps=3),
                  train_dataset=texts(30), qgalore=KEYS)  # fmt: skip


def test_another_process_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    trainer = resumable(str(tmp_path))
    trainer.train()
    program = PROGRAM.format(path=[str(Path(__file__).parent), *sys.path], folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    found, norms, parts = torch.load(tmp_path / "found.pt")
    assert found == losses(trainer)
    assert norms == losses(trainer, "grad_norm")
    assert all(torch.equal(own, other) for own, other in zip(parts, stored(trainer.model), strict=True))
    # and the checkpoint is a model of transformers
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    expected = qg.dequantize_(trainer.model).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


class Reads(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """A callback that looks at gradients."""

    norms: list[float]

    def __init__(self) -> None:
        self.norms = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.norms.append(float(kwargs["model"].lm_head.weight.grad.norm()))


class Untraceable(Traced):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if float(loss.detach()) > 1e6:  # Python asks for the value
            raise RuntimeError
        return loss


@pytest.mark.parametrize("kind", ["callback", "loss"])
def test_what_cannot_be_one_graph_is_said_in_a_line_and_trains_alike(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, reads = texts(24, vary=True), Reads()
    callbacks = [reads] if kind == "callback" else []
    with caplog.at_level(logging.WARNING, "qgalore_compile"):
        trainer = (Traced if callbacks else Untraceable)(
            make(), arguments(tmp_path, max_steps=3), train_dataset=data, data_collator=padded, qgalore=KEYS,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
    (line,) = [record.message for record in caplog.records if "alone" in record.message]
    assert line.startswith("QGaLoreTrainer compiles opt.step alone: ")
    assert "\n" not in line
    if callbacks:
        assert "Reads.on_pre_optimizer_step may look at gradients" in line
        assert len(reads.norms) == 3
        assert min(reads.norms) > 0
    expected = plain(tmp_path, data, max_steps=3)
    for key in ("loss", "grad_norm"):
        assert losses(trainer, key) == pytest.approx(losses(expected, key), rel=1e-4), key


def test_the_best_model_is_loaded_as_it_was_stored(tmp_path: Path) -> None:
    trainer = Traced(
        make(),
        arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                  load_best_model_at_end=True, learning_rate=0.3),
        train_dataset=texts(24), eval_dataset=texts(8), qgalore=KEYS,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    other = make()
    qg.load(Path(best) / FILE, other)
    assert all(torch.equal(own, like) for own, like in zip(stored(trainer.model), stored(other), strict=True))


def test_an_optimizer_of_ones_own_is_taken(tmp_path: Path) -> None:
    model = make()
    optimizer = qg.QGaLoreAdamW(qg.param_groups(model, **KEYS), max_grad_norm=1.0)
    trainer = Traced(model, arguments(tmp_path), train_dataset=texts(8), optimizers=(optimizer, None))
    assert trainer.create_optimizer() is optimizer


def test_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    args = arguments(tmp_path, adam_beta1=0.8, adam_epsilon=1e-6, weight_decay=0.1, max_grad_norm=0)
    trainer = Traced(
        make(), args, train_dataset=texts(8), qgalore={**KEYS, "moments": "4bit", "nonfinite": "skip_parameter"}
    )
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, qg.QGaLoreAdamW)
    assert optimizer.max_grad_norm is None
    assert optimizer.nonfinite == "skip_parameter"
    projected, others, undecayed = optimizer.param_groups
    assert (projected["lr"], projected["betas"], projected["eps"]) == (5e-3, (0.8, 0.999), 1e-6)
    assert [group["weight_decay"] for group in (projected, others, undecayed)] == [0.1, 0.1, 0.0]


def optimizer_of(model: nn.Module, limit: float | None) -> tuple[Any, None]:
    return qg.QGaLoreAdamW(qg.param_groups(model, **KEYS), max_grad_norm=limit), None


@pytest.mark.parametrize(
    ("own", "args", "message"),
    [
        ({}, {}, "give either qgalore"),
        ({"qgalore": {}}, {}, "qgalore lacks rank"),
        (
            {"qgalore": {"rank": 8, "ranck": 8}},
            {},
            "qgalore: unknown key 'ranck', closest to 'rank'; .*targets, plain",
        ),
        ({"qgalore": {"rankk": 8}}, {}, "qgalore: unknown key 'rankk', closest to 'rank'; known"),
        ({"qgalore": {"rank": 8, "max_grad_norm": 1}}, {}, "'max_grad_norm'.* max_grad_norm is for TrainingArguments"),
        ({"qgalore": {"rank": 8, "plain": {"lrr": 1}}}, {}, "qgalore: plain: unknown key 'lrr', closest to 'lr'"),
        ({"qgalore": KEYS, "clips": 1.0}, {}, "give either qgalore"),
        ({"clips": None}, {}, r"the optimizer clips at max_grad_norm=None, the training arguments say 1\.0"),
        ({"sgd": True, "qgalore": KEYS}, {}, "trains with QGaLoreAdamW, and optimizers has a SGD"),
        ({"qgalore": KEYS}, {"optim": "adafactor"}, "optim='adafactor' is an optimizer of transformers"),
        ({"qgalore": KEYS}, {"fp16": True}, "fp16=True scales the loss"),
        ({"qgalore": KEYS}, {"torch_compile": True}, "torch_compile=True compiles the model alone"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    tmp_path: Path, own: dict[str, Any], args: dict[str, Any], message: str
) -> None:
    model, own = make(), dict(own)
    if "clips" in own:
        own["optimizers"] = optimizer_of(model, own.pop("clips"))
    if own.pop("sgd", False):
        own["optimizers"] = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(ValueError, match=message):
        Traced(model, arguments(tmp_path, **args), train_dataset=texts(8), **own)


def lines_of(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.message for record in caplog.records if words in record.message]


@pytest.mark.parametrize("quantised", [False, True])
def test_weights_that_are_not_quantised_are_told_once(
    tmp_path: Path, quantised: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make() if quantised else qg.dequantize_(make())
    with caplog.at_level(logging.WARNING, "qgalore_compile"):
        trainer = Traced(model, arguments(tmp_path), train_dataset=texts(8), qgalore=KEYS)
        trainer.create_optimizer()
    told = lines_of(caplog, "not INT8")
    if quantised:
        assert told == []
    else:
        (line,) = told
        words = r"its 7 linear weights take 7\.7 kB as float32, and as INT8 about 2\.0 kB; .*qg\.quantize_\(model\)"
        assert re.search(words, line)
        assert "\n" not in line


def test_a_model_that_quantize_would_not_take_is_not_told_to_be_quantised(caplog: pytest.LogCaptureFixture) -> None:
    _tell_float(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))
    assert lines_of(caplog, "not INT8") == []


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("rank", [4, 128])
def test_a_rank_that_projects_nothing_is_told_once_with_one_that_does(
    tmp_path: Path, rank: int, given: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    groups = qg.param_groups(model, rank=rank)
    own: dict[str, Any] = {"optimizers": (qg.QGaLoreAdamW(groups, max_grad_norm=1.0), None)}
    with caplog.at_level(logging.WARNING, "qgalore_compile"):
        trainer = Traced(model, arguments(tmp_path), train_dataset=texts(8),
                         **(own if given else {"qgalore": {"rank": rank}}))  # fmt: skip
        trainer.create_optimizer()
        trainer.create_optimizer()
    told = lines_of(caplog, "nothing is projected")
    if rank == 4:
        assert told == []
    else:
        (line,) = told
        assert "rank=128 reaches the smaller side, at most 16, of all 7 weights; give a smaller one" in line
        assert line.endswith("rank=4")
        assert "\n" not in line


def test_an_optimizer_without_a_rank_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    optimizer = qg.QGaLoreAdamW(model.parameters(), max_grad_norm=1.0)
    with caplog.at_level(logging.WARNING, "qgalore_compile"):
        Traced(model, arguments(tmp_path), train_dataset=texts(8), optimizers=(optimizer, None))
    (line,) = lines_of(caplog, "nothing is projected")
    assert "no group of the optimizer has a rank; qg.param_groups(model, rank=…)" in line


def test_micro_batches_of_a_step_that_was_broken_off_are_not_of_the_next(tmp_path: Path) -> None:
    trainer = Traced(make(), arguments(tmp_path), train_dataset=texts(8), qgalore=KEYS)
    trainer._whole = lambda batches, items: torch.tensor(float(len(batches)))
    trainer.optimizer = trainer.create_optimizer()
    for last in (False, False, True):  # a micro-batch of a step that ends there, then a step of two
        if not trainer._batches or last is False:
            trainer.get_batch_samples(iter([]), 0, "cpu")
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        loss = trainer.training_step(trainer.model, padded(texts(2)))
    assert float(loss) == 2


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    model = make()
    trainer = Traced(model, arguments(tmp_path), train_dataset=texts(8), qgalore=KEYS)
    before = copy.deepcopy(stored(model))
    with pytest.raises(ValueError, match=rf"has no {FILE}: QGaLoreTrainer did not write it"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(own, other) for own, other in zip(stored(model), before, strict=True))
