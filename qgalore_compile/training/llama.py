"""A LLaMA in plain PyTorch: the model of the main job.

Architecture: Touvron et al., *LLaMA* (arXiv 2302.13971): RMSNorm, rotary embeddings, SwiGLU, causal attention, no
biases. Module names are those of `transformers`' `LlamaForCausalLM` without the leading `model.`, so that weights
travel both ways by name. Presets: `configs/llama_*.json` and `scripts/pretrain_c4/*.sh` of VITA-Group/Q-GaLore.

Shape suffixes: B batch, T sequence, D hidden, I intermediate, H heads, K head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model; two equal configs give models with equal `state_dict` keys and shapes.

    `max_seq_len` is the longest sequence that the rotary tables cover, in tokens.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    vocab_size: int = 256
    max_seq_len: int = 1024
    tied: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_heads", "num_layers", "vocab_size", "max_seq_len"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"LlamaConfig.{name} is {value}; it must be at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} gives no even head size, which the "
                f"rotary embedding needs; choose hidden_size as a multiple of {2 * self.num_heads}"
            )

    @property
    def head_size(self) -> int:
        """Elements of a query, key or value vector."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Preset:
    """A model shape with the settings that train it.

    `rank`, `lr`, `update_proj_gap` and `steps` are those of the authors' scripts where they have one; `adamw_lr` is for
    the full-rank baseline, whose update is not scaled by α = 0.25 and projected, and so needs a smaller rate.
    The authors' total batch is 512 sequences of 256 tokens on several GPUs; `batch` is what one machine holds.
    """

    model: LlamaConfig
    rank: int
    lr: float
    adamw_lr: float
    update_proj_gap: int
    steps: int
    batch: int
    seq: int


PRESETS: dict[str, Preset] = {
    # Two layers: on two busy cores four compile for 190 s and train 300 steps in 160 s, two for 110 s and in 85 s, and
    # reach 1.49 against 1.45 nats per byte. The rank is a quarter of the hidden size, as in 60m and 350m.
    "tiny": Preset(LlamaConfig(192, 512, 4, 2), 48, 0.015, 0.001, 100, steps=300, batch=16, seq=128),
    # A shape of the authors' without a script of theirs: rank a quarter of the width, the rest as in 60m. Its name is
    # its size with 32,000 tokens, as in the others; with bytes it has 10.8 M parameters, which two cores can train.
    "35m": Preset(LlamaConfig(384, 1024, 8, 6), 96, 0.015, 0.001, 200, steps=10_000, batch=16, seq=256),
    "60m": Preset(LlamaConfig(512, 1376, 8, 8), 128, 0.015, 0.001, 200, steps=10_000, batch=16, seq=256),
    "130m": Preset(LlamaConfig(768, 2048, 12, 12), 256, 0.015, 0.001, 200, steps=20_000, batch=16, seq=256),
    "350m": Preset(LlamaConfig(1024, 2736, 16, 24), 256, 0.01, 0.001, 200, steps=60_000, batch=16, seq=256),
    # GaLore trains 1B at rank 512, Q-GaLore's script at 1024: the smaller one is the claim worth holding.
    "1b": Preset(LlamaConfig(2048, 5461, 32, 24), 512, 0.01, 0.0005, 200, steps=100_000, batch=16, seq=256),
    "7b": Preset(
        LlamaConfig(4096, 11008, 32, 32, max_seq_len=2048), 1024, 0.004, 0.0003, 500, steps=150_000, batch=16, seq=256
    ),
}


def find_preset(name: str) -> Preset:
    """`PRESETS[name]`; ValueError that lists the names for one that is not there."""
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def move_(model: Model, dtype: torch.dtype, device: str | None = None) -> Model:
    """``model.to(device, dtype)``, which cannot do it to fake parameters; returns the model."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(device, dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device, dtype))
    return model


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, over the last dimension; computed in fp32 up to the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x normalised, in x's dtype."""
        x_f32 = x.float()
        normed = x_f32 * torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_tables(seq_len: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position · theta^(-2i/K), each (T, K) fp32; the second half of K repeats the first."""
    inverse_frequency = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32), inverse_frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+K/2}) by the angle of their position: the pairing that `transformers` uses."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK + torch.cat((-second, first), dim=-1) * sin_TK


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        batch, seq, _ = x_BTD.shape
        return x_BTD.view(batch, seq, self.num_heads, self.head_size).transpose(1, 2)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D), with the tables of `rotary_tables`."""
        q_BHTK = rotate(self._heads(self.q_proj(x_BTD)), cos_TK, sin_TK)
        k_BHTK = rotate(self._heads(self.k_proj(x_BTD)), cos_TK, sin_TK)
        v_BHTK = self._heads(self.v_proj(x_BTD))
        out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.o_proj(out_BHTK.transpose(1, 2).reshape(x_BTD.shape))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D), with the tables of `rotary_tables`."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TK, sin_TK)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The language model. Weights are drawn from torch's global generator: seed it for a reproducible model.

    Every linear and embedding weight starts as N(0, initializer_range²), every norm as ones: transformers' choice, and
    so the authors'.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        # Tables, not arithmetic in forward: a compiler would inline cos and sin into every reader, layer by layer.
        # Not persistent: they follow from the config.
        cos_TK, sin_TK = rotary_tables(config.max_seq_len, config.head_size, config.rope_theta)
        self.register_buffer("rotary_cos", cos_TK, persistent=False)
        self.register_buffer("rotary_sin", sin_TK, persistent=False)
        for module in self.modules():
            if module is not self:  # whose tables are there
                self.initialize(module)

    @torch.no_grad()
    def initialize(self, module: nn.Module) -> None:
        """Write into a module of a model on the meta device what `Llama(config)` gives it: the function that
        `qgalore_compile.initialize_` asks for. The draws come in another order than those of `Llama(config)`."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Llama):
            tables = rotary_tables(self.config.max_seq_len, self.config.head_size, self.config.rope_theta)
            for buffer, table in zip((module.rotary_cos, module.rotary_sin), tables, strict=True):
                buffer.copy_(table)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) in the model's dtype or, given targets, their mean cross-entropy: 0-d fp32, nats per token.

        `tokens` and `targets` are (B, T) int64; targets[b, t] is the token that follows tokens[b, : t + 1].
        T above `max_seq_len` raises ValueError.
        """
        seq = tokens.shape[1]
        if seq > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {seq} tokens is longer than max_seq_len {self.config.max_seq_len}; "
                "shorten it or build the model with a larger LlamaConfig.max_seq_len"
            )
        cos_TK, sin_TK = self.rotary_cos[:seq], self.rotary_sin[:seq]
        x_BTD = self.embed_tokens(tokens)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TK, sin_TK)
        logits_BTV: Tensor = self.lm_head(self.norm(x_BTD))
        if targets is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets.flatten())
