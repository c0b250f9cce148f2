"""A float checkpoint streamed into INT8 is what loading it in float and quantising gives; misfits are told first."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.weights import filling

transformers = pytest.importorskip("transformers")


def config(**keys: Any) -> Any:
    own = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return transformers.LlamaConfig(**{**own, "num_attention_heads": 2, "num_key_value_heads": 1, **keys})


def saved(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **keys: Any) -> Any:
    """A model whose checkpoint is in the folder."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config(**keys)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def parts(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a model stores, the parts of its quantised weights one by one."""
    found: dict[str, Tensor] = {}
    for name, value in [*model.state_dict().items(), *model.named_buffers()]:
        if isinstance(value, qg.Int8Weight):
            found |= {f"{name}.{part}": getattr(value, part) for part in ("codes", "scale", "offset")}
        else:
            found[name] = value
    return found


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    own, other = parts(found), parts(expected)
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "2KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_loads_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, shard: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(filling, "BLOCK", 24)
    saved(tmp_path, dtype, shard, tie_word_embeddings=tied)
    expected = qg.quantize_(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), group_size=4)
    found = qg.load_pretrained(transformers.AutoModelForCausalLM, tmp_path, group_size=4)
    assert_same(found, expected)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert found.training


def test_a_dtype_of_ones_own_is_that_of_the_floats_and_of_what_weights_dequantise_to(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = qg.quantize_(transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert_same(qg.load_pretrained(transformers.LlamaForCausalLM, tmp_path, dtype=torch.bfloat16), expected)


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(dtype)


def written(model: nn.Module, path: Path) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, path)
    return state


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "on meta": lambda model: copy.deepcopy(model).to("meta"),
    "with values": lambda model: plain(),
    "quantised on meta": lambda model: qg.quantize_(copy.deepcopy(model).to("meta"), group_size=4),
    "quantised": lambda model: qg.quantize_(plain(), group_size=4),
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_model_takes_one_file(tmp_path: Path, kind: str) -> None:
    model = plain()
    written(model, tmp_path / "mine.safetensors")
    other = MODELS[kind](model)
    keys = {} if "quantised" in kind else {"group_size": 4}
    found = qg.load_pretrained(other, tmp_path / "mine.safetensors", **keys)
    assert found is other
    assert_same(found, qg.quantize_(model, group_size=4))


def test_a_base_model_takes_a_whole_ones_file_and_the_other_way_round(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", tie_word_embeddings=True)
    base = qg.load_pretrained(transformers.LlamaModel, tmp_path / "whole")
    assert torch.equal(base.embed_tokens.weight, whole.model.embed_tokens.weight)
    whole.model.save_pretrained(tmp_path / "base")
    again = qg.load_pretrained(transformers.LlamaForCausalLM, tmp_path / "base")
    assert torch.equal(again.lm_head.weight, whole.lm_head.weight)


# -- refused ----------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> tuple[nn.Module, Path]:
    """A model on the meta device, and a file that is not quite its own."""
    model, path = plain(), tmp_path / "model.safetensors"
    state = written(model, path)
    change(state)
    save_file(state, path)
    return model.to("meta"), tmp_path


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "lacks": (lambda state: state.pop("1.weight"), r"it lacks 1\.weight"),
    "more": (lambda state: state.update(extra=torch.ones(2)), "the model lacks extra"),
    "shape": (lambda state: state.update({"3.weight": torch.ones(3, 8)}), r"3\.weight is \(3, 8\) and \(3, 7\) in"),
    "kind": (
        lambda state: state.update({"3.weight": torch.ones(3, 7).int()}),
        r"3\.weight is I32 and float32 in",
    ),
    "count": (lambda state: state.update({"2.num_batches_tracked": torch.tensor(2.5)}), "tracked is F32 and int64 in"),
    "nan": (lambda state: state.update({"3.weight": torch.full((3, 7), torch.nan)}), r"3\.weight of shape \(3, 7\) ho"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("real", [False, True])
def test_a_file_that_does_not_fit_is_told_and_nothing_is_loaded(tmp_path: Path, misfit: str, real: bool) -> None:
    change, message = MISFITS[misfit]
    model, folder = broken(tmp_path, change)
    model = qg.quantize_(plain() if real else model, group_size=4)
    before = {name: value.clone() for name, value in parts(model).items()}
    with pytest.raises(ValueError, match=message):
        qg.load_pretrained(model, folder)
    for name, value in parts(model).items():
        assert value.is_meta if not real else torch.equal(value, before[name]), name


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    saved(tmp_path, shard="2KB")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    (tmp_path / names[0]).unlink()
    with pytest.raises(ValueError, match=f"names {names[0]}, which is not there; fetch all shards"):
        qg.load_pretrained(transformers.LlamaForCausalLM, tmp_path)


def test_a_folder_without_weights_is_told_and_what_is_pickled_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        qg.load_pretrained(plain(), tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is pickled: save it anew with safetensors"):
        qg.load_pretrained(plain(), tmp_path)


def test_a_damaged_file_or_index_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        qg.load_pretrained(plain(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is no index of shards"):
        qg.load_pretrained(plain(), tmp_path)


def test_a_buffer_that_no_file_holds_and_nothing_computes_is_named(tmp_path: Path) -> None:
    class Tabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 7)
            self.register_buffer("table", torch.ones(3), persistent=False)

    written(Tabled(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Tabled()
    with pytest.raises(ValueError, match="nothing gives values to table, which no file holds"):
        qg.load_pretrained(model, tmp_path, targets=["layer"])
    assert model.layer.weight.is_meta


def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"is quantised already \(gptq\)"):
        qg.load_pretrained(transformers.LlamaForCausalLM, tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(TypeError, match="takes a model or a class of transformers, not str"):
        qg.load_pretrained("Llama", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Linear has no from_config"):
        qg.load_pretrained(nn.Linear, tmp_path)


def test_settings_that_say_nothing_to_this_model_are_refused(tmp_path: Path) -> None:
    written(plain(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="quantised already: leave group_size"):
        qg.load_pretrained(qg.quantize_(plain()), tmp_path, group_size=8)
    with pytest.raises(ValueError, match="dtype is for a model that is built here"):
        qg.load_pretrained(plain(), tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("same", [True, False])
def test_a_file_with_two_values_for_a_tied_tensor_is_refused(tmp_path: Path, same: bool) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone() + (0 if same else 1)
    save_file(state, tmp_path / "model.safetensors")
    if same:
        qg.load_pretrained(transformers.LlamaForCausalLM, tmp_path)
        return
    with pytest.raises(ValueError, match=r"have different values in the checkpoint, and are one tensor in LlamaFor"):
        qg.load_pretrained(transformers.LlamaForCausalLM, tmp_path)


def test_an_index_that_was_left_behind_counts_for_nothing(tmp_path: Path) -> None:
    saved(tmp_path, shard="2KB", rms_norm_eps=1e-5)
    model = saved(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "model.safetensors")
    found = qg.load_pretrained(transformers.LlamaForCausalLM, tmp_path, group_size=4)
    assert_same(found, qg.quantize_(model, group_size=4))


def test_what_cannot_be_quantised_in_the_models_own_dtype_is_told_first(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = written(model, tmp_path / "model.safetensors")
    state["1.weight"] = torch.full((4, 4), 1e5)  # infinite in float16
    save_file(state, tmp_path / "model.safetensors")
    own = qg.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half(), group_size=4)
    before = {name: value.clone() for name, value in parts(own).items()}
    with pytest.raises(ValueError, match=r"1\.weight of shape \(4, 4\) holds NaN or Inf"):
        qg.load_pretrained(own, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in parts(own).items())


def test_a_model_that_fails_is_not_left_quantised(tmp_path: Path) -> None:
    model, folder = broken(tmp_path, lambda state: state.update({"3.weight": torch.full((3, 7), torch.nan)}))
    with pytest.raises(ValueError, match="holds NaN"):
        qg.load_pretrained(model, folder)
    assert not any(isinstance(each, qg.Int8Weight) for each in model.parameters())


def test_an_architectures_own_float32_and_its_generation_config_are_kept(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    expected = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    found = qg.load_pretrained(transformers.T5ForConditionalGeneration, tmp_path, dtype=torch.float16)
    kinds = [{name: each.dtype for name, each in of.named_parameters()} for of in (found, expected)]
    assert kinds[0] == kinds[1]
    assert found.generation_config.temperature == 0.3


def test_a_file_says_its_dtype_where_the_config_does_not(tmp_path: Path) -> None:
    saved(tmp_path, torch.bfloat16)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "dtype"}))
    assert qg.load_pretrained(transformers.LlamaForCausalLM, tmp_path).dtype == torch.bfloat16
