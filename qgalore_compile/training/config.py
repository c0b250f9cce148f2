"""The settings of a training run: their defaults, their checks, and which of them a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qgalore_compile.training.llama import LlamaConfig, find_preset

TRIGGERS = ("similarity", "energy")
NONFINITE = ("skip_step", "skip_parameter")
OPTIMIZERS = ("qgalore", "galore", "adamw")
BACKENDS = ("qgalore", "inductor", "eager")
DTYPES = ("float32", "bfloat16")

LARGEST = 2**31 - 1
"""Of settings that are counts: batches count steps in 32 bits."""
_FLOAT32 = (2.0**-149, (2 - 2.0**-23) * 2.0**127)  # the least number above 0, and the largest

# What a run may change when it goes on from a checkpoint; all else decides what the run computes. The data may have
# moved: whether it is the same text, its fingerprint says.
_FREE_ON_RESUME = frozenset(
    {"data", "out", "resume", "steps", "backend", "device", "eval_every", "log_every", "checkpoint_every"}
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `TrainConfig.from_preset` fills in what the model's size decides.

    Attributes:
        preset: the model, by its name in `llama.PRESETS`.
        steps, accumulate, batch, seq: optimizer steps; micro-batches of a step; sequences of one; tokens of a sequence.
        lr: peak learning rate.
        rank, update_proj_gap, scale, refresh, power_iterations, moments_on_refresh, similarity, max_gap, stagger,
            trigger, energy_threshold: group keys of the projected weights; "adamw" ignores them.
        optimizer: "qgalore" (INT8 weights, INT4 projectors, 8-bit moments), "galore" (the same in float) or "adamw"
            (full rank).
        backend: "qgalore" and "inductor" compile the training step, "eager" does not.
        max_grad_norm: clip to this global norm; None for no clipping.
        nonfinite: what a gradient that is not finite stops, "skip_step" or "skip_parameter"; "adamw" ignores it.
        dtype: of weights and activations, "float32" or "bfloat16".
        vocab_size: of embedding and head; bytes use the first 256.
        data: text file or folder; None for the source of the Python standard library.
        out: folder of checkpoint, metrics and curves.
        resume: continue from the checkpoint in `out`.
        device: "cpu", "cuda", …
        seed: of weights, batches and stochastic rounding.
        eval_every, log_every, checkpoint_every: in steps; log_every is for output that is not a terminal.
        eval_tokens: bytes of the validation split that an evaluation reads, always the same ones.
    """

    preset: str
    steps: int
    batch: int
    seq: int
    lr: float
    rank: int
    update_proj_gap: int
    scale: float = 0.25
    refresh: str = "randomized"
    power_iterations: int = 1
    moments_on_refresh: str = "keep"
    similarity: str = "subspace"
    max_gap: int | None = None
    stagger: bool = True
    trigger: str = "similarity"
    energy_threshold: float = 0.8
    accumulate: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    nonfinite: str = "skip_step"
    optimizer: str = "qgalore"
    backend: str = "qgalore"
    dtype: str = "float32"
    tied: bool = False
    vocab_size: int = 256
    data: str | None = None
    out: str = "runs/default"
    resume: bool = False
    device: str = "cpu"
    seed: int = 0
    eval_every: int = 50
    eval_tokens: int = 32_768
    log_every: int = 10
    checkpoint_every: int = 100

    @classmethod
    def from_preset(cls, preset: str | None = None, **options: Any) -> TrainConfig:
        """The preset's settings ("tiny" if None), `options` in place of them; a None leaves an option at its default.

        Raises:
            ValueError: no such preset, or a value out of its range.
        """
        preset = preset or "tiny"
        known = find_preset(preset)
        given = {name: value for name, value in options.items() if value is not None}
        optimizer, backend = given.get("optimizer", cls.optimizer), given.get("backend", cls.backend)
        defaults = {
            "steps": known.steps,
            "batch": known.batch,
            "seq": known.seq,
            "lr": known.adamw_lr if optimizer == "adamw" else known.lr,
            "rank": known.rank,
            "update_proj_gap": known.update_proj_gap,
            "out": f"runs/{preset}-{optimizer}-{backend}",
        }
        return cls(preset, **{**defaults, **given})

    def __post_init__(self) -> None:
        preset = find_preset(self.preset)
        for name, allowed in (("optimizer", OPTIMIZERS), ("backend", BACKENDS), ("dtype", DTYPES),
                              ("trigger", TRIGGERS), ("nonfinite", NONFINITE)):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{option(name)} {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for name in ("data", "out"):
            value = getattr(self, name)
            if value is not None and (not str(value) or "\0" in str(value)):
                raise ValueError(
                    f"{option(name)} {str(value)!r}: names no file or folder; leave it out for the default"
                )
        for name in ("steps", "batch", "seq", "accumulate", "rank", "update_proj_gap", "power_iterations", "max_gap",
                     "vocab_size", "eval_every", "eval_tokens", "log_every", "checkpoint_every"):  # fmt: skip
            value = getattr(self, name)
            if name == "max_gap" and value is None:
                continue
            if value < 1:
                raise ValueError(f"{option(name)} {value}: must be at least 1")
            if value > LARGEST:
                raise ValueError(f"{option(name)} {value}: must be at most {LARGEST}")
        for name in ("lr", "scale", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not _FLOAT32[0] <= value <= _FLOAT32[1]:
                raise ValueError(f"{option(name)} {value}: must be a number above 0, in float32 too")
        for name in ("weight_decay", "energy_threshold"):
            if not 0 <= getattr(self, name) <= _FLOAT32[1]:
                raise ValueError(f"{option(name)} {getattr(self, name)}: must be a number of at least 0")
        if self.max_gap is not None and self.max_gap < self.update_proj_gap:
            raise ValueError(
                f"--max-gap {self.max_gap}: must be at least --update-proj-gap, which is {self.update_proj_gap}"
            )
        if self.trigger == "energy" and self.similarity == "official":
            raise ValueError("--trigger energy is no part of the published rule, --similarity official; drop one")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: must be in 0 … 2**63 - 1")
        if self.vocab_size < 256:
            raise ValueError(f"--vocab-size {self.vocab_size}: tokens are bytes, so it must be at least 256")
        if self.seq > preset.model.max_seq_len:
            raise ValueError(
                f"--seq {self.seq}: the model of {self.preset!r} takes at most {preset.model.max_seq_len} tokens"
            )

    @property
    def model(self) -> LlamaConfig:
        """The shape of the model to train."""
        return dataclasses.replace(find_preset(self.preset).model, vocab_size=self.vocab_size, tied=self.tied)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step of the optimizer sees."""
        return self.accumulate * self.batch * self.seq

    def learning_rate_factor(self, step: int) -> float:
        """What step `step` (from 0) multiplies `lr` with: warm-up over the first tenth, then a cosine down to 0.1.

        The first step already moves (the authors' first factor is 0, a step that trains nothing).
        """
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))

    def check_resumable(self, saved: dict[str, Any], checkpoint: str) -> None:
        """ValueError naming the first option that differs from the checkpoint's config and may not."""
        for name, value in dataclasses.asdict(self).items():
            if name not in _FREE_ON_RESUME and saved.get(name, value) != value:
                raise ValueError(
                    f"{option(name)} {value} does not fit {checkpoint}, which was trained with {saved[name]}; "
                    "leave the option out to continue that run, or start another one with another --out"
                )


def option(name: str) -> str:
    """The command-line spelling of a field: `update_proj_gap` → `--update-proj-gap`."""
    return "--" + name.replace("_", "-")
