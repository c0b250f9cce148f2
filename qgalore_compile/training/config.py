"""The settings of a training run: their defaults, their checks, and which of them a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qgalore_compile.optim.rules import RULES
from qgalore_compile.optim.settings import KEYS, REQUIRED
from qgalore_compile.planning.cards import bad_amount
from qgalore_compile.training.llama import PRESETS, LlamaConfig, find_preset
from qgalore_compile.training.setting import LARGEST, MODEL, OUTPUT, STEP, Setting, of_group, of_run, option
from qgalore_compile.weights.tensor import bad_weight_format

# What a run may change when it goes on from a checkpoint; all else decides what the run computes. The data may have
# moved: whether it is the same text, its fingerprint says.
_FREE_ON_RESUME = frozenset(
    {"data", "out", "resume", "steps", "backend", "device", "budget", "eval_every", "log_every", "checkpoint_every"}
)


def _names_something(value: Any) -> str | None:
    if str(value) and "\0" not in str(value):
        return None
    return f"{str(value)!r}: names no file or folder; leave it out for the default"


def _holds_bytes(value: Any) -> str | None:
    if value < 256:
        return f"{value}: tokens are bytes, so it must be at least 256"
    return f"{value}: must be at most {LARGEST}" if value > LARGEST else None


def _seed(value: Any) -> str | None:
    return None if 0 <= value < 2**63 else f"{value}: must be in 0 … 2**63 - 1"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. `TrainConfig.from_preset` fills in what the model's size decides.

    Group keys are those of the projected weights (`qgalore_compile.optim.settings`), which "adamw" ignores, as it does
    `nonfinite`. `max_grad_norm` and `data` may be None.
    """

    preset: str = of_run(
        MODEL, str, REQUIRED, f"{', '.join(list(PRESETS)[:-1])} or {list(PRESETS)[-1]}.", otherwise="tiny"
    )
    data: str | None = of_run(
        MODEL,
        str,
        None,
        "Text file or folder to train on.",
        unset="the source of the Python standard library",
        check=_names_something,
    )
    seq: int = of_run(MODEL, int, REQUIRED, "Tokens (bytes) of a sequence.", least=1)
    batch: int = of_run(MODEL, int, REQUIRED, "Sequences of a micro-batch.", least=1)
    accumulate: int = of_run(MODEL, int, 1, "Micro-batches of a step.", least=1)
    tied: bool = of_run(MODEL, bool, False, "Share embedding and head.", switch="--tied/--untied")
    vocab_size: int = of_run(MODEL, int, 256, "Rows of embedding and head, at least 256.", check=_holds_bytes)
    dtype: str = of_run(MODEL, str, "float32", "Of weights and activations.", choices=("float32", "bfloat16"))

    optimizer: str = of_run(
        STEP,
        str,
        "qgalore",
        "qgalore: INT8 weights, INT4 projectors, 8-bit moments; galore: the same in float; adamw: full rank.",
        choices=("qgalore", "galore", "adamw"),
    )
    backend: str = of_run(
        STEP,
        str,
        "qgalore",
        "What compiles the step; eager compiles nothing.",
        choices=("qgalore", "inductor", "eager"),
    )
    lr: float = of_group("lr", default=REQUIRED, check=None, above=0, help="Peak learning rate.")
    plain_lr: float | None = of_run(
        STEP, float, None, "Peak learning rate of embedding, head and norms.", unset="that of the rest", above=0
    )
    rank: int = of_group(
        "rank",
        least=0,
        unset="",
        help="Rank of the projection, clipped to a weight's smaller side; 0: --rule muon takes all of the gradient.",
    )
    rule: str = of_group("rule", check=None, choices=tuple(RULES))
    momentum_format: str = of_group("momentum_format")
    update_proj_gap: int = of_group("update_proj_gap", default=REQUIRED)
    scale: float = of_group("scale", above=0)
    refresh: str = of_group("refresh")
    power_iterations: int = of_group("power_iterations")
    moments_on_refresh: str = of_group("moments_on_refresh")
    similarity: str = of_group("similarity")
    max_gap: int | None = of_group("max_gap")
    stagger: bool = of_group("stagger")
    trigger: str = of_group("trigger")
    energy_threshold: float = of_group("energy_threshold")
    weight_format: str | None = of_run(
        STEP,
        str,
        None,
        "How the blocks' weights are stored, such as 'e4m3' or 'nf4/64+double' (docs/formats.md); with qgalore alone.",
        unset="int8/256",
        check=bad_weight_format,
    )
    projector_format: str | None = of_group("projector_format", unset="int4 with qgalore, floats with galore")
    moments: str | None = of_group("moments", default=None, unset="8bit with qgalore, 32bit with galore")
    weight_decay: float = of_group("weight_decay", check=None, least=0, help="Decoupled, not on norms.")
    max_grad_norm: float | None = of_run(STEP, float, None, "Clip to this global norm.", unset="no clipping", above=0)
    nonfinite: str = of_run(
        STEP,
        str,
        "skip_step",
        "What a gradient that is not finite stops; skip_parameter takes less memory.",
        choices=("skip_step", "skip_parameter"),
    )

    steps: int = of_run(OUTPUT, int, REQUIRED, "Steps of the optimizer.", least=1)
    out: str = of_run(
        OUTPUT,
        str,
        "runs/default",
        "Folder of checkpoint, metrics and curves.",
        otherwise="runs/PRESET-OPTIMIZER-BACKEND",
        check=_names_something,
    )
    resume: bool = of_run(OUTPUT, bool, False, "Continue from the checkpoint in --out.", switch="--resume")
    seed: int = of_run(OUTPUT, int, 0, "Of weights, batches and rounding.", check=_seed)
    device: str = of_run(OUTPUT, str, "cpu", "cpu, cuda, …")
    budget: str | None = of_run(
        OUTPUT,
        str,
        None,
        "Memory that the run may take, such as 16GB: it does not start where the forecast is above.",
        unset="what the machine has",
        check=bad_amount,
    )
    eval_every: int = of_run(OUTPUT, int, 50, "Steps between evaluations.", least=1)
    eval_tokens: int = of_run(OUTPUT, int, 32_768, "Bytes that an evaluation reads.", least=1)
    log_every: int = of_run(OUTPUT, int, 10, "Steps between lines, where output is no terminal.", least=1)
    checkpoint_every: int = of_run(OUTPUT, int, 100, "Steps between checkpoints.", least=1)

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
        return cls(**{"preset": preset, **defaults, **given})

    def __post_init__(self) -> None:
        preset = find_preset(self.preset)
        for name, setting in settings().items():
            problem = setting.problem(getattr(self, name))
            if problem is not None:
                raise ValueError(f"{option(name)} {problem}")
        if self.max_gap is not None and self.max_gap < self.update_proj_gap:
            raise ValueError(
                f"--max-gap {self.max_gap}: must be at least --update-proj-gap, which is {self.update_proj_gap}"
            )
        if self.trigger == "energy" and self.similarity == "official":
            raise ValueError("--trigger energy is no part of the published rule, --similarity official; drop one")
        if self.seq > preset.model.max_seq_len:
            raise ValueError(
                f"--seq {self.seq}: the model of {self.preset!r} takes at most {preset.model.max_seq_len} tokens"
            )

    @property
    def model(self) -> LlamaConfig:
        """The shape of the model to train."""
        return dataclasses.replace(find_preset(self.preset).model, vocab_size=self.vocab_size, tied=self.tied)

    @property
    def projection(self) -> dict[str, Any]:
        """The keys of the projected group that the run sets."""
        keys = {name: getattr(self, name) for name in settings() if name in KEYS and KEYS[name].projected}
        return {**keys, "rank": self.rank or None}

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


def settings() -> dict[str, Setting]:
    """Every field of `TrainConfig` by name, in the order of the help."""
    return {each.name: each.metadata["setting"] for each in dataclasses.fields(TrainConfig)}
