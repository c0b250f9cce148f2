"""A 4-bit file says what it is: names, shapes and a description, from which any reader could decode it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from int8 import Tiny
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import save_file

import qgalore_compile as qg
from qgalore_compile.exports import load_quantised
from qgalore_compile.exports.quantised import KEY, Description, decode, encode

TOKENS = torch.arange(10).view(2, 5)


def export(folder: Path, **options: object) -> Path:
    given = {"bits": 4, "group_size": 5, "compensation": "eora", "rank": 3, "calibration": [TOKENS], **options}
    qg.export(Tiny(), folder, **given)  # type: ignore[arg-type]
    return folder / "quantised.safetensors"


def test_the_names_and_the_description_are_those_of_the_documentation(tmp_path: Path) -> None:
    with safe_open(export(tmp_path), "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        looks = {name: (file.get_tensor(name).shape, file.get_tensor(name).dtype) for name in names}
    described = json.loads(metadata[KEY])
    assert metadata["format"] == "pt"
    weights = {f"blocks.{index}.{name}.weight": shape
               for index in (0, 1) for name, shape in (("q_proj", [20, 12]), ("o_proj", [12, 20]))}  # fmt: skip
    assert described == {
        "format": "int4/5+planar", "compensation": "eora", "rank": 3, "dtype": "bfloat16", "weights": weights,
        "tied": {},
        "version": 1,
    }  # fmt: skip
    name = "blocks.0.q_proj.weight"
    assert looks[f"{name}.codes"] == ((20, 6), torch.uint8)
    assert looks[f"{name}.scale"] == looks[f"{name}.offset"] == ((20, 3), torch.float32)
    assert looks[f"{name}.left"] == ((20, 3), torch.bfloat16)
    assert looks[f"{name}.right"] == ((3, 12), torch.bfloat16)
    assert name not in names
    assert looks["embed.weight"][1] == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_numpy_decodes_it_to_the_same_weights(dtype: torch.dtype | None, tmp_path: Path) -> None:
    found = load_numpy(export(tmp_path, dtype="float32"))
    state = load_quantised(tmp_path, dtype=dtype)
    for name, (_, columns) in {"blocks.1.q_proj.weight": (20, 12), "blocks.1.o_proj.weight": (12, 20)}.items():
        packed = found[f"{name}.codes"]
        codes = np.concatenate([packed & 15, packed >> 4], axis=1)[:, :columns].astype(np.float64)
        group = np.arange(columns) // 5
        value = codes * found[f"{name}.scale"][:, group] + found[f"{name}.offset"][:, group]
        value += found[f"{name}.left"].astype(np.float64) @ found[f"{name}.right"]
        np.testing.assert_allclose(state[name].numpy(), value, rtol=1e-5, atol=1e-6)


def test_floats_come_in_the_files_dtype_or_the_one_asked_for(tmp_path: Path) -> None:
    export(tmp_path, dtype="float16")
    assert {value.dtype for value in load_quantised(tmp_path).values()} == {torch.float16}
    assert {value.dtype for value in load_quantised(tmp_path, dtype=torch.float32).values()} == {torch.float32}


@pytest.mark.parametrize("columns", [1, 7, 8, 20])
def test_codes_decode_within_half_a_step(columns: int) -> None:
    value = torch.randn(3, columns)
    parts = encode("int4/6", value)
    error = (decode("int4/6", parts, (3, columns)) - value).abs()
    steps = parts["scale"].repeat_interleave(6, 1)[:, :columns]
    assert bool((error <= steps / 2 + 1e-6).all())


@pytest.mark.parametrize("form", ["int4/0", "int4/-3", "int5/128", "int4/12x", ""])
def test_what_is_no_format_is_refused(form: str) -> None:
    with pytest.raises(ValueError, match=r"at least 1|number of elements in a group|there is no format"):
        encode(form, torch.ones(2, 2))


@pytest.mark.parametrize("form", ["nf4/64+double", "e4m3/16", "int6/8+pow2row", "e2m1/16+rotated"])
def test_any_format_of_weights_comes_back(form: str, tmp_path: Path) -> None:
    export(tmp_path, bits=None, format=form, group_size=128, dtype="float32", rank=4)
    state, model = load_quantised(tmp_path), Tiny()
    for name in ("blocks.1.q_proj.weight", "blocks.1.o_proj.weight"):
        assert state[name].shape == model.get_parameter(name).shape
        assert bool(state[name].isfinite().all())


def test_other_files_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no quantised\.safetensors"):
        load_quantised(tmp_path)
    (tmp_path / "text").write_text("no tensors at all")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_quantised(tmp_path / "text")
    qg.export(Tiny(), tmp_path / "floats.safetensors")
    with pytest.raises(ValueError, match=r"has no quantised weights of qg\.export"):
        load_quantised(tmp_path / "floats.safetensors")
    later = dataclasses.replace(Description("int4/5", None, None, "float32", {}, {}), version=2)
    save_file({"a": torch.ones(1)}, tmp_path / "later", metadata=later.metadata())
    with pytest.raises(ValueError, match="is of version 2, and this version of qgalore-compile reads 1"):
        load_quantised(tmp_path / "later")
