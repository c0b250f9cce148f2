"""``qg.check`` of one training step of many model families, built from tiny configurations: is each called right?

    python benchmarks/check_families.py [--only NAME …] [--precision float32 bfloat16 autocast] [--compile]

Each family and precision is one process, and its verdict is written at once to ``results/check-families.json``: what is
there is not run again (``--again`` does).  Needs transformers; diffusers and timm where they are to be had.  Without
``--compile`` the step goes through the backend's real passes and is then interpreted, which takes seconds where a
compiled step takes a minute; its programs are evaluated in PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import parser_of
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "check-families.json"
PRECISIONS = ("float32", "bfloat16", "autocast")
SECONDS = 900  # of one family; a compiled one takes two minutes on two cores

Batch = dict[str, Any]
Made = tuple[nn.Module, Batch]

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 12))


def pixels(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def language(name: str, head: str = "ForCausalLM", config: str = "", **keys: Any) -> Callable[[], Made]:
    """A family of transformers whose forward takes tokens and labels; ``config`` where its class has another name."""

    def make() -> Made:
        import transformers

        made = getattr(transformers, config or f"{name}Config")(**{**SMALL, **keys})
        made.use_cache = False
        ids = tokens()
        return getattr(transformers, f"{name}{head}")(made), {"input_ids": ids, "labels": ids}

    return make


def images(name: str, head: str = "ForImageClassification", size: int = 16, **keys: Any) -> Callable[[], Made]:
    """A family of transformers whose forward takes pixels and labels."""

    def make() -> Made:
        import transformers

        small: dict[str, Any] = dict(image_size=size, patch_size=4, num_labels=5, hidden_dropout_prob=0.0)
        if "depths" not in keys:  # which those with stages have instead
            small |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**{**small, **keys}))
        return model, {"pixel_values": pixels(size), "labels": torch.arange(2)}

    return make


class Loss(nn.Module):
    """A model and a loss, as transformers' models have theirs in them."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.of = loss

    def forward(self, **batch: Any) -> Tensor:
        return self.of(self.model, **batch)


def classified(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), labels)


def timm_model(name: str, **keys: Any) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=5, **keys)
        return Loss(model, classified), {"x": pixels(32), "labels": torch.arange(2)}

    return make


def mixer() -> Made:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=1, embed_dim=32)
    return Loss(model, classified), {"x": pixels(32), "labels": torch.arange(2)}


def noise_predicted(model: nn.Module, x: Tensor, noise: Tensor, times: Tensor, **keys: Any) -> Tensor:
    return nn.functional.mse_loss(model(x, times, **keys).sample[:, : noise.shape[1]].float(), noise.float())


