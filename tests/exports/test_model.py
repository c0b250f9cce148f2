"""``qg.export``: floats under the original names, loaded by transformers; what cannot be done is refused at once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from int8 import Tiny, int8
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile import files
from qgalore_compile.exports import load_quantised

TOKENS = torch.arange(10).view(2, 5)


def written(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float32, torch.bfloat16])
def test_the_file_has_the_names_and_the_decoded_weights(dtype: Any, tmp_path: Path) -> None:
    model = qg.quantize_(Tiny(), group_size=5)
    expected = {name: value.dequantize() if isinstance(value, qg.Int8Weight) else value.clone()
                for name, value in model.state_dict().items()}  # fmt: skip
    assert qg.export(model, tmp_path / "out", dtype=dtype) == [tmp_path / "out" / "model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    as_asked = getattr(torch, str(dtype).removeprefix("torch."))
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(as_asked)), name
    assert isinstance(int8(model.blocks[0]["q_proj"]), qg.Int8Weight)  # type: ignore[index, arg-type]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_bfloat16_is_the_default_and_a_path_may_be_one_file(tmp_path: Path) -> None:
    assert qg.export(Tiny(), tmp_path / "new" / "a.safetensors") == [tmp_path / "new" / "a.safetensors"]
    assert written(tmp_path) == ["new", "new/a.safetensors"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "new" / "a.safetensors").values()} == {torch.bfloat16}


def test_weights_decode_straight_into_the_files_dtype(tmp_path: Path) -> None:
    """A bfloat16 model's INT8 weight has more digits than bfloat16, and a float32 file keeps them."""
    model = qg.quantize_(Tiny().bfloat16())
    qg.export(model, tmp_path / "a.safetensors", dtype="float32")
    weight = int8(model.blocks[0]["q_proj"])  # type: ignore[index, arg-type]
    found = load_file(tmp_path / "a.safetensors")["blocks.0.q_proj.weight"]
    assert torch.equal(found, weight.dequantize(torch.float32))
    assert not torch.equal(found, weight.dequantize().float())


