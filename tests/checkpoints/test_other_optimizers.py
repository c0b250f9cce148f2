"""Another optimizer's state is refused before anything changes, and put back where loading itself fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qgalore_compile.checkpoints.other_optimizers import load_other

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def stepped(make: Make, *, reverse: bool = False) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    parameters = list(model.parameters())
    optimizer = make(parameters[::-1] if reverse else parameters)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return optimizer


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters)


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("make", [adamw, sgd])
def test_an_optimizers_own_state_is_loaded(make: Make) -> None:
    saved, other = stepped(make).state_dict(), stepped(make)
    other.step()
    load_other(other, saved)
    expected = [value for state in saved["state"].values() for value in state.values() if isinstance(value, Tensor)]
    assert all(torch.equal(own, like) for own, like in zip(moments(other), expected, strict=True))


def refused(saved: dict[str, Any], optimizer: torch.optim.Optimizer, message: str) -> None:
    before = [value.clone() for value in moments(optimizer)]
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        load_other(optimizer, saved)
    assert all(torch.equal(own, like) for own, like in zip(moments(optimizer), before, strict=True))
    assert optimizer.param_groups == groups


def test_another_kinds_is_refused() -> None:
    refused(stepped(sgd).state_dict(), stepped(adamw), "is of another optimizer than this AdamW: only one of them has")
    refused(stepped(adamw).state_dict(), stepped(sgd), "is of another optimizer than this SGD")


def test_another_order_is_refused() -> None:
    refused(stepped(adamw, reverse=True).state_dict(), stepped(adamw), "for a parameter of shape")


def test_other_names_and_groups_are_refused() -> None:
    weight, bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    own = torch.optim.AdamW([("weight", weight), ("bias", bias)])
    refused(torch.optim.AdamW([("bias", bias), ("weight", weight)]).state_dict(), own, "holds other parameters")
    refused(torch.optim.AdamW([weight]).state_dict(), own, "has other groups than this one")


class Fails(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        raise ValueError("mine")


def test_where_loading_fails_all_is_as_it_was() -> None:
    optimizer = stepped(lambda parameters: Fails(parameters, lr=0.1, momentum=0.9))
    refused(stepped(sgd).state_dict(), optimizer, "mine")