def dit() -> Made:
    """A batch of one: every gradient of a modulation has rank 1, far below r."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    batch = {"x": torch.randn(1, 4, 8, 8), "noise": torch.randn(1, 4, 8, 8), "times": torch.tensor([3])}
    return Loss(model, noise_predicted), {**batch, "class_labels": torch.tensor([1])}


def unet() -> Made:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    batch = {"x": torch.randn(2, 3, 8, 8), "noise": torch.randn(2, 3, 8, 8), "times": torch.tensor([3, 5])}
    return Loss(model, noise_predicted), batch


def nerf() -> Made:
    """Positions in sines of doubling frequency, and a skip."""

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(39, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
            self.second = nn.Sequential(nn.Linear(103, 64), nn.ReLU(), nn.Linear(64, 4))

        def forward(self, x: Tensor) -> Tensor:
            waves = [f(2.0**i * x) for i in range(6) for f in (torch.sin, torch.cos)]
            encoded = torch.cat([x, *waves], -1)
            return self.second(torch.cat([self.first(encoded), encoded], -1))

    def loss(model: nn.Module, x: Tensor, colours: Tensor) -> Tensor:
        return nn.functional.mse_loss(torch.sigmoid(model(x)).float(), colours.float())

    return Loss(Field(), loss), {"x": torch.rand(64, 3) * 2 - 1, "colours": torch.rand(64, 4)}


def whisper() -> Made:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        d_model=32,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
        use_cache=False,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(2, 8, 32),
        "labels": tokens(),
    }


def clip() -> Made:
    import transformers

    text = dict(SMALL, projection_dim=16)
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=16,
    )
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    batch = {"input_ids": tokens(), "pixel_values": pixels(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    return model, {**batch, "return_loss": True}


def dinov2() -> Made:
    model, batch = images("Dinov2", mlp_ratio=2)()
    return model, batch


def convnext() -> Made:
    import transformers

    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=5, image_size=32
    )
    return transformers.ConvNextForImageClassification(config), {"pixel_values": pixels(32), "labels": torch.arange(2)}


FEW_HEADS = {"num_key_value_heads": 1, "head_dim": 16}
FAMILIES: dict[str, Callable[[], Made]] = {
    "llama": language("Llama", num_key_value_heads=1),
    "mistral": language("Mistral", num_key_value_heads=1),
    "qwen2": language("Qwen2", num_key_value_heads=1),
    "qwen3": language("Qwen3", **FEW_HEADS),
    "gemma": language("Gemma", **FEW_HEADS),
    "gemma2": language("Gemma2", query_pre_attn_scalar=16, **FEW_HEADS),
    "gemma3": language("Gemma3", config="Gemma3TextConfig", query_pre_attn_scalar=16, **FEW_HEADS),
    "gpt2": language("GPT2", "LMHeadModel", n_positions=32, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0,
                     embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt-neox": language("GPTNeoX"),
    "opt": language("OPT", ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "falcon": language("Falcon"),
    "phi": language("Phi"),
    "phi3": language("Phi3"),
    "olmo2": language("Olmo2"),
    "bert": language("Bert", "ForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "roberta": language("Roberta", "ForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "deberta": language("DebertaV2", "ForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "electra": language("Electra", "ForMaskedLM", embedding_size=16, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0),
    "albert": language("Albert", "ForMaskedLM", embedding_size=16),
    "distilbert": language("DistilBert", "ForMaskedLM", dim=32, hidden_dim=64, n_layers=1, n_heads=2, dropout=0.0,
                           attention_dropout=0.0),
    "modernbert": language("ModernBert", "ForMaskedLM"),
    "t5": language("T5", "ForConditionalGeneration", d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
                   dropout_rate=0.0, decoder_start_token_id=0),
    "bart": language("Bart", "ForConditionalGeneration", d_model=32, encoder_layers=1, decoder_layers=1,
                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
                     dropout=0.0),
    "whisper": whisper,
    "mixtral": language("Mixtral", num_key_value_heads=1, num_local_experts=4),
    "qwen3-moe": language("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **FEW_HEADS),
    "mamba": language("Mamba", state_size=8, expand=2),
    "vit": images("ViT"),
    "deit": images("DeiT"),
    "swin": images("Swin", embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=2, drop_path_rate=0.0),
    "convnext": convnext,
    "clip": clip,
    "dinov2": dinov2,
    "dit": dit,
    "unet": unet,
    "timm-vit": timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
    "timm-mixer": mixer,
    "timm-resnet": timm_model("resnet10t"),
    "nerf": nerf,
}  # fmt: skip


def step_of(name: str, precision: str) -> tuple[Callable[..., Tensor], Batch]:
    """A family's training step and its batch."""
    import qgalore_compile as qg

    torch.manual_seed(0)
    model, batch = FAMILIES[name]()
    if getattr(model, "loss_type", "") is None:  # else transformers says so in a log, at which Dynamo stops
        model.loss_type = "ForCausalLM"
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
        batch = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) > 8}
    if any(id(p) in linear for p in model.parameters()):
        groups = qg.param_groups(model, rank=8, targets=lambda _, m: id(m.weight) in linear, refresh="svd")
    else:
        groups = [{"params": list(model.parameters())}]
    opt = qg.QGaLoreAdamW(groups, lr=5e-3, weight_decay=0.01)

    def step(**batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            result = model(**batch)
        loss: Tensor = result if isinstance(result, Tensor) else result.loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step, batch


def one(name: str, precision: str, compiled: bool) -> dict[str, Any]:
    """The verdict on one family, or the error that came instead."""
    import qgalore_compile as qg

    backend: Any = "qgalore"
    if not compiled:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
        from support import Interpreted

        backend = Interpreted()
    began = time.monotonic()
    try:
        step, batch = step_of(name, precision)
        result = qg.check(step, backend=backend, **batch)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".strip()
        return {"verdict": "error", "error": said[:1500], "seconds": round(time.monotonic() - began, 1)}
    worst = result.worst
    return {
        "verdict": "ok" if result.ok else "wrong",
        "tensors": len(result.errors),
        "wrong": [f"{each.name}: {each.note}" for each in result.errors if not each.ok][:8],
        "worst": worst.name,
        "relative": float(f"{worst.relative:.3g}"),
        "allowed": float(f"{worst.tolerance:.3g}"),
        "gemms": result.precision,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--compile", action="store_true", help="generated code instead of an interpreted graph")
    parser.add_argument("--again", action="store_true", help="also what has a verdict")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.only[0], given.precision[0], given.compile)))
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    how = "compiled" if given.compile else "interpreted"
    for precision in given.precision:
        for name in given.only:
            key = f"{name} {precision} {how}"
            if key in results and not given.again:
                continue
            command = [sys.executable, __file__, "--one", "--only", name, "--precision", precision]
            environment = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **os.environ}
            try:
                done = subprocess.run(
                    [*command, *(["--compile"] if given.compile else [])],
                    capture_output=True,
                    text=True,
                    timeout=SECONDS,
                    env=environment,
                )
                failed = {"verdict": "error", "error": done.stderr[-1500:]}
                results[key] = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
            except subprocess.TimeoutExpired:
                results[key] = {"verdict": "error", "error": f"no end within {SECONDS} s"}
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            record = results[key]
            said = record.get("error", "; ".join(record.get("wrong", ()))) or record["worst"]
            print(f"{key:38} {record['verdict']:6} {record.get('seconds', 0):6} s  {said[:150]}", flush=True)


if __name__ == "__main__":
    main()