def test_integer_buffers_keep_their_dtype(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    qg.export(model, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert found["1.running_mean"].dtype == torch.bfloat16


class Tied(nn.Module):
    """An embedding that is the head, too, and two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.blocks[1].weight = self.blocks[0].weight
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("quantised", [False, True])
def test_tied_weights_are_stored_once_and_load_into_a_tied_model(quantised: bool, tmp_path: Path) -> None:
    model = Tied()
    if quantised:
        qg.quantize_(model)
    qg.export(model, tmp_path / "a.safetensors", dtype="float32")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["blocks.0.weight", "embed.weight"]
        assert file.metadata() == {
            "format": "pt", "blocks.1.weight": "blocks.0.weight", "head.weight": "embed.weight",
        }  # fmt: skip
    other = Tied()
    load_model(other, tmp_path / "a.safetensors")
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_parameters_over_the_same_memory_are_tied_and_views_of_it_are_not(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    memory = torch.randn(4, 4)
    for index, part in enumerate((memory, memory, memory[:2])):
        model[index].weight = nn.Parameter(part)
    qg.export(model, tmp_path / "a.safetensors", dtype="float32")
    found = load_file(tmp_path / "a.safetensors")
    assert sorted(found) == ["0.weight", "2.weight"]
    assert torch.equal(found["2.weight"], memory[:2])


def test_wrappers_leave_no_trace_in_the_names(tmp_path: Path) -> None:
    model = Tiny()
    names = set(model.state_dict())
    model.blocks[0]["q_proj"] = torch.compile(model.blocks[0]["q_proj"])  # type: ignore[index, operator]
    qg.export(nn.DataParallel(torch.compile(model)), tmp_path / "a.safetensors")  # type: ignore[arg-type]
    assert set(load_file(tmp_path / "a.safetensors")) == names


# -- transformers ------------------------------------------------------------------------------------------------------


def llama(tied: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return qg.quantize_(transformers.LlamaForCausalLM(config), group_size=20)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_loads_it_with_equal_logits(tied: bool, size: str, tmp_path: Path) -> None:
    model = llama(tied)
    paths = qg.export(model, tmp_path, dtype="float32", max_shard_size=size)
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert (len(paths) > 3) == ((tmp_path / "model.safetensors.index.json").exists()) == (size == "20KB")
    assert sorted(paths) == sorted(tmp_path.iterdir())


def test_the_config_says_the_files_dtype_and_the_models_stays(tmp_path: Path) -> None:
    model = llama()
    before = model.config.to_dict()
    qg.export(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert type(model).from_pretrained(tmp_path).dtype == torch.bfloat16
    assert model.config.to_dict() == before


# -- 4 bits ------------------------------------------------------------------------------------------------------------


def calibration() -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(17, (8, 16), generator=generator) for _ in range(3))


@pytest.mark.parametrize("options", [
    {},
    {"compensation": "lorc", "rank": 4},
    {"compensation": "eora", "rank": 4},
], ids=["codes", "lorc", "eora"])  # fmt: skip
def test_four_bits_are_near_and_a_compensation_nearer(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = qg.quantize_(Tiny(), group_size=5)
    given = {"calibration": calibration()} if options.get("compensation") == "eora" else {}
    qg.export(model, tmp_path, bits=4, group_size=8, dtype="float32", **options, **given)
    other = Tiny()
    other.load_state_dict(load_quantised(tmp_path))
    for name, value in model.state_dict().items():
        loaded = other.state_dict()[name]
        if "q_proj.weight" not in name and "o_proj.weight" not in name:
            assert torch.equal(loaded, value)
            continue
        full = value.dequantize().double()
        groups = torch.stack([part.amax(1) - part.amin(1) for part in full.split(8, 1)], 1)
        step = groups.repeat_interleave(8, 1)[:, : full.shape[1]] / 15
        error = (loaded - full).abs()
        if not options:
            assert bool((error <= step / 2 * 1.0001).all())
        assert float(error.norm()) < 0.65 * float((step**2 / 12).sum().sqrt()) or not options
    assert torch.allclose(other(TOKENS), model(TOKENS), atol=0.1 if not options else 0.05)


def test_a_full_rank_compensation_gives_back_the_weights(tmp_path: Path) -> None:
    model = qg.quantize_(Tiny())
    qg.export(model, tmp_path, bits=4, dtype="float32", compensation="lorc", rank=12)
    for name, value in load_quantised(tmp_path).items():
        torch.testing.assert_close(value, model.state_dict()[name].dequantize() if "proj.weight" in name
                                   else model.state_dict()[name], rtol=1e-5, atol=1e-6)  # fmt: skip


def test_targets_choose_what_gets_codes(tmp_path: Path) -> None:
    qg.export(Tiny(), tmp_path, bits=4, targets="head")
    names = set(load_file(tmp_path / "quantised.safetensors"))
    assert {name for name in names if name.endswith("codes")} == {"head.weight.codes"}
    assert "head.weight" not in names


def test_a_tied_embedding_may_have_codes(tmp_path: Path) -> None:
    model = Tied()
    qg.export(model, tmp_path, bits=4, targets=["head", "0"], compensation="eora", rank=2, calibration=[TOKENS])
    state = load_quantised(tmp_path)
    assert set(state) == set(model.state_dict())
    assert state["head.weight"] is state["embed.weight"]
    assert not torch.equal(state["head.weight"], model.head.weight.bfloat16())


def test_shards_of_codes_load_as_one_file_does(tmp_path: Path) -> None:
    model = Tiny()
    arguments: dict[str, Any] = {"bits": 4, "compensation": "lorc", "rank": 2}
    assert len(qg.export(model, tmp_path / "many", max_shard_size=300, **arguments)) > 3
    qg.export(model, tmp_path / "one.safetensors", **arguments)
    many, one = load_quantised(tmp_path / "many"), load_quantised(tmp_path / "one.safetensors")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
def test_no_more_than_one_weight_is_decoded_at_a_time(
    bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qg.quantize_(nn.Sequential(*(nn.Linear(40, 30, bias=False) for _ in range(6))))
    alive: list[Any] = []
    most = 0
    decode = qg.Int8Weight.dequantize

    def counted(self: qg.Int8Weight, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal most
        value = decode(self, dtype)
        storage = value.untyped_storage()
        alive[:] = [ref for ref in alive if not ref.expired()] + [
            torch.multiprocessing.reductions.StorageWeakRef(storage)
        ]
        most = max(most, len(alive))
        return value

    monkeypatch.setattr(qg.Int8Weight, "dequantize", counted)
    qg.export(model, tmp_path, bits=bits)
    assert most == 1


GROWTH = """
import sys, torch, qgalore_compile as qg
from torch import nn
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
model = nn.Sequential(*(qg.quantize_(nn.Sequential(nn.Linear(2048, 1024, bias=False))) for _ in range(48)))
try:
    open("/proc/self/clear_refs", "w").write("5")
except OSError:
    sys.exit(77)
before = kilobytes("VmRSS")
qg.export(model, sys.argv[1], dtype="float32")
print((kilobytes("VmHWM") - before) / 1024)
"""


def test_exporting_takes_the_memory_of_a_few_weights_and_not_of_the_model(tmp_path: Path) -> None:
    """48 weights of 8 MiB in float32, 384 MiB; decoding one takes a few times its size."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "out")], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("the system does not let a process restart its peak of memory")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 128


def test_no_weights_bytes_are_copied_for_the_file(tmp_path: Path) -> None:
    """Python's own memory: a view of a tensor counts for nothing there, a copy would."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    tracemalloc.start()
    qg.export(model, tmp_path, dtype="float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256 * 256 * 4


# -- refused, before anything is written -------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float64"}, "dtype='float64': must be one of float32, bfloat16, float16"),
    "bits": ({"bits": 3}, "bits=3: must be 4, or None"),
    "group": ({"bits": 4, "group_size": 0}, "group_size=0: must be an integer of at least 1"),
    "kind": ({"bits": 4, "compensation": "svd", "rank": 1}, "compensation='svd': must be None, 'lorc' or 'eora'"),
    "no bits": ({"compensation": "lorc", "rank": 1}, "compensation='lorc' is for codes, and floats have none"),
    "targets": ({"targets": "head"}, "targets='head' is for codes"),
    "no rank": ({"bits": 4, "compensation": "lorc"}, "compensation='lorc' needs a rank"),
    "rank alone": ({"bits": 4, "rank": 3}, "rank=3 is a compensation's"),
    "rank too large": ({"bits": 4, "compensation": "lorc", "rank": 13}, "blocks.0.q_proj: rank 13 is not in 1 … 12"),
    "no text": ({"bits": 4, "compensation": "eora", "rank": 2}, "needs calibration="),
    "empty text": ({"bits": 4, "compensation": "eora", "rank": 2, "calibration": []}, "calibration has no batch"),
    "text for nothing": ({"bits": 4, "calibration": [TOKENS]}, "calibration is for compensation='eora'"),
    "no such layer": ({"bits": 4, "targets": "nothing"}, "'nothing' names none"),
    "size": ({"max_shard_size": "much"}, "max_shard_size='much'"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\S") as raised:
        qg.export(Tiny(), tmp_path / "out", **options)
    assert words in str(raised.value)
    assert not (tmp_path / "out").exists()


def with_extra_state() -> nn.Module:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    return Extra(2, 2)


def with_nan() -> nn.Module:
    model = Tiny()
    with torch.no_grad():
        model.blocks[1]["q_proj"].weight[3, 4] = torch.nan  # type: ignore[index, union-attr]
    return model


def with_a_large_number() -> nn.Module:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = -1e5
    return layer


MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "meta": (lambda: Tiny().to("meta"), {}, "embed.weight: it is on the meta device"),
    "lazy": (lambda: nn.LazyLinear(3), {}, "weight: it is not initialised yet"),
    "extra": (with_extra_state, {}, "_extra_state: a dict is no tensor"),
    "nothing": (nn.ReLU, {}, "the model has no weights"),
    "sparse": (lambda: nn.ParameterDict({"a": torch.eye(2).to_sparse()}), {}, "a: a tensor of layout torch.sparse_coo"),
    "complex": (lambda: nn.ParameterDict({"a": torch.ones(2, dtype=torch.complex128)}), {}, "dtype torch.complex128"),
    "too large": (with_a_large_number, {"dtype": "float16"}, "weight: it holds 1e+05, and float16 ends at 6.55e+04"),
    "no linear": (lambda: nn.Embedding(3, 3), {"bits": 4}, "it has no nn.Linear"),
    "nan": (with_nan, {"bits": 4}, "blocks.1.q_proj.weight holds NaN or Inf, or spans more than float32 does"),
    "parametrised": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), {"bits": 4},
                     "0: its weight is parametrised"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "words"), MODELS.values(), ids=MODELS)
def test_a_model_that_has_no_such_file_is_refused(
    make: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"\S") as raised:
        qg.export(make(), tmp_path / "out", **options)
    assert words in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_large_number_fits_into_bfloat16(tmp_path: Path) -> None:
    qg.export(with_a_large_number(), tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_layer_without_a_weight_of_its_own_stays_in_float_beside_others(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    qg.export(model, tmp_path, bits=4)
    state = load_quantised(tmp_path)
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "x.safetensors.index.json"])
def test_files_in_the_way_are_left_and_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"already holds {name}; choose another folder, or empty it"):
        qg.export(Tiny(), tmp_path)
    with pytest.raises(ValueError, match=r"exists; choose another path|is a file; give a folder"):
        qg.export(Tiny(), tmp_path / name)
    assert written(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_config_in_the_way_is_left_too_and_other_files_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    (tmp_path / "config.json").write_text("mine")
    qg.export(Tiny(), tmp_path)  # which has no config
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"already holds config.json"):
        qg.export(llama(), tmp_path)
    assert written(tmp_path) == ["config.json", "tokenizer.json"]


def test_a_full_disk_takes_back_the_shards_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    sync = files.os.fsync

    def filling(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", filling)
    with pytest.raises(OSError, match="No space left on device"):
        qg.export(Tiny(), tmp_path / "new" / "out", max_shard_size=500)
    assert calls > 4
    assert not list(tmp_path.iterdir())
