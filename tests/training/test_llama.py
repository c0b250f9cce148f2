"""The model: what it computes is checked against transformers' LLaMA, its presets against the authors' configs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from qgalore_compile.training.llama import PRESETS, Llama, LlamaConfig, find_preset

SMALL = LlamaConfig(hidden_size=24, intermediate_size=42, num_heads=3, num_layers=2, vocab_size=67, max_seq_len=20)


def _tokens(batch: int = 2, seq: int = 11) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (batch, seq))


def _perturbed(config: LlamaConfig) -> Llama:
    """A model whose norms are not all ones, so that leaving one out shows."""
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_transformers_with_the_same_weights(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = _perturbed(dataclasses.replace(SMALL, tied=tied))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=SMALL.vocab_size,
            hidden_size=SMALL.hidden_size,
            intermediate_size=SMALL.intermediate_size,
            num_attention_heads=SMALL.num_heads,
            num_hidden_layers=SMALL.num_layers,
            max_position_embeddings=SMALL.max_seq_len,
            rms_norm_eps=SMALL.rms_norm_eps,
            tie_word_embeddings=tied,
        )
    )
    weights = ours.state_dict()
    theirs.load_state_dict({name if name == "lm_head.weight" else f"model.{name}": w for name, w in weights.items()})
    tokens = _tokens()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_cross_entropy_of_the_logits_in_float32() -> None:
    model, tokens, targets = _perturbed(SMALL).bfloat16(), _tokens(), _tokens()
    loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    assert model(tokens).dtype == torch.bfloat16
    expected = F.cross_entropy(model(tokens).double().view(-1, SMALL.vocab_size), targets.view(-1))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_position_does_not_see_those_after_it() -> None:
    model, tokens = _perturbed(SMALL), _tokens()
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % SMALL.vocab_size
    torch.testing.assert_close(model(tokens)[:, :6], model(changed)[:, :6])
    assert not torch.allclose(model(tokens)[:, 6:], model(changed)[:, 6:])


def test_rotary_positions_are_relative() -> None:
    """The first layer's attention between two tokens depends on their distance: shifting a pair shifts nothing else."""
    from qgalore_compile.training.llama import rotary_tables, rotate

    cos, sin = rotary_tables(16, 8, 10_000.0)
    q, k = torch.randn(8), torch.randn(8)
    scores = (rotate(q.expand(16, 8), cos, sin) @ rotate(k.expand(16, 8), cos, sin).T).double()
    for distance in (-3, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embedding() -> None:
    tied = Llama(dataclasses.replace(SMALL, tied=True))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    untied = Llama(SMALL)
    assert untied.lm_head.weight is not untied.embed_tokens.weight


def test_a_seed_decides_the_weights() -> None:
    torch.manual_seed(7)
    first = Llama(SMALL).state_dict()
    torch.manual_seed(7)
    again = Llama(SMALL).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "shape", "rank", "lr", "gap", "parameters"),
    [  # hidden, intermediate, heads, layers: configs/llama_*.json of VITA-Group/Q-GaLore; parameters: transformers'
        ("35m", (384, 1024, 8, 6), 96, 0.015, 200, 35_197_824),
        ("60m", (512, 1376, 8, 8), 128, 0.015, 200, 58_073_600),
        ("130m", (768, 2048, 12, 12), 256, 0.015, 200, 134_105_856),
        ("350m", (1024, 2736, 16, 24), 256, 0.01, 200, 367_969_280),
        ("1b", (2048, 5461, 32, 24), 512, 0.01, 200, 1_339_082_752),
        ("7b", (4096, 11008, 32, 32), 1024, 0.004, 500, 6_738_415_616),
    ],
)
def test_presets_are_the_authors(
    name: str, shape: tuple[int, ...], rank: int, lr: float, gap: int, parameters: int
) -> None:
    preset = PRESETS[name]
    config = preset.model
    assert (config.hidden_size, config.intermediate_size, config.num_heads, config.num_layers) == shape
    assert (preset.rank, preset.lr, preset.update_proj_gap) == (rank, lr, gap)
    with torch.device("meta"):
        model = Llama(dataclasses.replace(config, vocab_size=32_000))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["tiny", "35m"])
def test_presets_without_a_script_have_a_rank_of_a_quarter_of_their_width(name: str) -> None:
    assert 4 * PRESETS[name].rank == PRESETS[name].model.hidden_size


def test_an_unknown_preset_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'2b'.*tiny, 35m, 60m, 130m, 350m, 1b, 7b"):
        find_preset("2b")


def test_a_sequence_beyond_the_rotary_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="21 tokens is longer than max_seq_len 20"):
        Llama(SMALL)(_tokens(seq=21))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_size 24 over num_heads 5.*multiple of 10"):
        dataclasses.replace(SMALL, num_heads=5)


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers is 0"):
        dataclasses.replace(SMALL, num_layers=0)
