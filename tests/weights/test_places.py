"""What comes in the place of tensors on the meta device, and what is put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qgalore_compile.weights.places import Places


class Tied(nn.Module):
    """A weight in two layers, of which the second has a buffer as well, and the same tensor under two names in one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.second.register_buffer("mask", torch.empty(4))
            self.again = self.first.weight
        self.real = nn.Parameter(torch.ones(3))


def test_whoever_shared_a_tensor_shares_what_has_come_in_its_place() -> None:
    model = Tied()
    model.first.weight.requires_grad_(False)
    model.first.weight.mark = "theirs"  # type: ignore[attr-defined]
    places = Places(model)
    assert {place.name for place in places.first.values()} == {"again", "second.mask"}
    new = places.give(places.first[id(model.first.weight)], torch.zeros(4, 4))
    places.share()
    assert model.first.weight is model.second.weight is model.again is new
    assert (new.requires_grad, new.mark) == (False, "theirs")  # type: ignore[attr-defined]
    assert model.second.mask.is_meta


def test_a_buffer_stays_one() -> None:
    norm = nn.BatchNorm1d(3, device="meta")
    places = Places(norm, parameters=False)
    places.give(places.first[id(norm.running_mean)], torch.ones(3))
    assert torch.equal(norm.running_mean, torch.ones(3))  # type: ignore[arg-type]
    assert "running_mean" in norm._buffers


def test_a_module_alone_is_given_what_others_have() -> None:
    model = Tied()
    places = Places(model)
    new = places.give(places.first[id(model.again)], torch.zeros(4, 4))
    places.share(model.second)
    assert model.second.weight is new
    assert model.first.weight is not new


def test_buffers_alone_are_looked_at_where_that_is_asked() -> None:
    assert [place.name for place in Places(Tied(), parameters=False).first.values()] == ["second.mask"]


def test_an_exception_puts_back_what_was_there() -> None:
    model = Tied()
    before = dict(model.named_parameters(remove_duplicate=False)), model.second.mask
    places = Places(model)

    def fail_half_way() -> None:
        for place in places.first.values():
            places.give(place, torch.zeros(place.tensor.shape))
        places.share()
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), places.restored_on_error():
        fail_half_way()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[0][name] for name in before[0])
    assert model.second.mask is before[1]
    assert all(places.given(place) is None for place in places.first.values())
