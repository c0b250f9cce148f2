"""INT8 weights in files: safetensors, pickle and torch.load with every kind of map_location."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from int8 import Tiny, assert_same, int8, linear, storage
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import qgalore_compile as qg
from qgalore_compile import Int8Weight

PLACES: dict[str, Any] = {
    "none": None,
    "string": "cpu",
    "device": torch.device("cpu"),
    "dict": {"cpu": "cpu"},
    "callable": lambda storage, location: storage,
}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_every_map_location_gives_the_codes_that_were_saved(place: str, weights_only: bool) -> None:
    layer = linear(dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save({"state": layer.state_dict(), "parameter": layer.weight}, file)
    file.seek(0)
    loaded = torch.load(file, map_location=PLACES[place], weights_only=weights_only)
    for weight in (loaded["state"]["weight"], loaded["parameter"]):
        assert_same(weight, storage(int8(layer)))
        assert (weight.dtype, weight.group_size, weight.label) == (torch.bfloat16, 5, "0.weight")
    assert isinstance(loaded["parameter"], nn.Parameter)
    assert loaded["parameter"].requires_grad
    assert not loaded["state"]["weight"].requires_grad


def test_map_location_to_meta_keeps_the_kind() -> None:
    file = io.BytesIO()
    torch.save(linear().state_dict(), file)
    file.seek(0)
    weight = torch.load(file, map_location="meta")["weight"]
    assert isinstance(weight, Int8Weight)
    assert weight.codes.is_meta


def test_weights_of_earlier_files_load_still() -> None:
    """Before 0.2 PyTorch's own rebuilding of wrappers was pickled, by the class's public name."""
    weight = int8(linear()).detach()
    parts = {name: getattr(weight, name) for name in ("codes", "scale", "offset", "group_size", "transposed", "label")}
    arguments = (Int8Weight, weight.dtype, tuple(weight.shape), weight.stride(), 0, weight.layout, weight.device, False)

    class Old:
        def __reduce__(self) -> Any:
            rebuild = torch._utils._rebuild_wrapper_subclass
            return torch._tensor._rebuild_from_type_v2, (rebuild, Int8Weight, arguments, parts)

    file = io.BytesIO()
    torch.save({"weight": Old()}, file)
    file.seek(0)
    layer = linear()
    layer.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert_same(int8(layer), storage(weight))


def test_pickle_names_the_public_path_and_keeps_attributes() -> None:
    weight = int8(linear())
    weight.note = "kept"  # type: ignore[attr-defined]
    data = pickle.dumps(weight)
    assert b"qgalore_compile.weights" in data
    loaded = pickle.loads(data)
    assert_same(loaded, storage(weight))
    assert loaded.note == "kept"


def save_dict(model: nn.Module, path: Path) -> None:
    save_file(model.state_dict(), path)


def load_dict(model: nn.Module, path: Path) -> None:
    model.load_state_dict(load_file(path))


def load_assigned(model: nn.Module, path: Path) -> None:
    model.load_state_dict(load_file(path), assign=True)


@pytest.mark.parametrize("save", [save_dict, save_model])
@pytest.mark.parametrize("load", [load_dict, load_assigned, load_model])
def test_safetensors_hold_the_floats_and_load_into_equal_int8_weights(
    save: Callable[[nn.Module, Path], None], load: Callable[[nn.Module, Path], Any], tmp_path: Path
) -> None:
    one, two = (qg.quantize_(Tiny(), group_size=7) for _ in range(2))
    save(one, tmp_path / "m.safetensors")
    load(two, tmp_path / "m.safetensors")
    floats = load_file(tmp_path / "m.safetensors")
    for (name, ours), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        assert isinstance(theirs, Int8Weight) == isinstance(ours, Int8Weight)
        if isinstance(ours, Int8Weight):
            assert torch.equal(floats[name], ours.dequantize())
            assert torch.equal(theirs.codes, ours.codes)  # type: ignore[attr-defined]
            torch.testing.assert_close(theirs.dequantize(), ours.dequantize(), rtol=1e-6, atol=1e-7)  # type: ignore[attr-defined]
            assert ours._exported is None  # no float copy stays behind
        else:
            assert torch.equal(ours, theirs)


def test_parameters_have_no_address_of_floats_and_say_where_to_go(tmp_path: Path) -> None:
    model = linear()
    with pytest.raises(NotImplementedError, match=r"0\.weight.*model\.state_dict\(\).*codes\.data_ptr\(\)"):
        save_file(dict(model.named_parameters()), tmp_path / "m.safetensors")
