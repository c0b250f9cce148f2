"""Whole training steps of real models: every projected layer is matched, and no full-rank gradient exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Interpreted
from torch import Tensor, fx, nn

import qgalore_compile as qg
from qgalore_compile.kernels import ops
from qgalore_compile.passes.nodes import shape
from qgalore_compile.training.llama import Llama, LlamaConfig

VOCABULARY = 97
TOKENS = (3, 5)  # 15 tokens: no size of a weight, so that an activation is not taken for a gradient
GEMMS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
)


def transformers_llama(*, layers: int, tied: bool) -> nn.Module:
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(
        Config(
            hidden_size=32,
            intermediate_size=84,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


def own_llama(*, layers: int, tied: bool) -> nn.Module:
    return Llama(LlamaConfig(32, 84, 4, layers, VOCABULARY, tied=tied))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch, batch) if isinstance(model, Llama) else model(input_ids=batch, labels=batch).loss


def final_graph(model: nn.Module, *, micro_batches: int, autocast: bool) -> fx.GraphModule:
    """What is left of a whole step after all passes; the step has run once, its refreshes included."""
    qg.quantize_(model, group_size=16)
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=8, quant_group_size=16), max_grad_norm=1.0)

    def step(*batches: Tensor) -> Tensor:
        total = torch.zeros(())
        for batch in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = loss_of(model, batch) / len(batches)
            loss.backward()
            total = total + loss.detach()
        opt.step()
        opt.zero_grad()
        return total

    backend = Interpreted(strict=True, outline=False)  # products are counted where they stand
    loss = torch.compile(step, backend=backend, fullgraph=True)(
        *(torch.randint(0, VOCABULARY, TOKENS) for _ in range(micro_batches))
    )
    assert loss.isfinite()
    assert backend.count == 1
    return backend.graphs[0]


def gemm_shapes(graph: fx.Graph) -> list[tuple[int, ...]]:
    return [tuple(node.meta["val"].shape) for node in graph.nodes if node.target in GEMMS]


FP32, BF16 = torch.float32, torch.bfloat16
# Two layers share their functions and hand each other a gradient, two micro-batches gather theirs; more of either is
# the same once more.  What takes longer, up to a minute and a half each, runs with `pytest --fuzz 1`.
LLAMAS: list[tuple[str, Callable[..., nn.Module], torch.dtype, int, int, bool, bool]] = [
    # id, model, dtype, layers, micro-batches, tied, autocast
    ("hf-fp32", transformers_llama, FP32, 4, 1, False, False),
    ("hf-bf16-2-tied", transformers_llama, BF16, 2, 2, True, False),
    ("own-autocast-2", own_llama, FP32, 2, 2, False, True),
]
MORE_LLAMAS: list[tuple[str, Callable[..., nn.Module], torch.dtype, int, int, bool, bool]] = [
    ("hf-bf16-4-tied", transformers_llama, BF16, 4, 4, True, False),
    ("own-autocast-4", own_llama, FP32, 4, 4, False, True),
    ("own-bf16-tied", own_llama, BF16, 4, 1, True, False),
    ("own-fp32", own_llama, FP32, 4, 1, False, False),
    ("hf-autocast-tied", transformers_llama, FP32, 4, 1, True, True),
]


@pytest.mark.parametrize(
    ("build", "dtype", "layers", "micro_batches", "tied", "autocast"),
    [
        *(pytest.param(*each, id=name) for name, *each in LLAMAS),
        *(pytest.param(*each, id=name, marks=pytest.mark.more) for name, *each in MORE_LLAMAS),
    ],
)
@pytest.mark.slow
def test_no_full_rank_gradient_is_formed_in_a_llama(
    build: Callable[..., nn.Module], dtype: torch.dtype, layers: int, micro_batches: int, tied: bool, autocast: bool
) -> None:
    gm = final_graph(build(layers=layers, tied=tied).to(dtype), micro_batches=micro_batches, autocast=autocast)
    widths = (16, 32, 84) if build is transformers_llama else (32, 84)
    weights = {(m, n) for m in widths for n in widths} - {(16, 16), (84, 84), (16, 84), (84, 16)}

    # the graph itself holds no product that is shaped like a weight, and neither do the products made opaque
    for graph in (gm.graph, *(body.graph for _, body in gm.named_children())):
        assert not weights & set(gemm_shapes(graph))
    assert not weights & {shape(node) for node in gm.graph.find_nodes(op="call_function", target=ops.gemm)}

    # each of the seven matrices of a layer is written by one product with its write-back
    assert len(gm.graph.find_nodes(op="call_function", target=ops.run_gemm)) == 7 * layers


# -- other models: matched, or told why not ---------------------------------------------------------------------------


def explained(model: nn.Module, groups: list[dict[str, Any]], loss: Callable[..., Tensor], *batch: Tensor) -> qg.Report:
    opt = qg.QGaLoreAdamW(groups)

    def step(*given: Tensor) -> Tensor:
        value = loss(*given)
        value.backward()
        opt.step()
        opt.zero_grad()
        return value.detach()

    return qg.explain(step, *batch)


def test_the_transposed_weights_of_gpt2_are_matched() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=1,
            n_head=4,
            vocab_size=VOCABULARY,
            n_positions=16,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    model.loss_type = "ForCausalLM"  # else transformers logs once that it guessed it, which breaks the graph
    weights = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in weights], "param_names": list(weights), "rank": 8},
        {
            "params": [p for name, p in named.items() if name not in weights],
            "param_names": [name for name in named if name not in weights],
        },
    ]
    batch = torch.randint(0, VOCABULARY, TOKENS)
    report = explained(model, groups, lambda tokens: model(input_ids=tokens, labels=tokens).loss, batch)
    matched = [layer for layer in report.layers if layer["matched"]]
    assert {layer["name"].partition("transformer.")[2] for layer in matched} == {
        name.removeprefix("transformer.") for name in weights
    }
    assert all(layer["reassociated"] for layer in matched)


def test_a_vision_transformer_with_biases_is_matched() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    qg.quantize_(model, group_size=16)
    report = explained(
        model,
        qg.param_groups(model, rank=8),
        lambda images, labels: model(pixel_values=images, labels=labels).loss,
        torch.randn(2, 3, 16, 16),
        torch.tensor([1, 2]),
    )
    matched = [layer for layer in report.layers if layer["matched"]]
    assert len(matched) == 6
    assert all(layer["reassociated"] for layer in matched)


def test_a_mixture_of_experts_is_matched_but_for_its_three_dimensional_experts_which_are_told_what_to_change() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            vocab_size=VOCABULARY,
            use_cache=False,
        )
    )
    qg.quantize_(model, group_size=16)
    batch = torch.randint(0, VOCABULARY, TOKENS)
    report = explained(
        model, qg.param_groups(model, rank=8), lambda tokens: model(input_ids=tokens, labels=tokens).loss, batch
    )
    matched = [layer["name"].split(".")[-2] for layer in report.layers if layer["matched"]]
    assert matched == ["q_proj", "k_proj", "v_proj", "o_proj"]
    experts = [layer for layer in report.layers if "experts" in layer["name"]]
    assert len(experts) == 2
    assert all("keep each of its matrices in a parameter of its own" in layer["reason"] for layer in experts)


class Experts(nn.Module):
    """A dense mixture: every expert an nn.Linear of its own, weighted by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(20, 3)
        self.experts = nn.ModuleList(nn.Linear(20, 20) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)).square().mean()


def test_experts_that_are_linear_layers_are_matched() -> None:
    model = Experts()
    report = explained(model, qg.param_groups(model, rank=4), model, torch.randn(*TOKENS, 20))
    matched = [layer for layer in report.layers if layer["matched"]]
    assert [layer["name"].partition(".")[2] for layer in matched] == [f"experts.{index}.weight" for index in range(3)]
    assert all(layer["reassociated"] for layer in matched)
