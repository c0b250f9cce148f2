"""``qgalore export``: the model that ``qgalore train`` left in a folder, as transformers' LLaMA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgalore_compile.exports.model import export
from qgalore_compile.training.checkpoint_file import load_checkpoint
from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.data import check_lengths, load_corpus, training_batch
from qgalore_compile.training.llama import Llama, LlamaConfig
from qgalore_compile.training.pretrain import CHECKPOINT, resumed_config
from qgalore_compile.training.run import make_model
from qgalore_compile.training.saved_run import check_model


def export_run(
    run: str | Path, path: str | Path, *, data: str | None = None, sequences: int = 128, **options: Any
) -> list[Path]:
    """Write the model in a run's checkpoint so that ``LlamaForCausalLM.from_pretrained(path)`` loads it.

    Args:
        run: the folder that ``qgalore train --out`` wrote.
        path, options: those of :func:`qg.export`; calibration is made here, for "eora".
        data: text to calibrate on; None for the run's own, of which the training part is taken.
        sequences: of it, each of the run's length.

    Returns:
        The files written.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or what :func:`qg.export` refuses.
        OSError: a file cannot be written.
    """
    checkpoint = Path(run) / CHECKPOINT
    if not checkpoint.exists():
        raise ValueError(f"{run} holds no {CHECKPOINT}; name the folder that `qgalore train --out` wrote")
    config, model = load_run(Path(run))
    calibration = None
    if options.get("compensation") == "eora":
        calibration = calibration_batches(config, data, sequences)
    return export(AsTransformers(model), path, calibration=calibration, **options)


def load_run(run: Path) -> tuple[TrainConfig, Llama]:
    """Settings and trained model of a run's folder, on the CPU; errors as for :func:`export_run`."""
    config = replace(resumed_config(out=str(run)), device="cpu")
    saved = load_checkpoint(run / CHECKPOINT)["model"]
    model = make_model(config)
    check_model(saved, model)
    model.load_state_dict(saved)
    return config, model


def calibration_batches(config: TrainConfig, data: str | None, sequences: int) -> Iterator[Tensor]:
    """``sequences`` windows of the training part of the run's text, or of ``data``: (≤ batch, T) int64 each.

    Raises:
        ValueError: no such text, or too little of it.
    """
    corpus = load_corpus(config.data if data is None else data)
    check_lengths(corpus, config.seq)
    tokens, _ = training_batch(corpus.train, seed=config.seed, step=0, batch=sequences, seq=config.seq)
    return iter(tokens.split(config.batch))


class AsTransformers(nn.Module):
    """A :class:`Llama` under the names, and with the config, of transformers' ``LlamaForCausalLM``."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens, self.model.layers, self.model.norm = llama.embed_tokens, llama.layers, llama.norm
        self.lm_head = llama.lm_head
        self.config = _Config(llama.config)
        self._call = llama.forward  # a method, which registers nothing

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        return self._call(tokens)


class _Config:
    """As much of transformers' config as ``qg.export`` asks for; names that its versions 4 and 5 read."""

    dtype = torch.float32

    def __init__(self, llama: LlamaConfig) -> None:
        self._llama = llama

    def save_pretrained(self, folder: str) -> None:
        """Write ``config.json``."""
        llama = self._llama
        fields = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": llama.hidden_size, "intermediate_size": llama.intermediate_size,
            "num_attention_heads": llama.num_heads, "num_key_value_heads": llama.num_heads,
            "num_hidden_layers": llama.num_layers, "vocab_size": llama.vocab_size,
            "max_position_embeddings": llama.max_seq_len, "rms_norm_eps": llama.rms_norm_eps,
            "rope_theta": llama.rope_theta, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": llama.tied, "initializer_range": llama.initializer_range,
            "bos_token_id": None, "eos_token_id": None,  # tokens are bytes
            "torch_dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip
        (Path(folder) / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
