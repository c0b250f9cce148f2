"""Rules by name, and one of a user's own beside them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.optim.rules import RULES, RuleState, Written

SHAPES = ((12, 20), (20, 12), (7, 7), (5, 33))


def optimizer(shape: tuple[int, int], rule: Any, **keys: Any) -> tuple[qg.QGaLoreAdamW, nn.Parameter]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    moments = keys.pop("moments", "32bit")
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "rule": rule, **keys}
    return qg.QGaLoreAdamW([group], lr=0.01, moments=moments), weight


def trained(opt: qg.QGaLoreAdamW, weight: nn.Parameter, steps: int, seed: int = 1) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        weight.grad = torch.randn(weight.shape, generator=draws).to(weight.dtype)
        opt.step()
    return weight.detach().clone()


@dataclass(frozen=True)
class Sign(qg.Rule):
    """U = α P sign(R)."""

    name: ClassVar[str] = "sign of a test"
    moments: ClassVar[int] = 1

    def step(self, r: Tensor, state: RuleState) -> Written:
        return Written(state.momentum(r).sign())


@dataclass(frozen=True)
class Nothing(qg.Rule):
    """Forgets to say what is to be written."""

    name: ClassVar[str] = "nothing of a test"

    def step(self, r: Tensor, state: RuleState) -> Written:
        return Written(None)


def test_the_default_is_galore_and_naming_it_changes_no_bit() -> None:
    named, weight = optimizer((12, 20), "galore")
    torch.manual_seed(0)
    other = nn.Parameter(torch.randn(12, 20))
    plain = qg.QGaLoreAdamW([{"params": [other], "rank": 4, "update_proj_gap": 3}], lr=0.01, moments="32bit")
    assert plain.param_groups[0]["rule"] == "galore"
    assert torch.equal(trained(named, weight, 5), trained(plain, other, 5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_descends(rule: str, shape: tuple[int, int]) -> None:
    opt, weight = optimizer(shape, rule, moments="8bit")
    target = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    before = float((weight - target).detach().norm())
    for _ in range(60):
        weight.grad = (weight - target).detach()
        opt.step()
    assert float((weight - target).detach().norm()) < 0.98 * before


@pytest.mark.parametrize("moments", ["8bit", "4bit", "32bit", "e4m3/32"])
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_goes_on_number_for_number(rule: str, moments: str) -> None:
    opt, weight = optimizer((12, 20), rule, moments=moments)
    trained(opt, weight, 4)
    other, copied = optimizer((12, 20), rule, moments=moments)
    with torch.no_grad():
        copied.copy_(weight)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(trained(opt, weight, 4, seed=2), trained(other, copied, 4, seed=2))


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_that_is_not_finite_changes_nothing(rule: str) -> None:
    opt, weight = optimizer((12, 20), rule)
    before = trained(opt, weight, 4)
    states = {
        name: tensor.clone() for name, tensor in opt.state[weight].items() if name not in ("schedule", "grad_norm")
    }
    weight.grad = torch.full_like(weight, math.inf)
    opt.step()
    assert torch.equal(weight, before)
    assert int(opt.skipped_steps) == 1
    changed = [name for name, tensor in states.items() if not torch.equal(tensor, opt.state[weight][name])]
    assert changed == ["skipped_steps"]


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_of_zeros_writes_nothing(rule: str) -> None:
    opt, weight = optimizer((12, 20), rule)
    before = weight.detach().clone()
    for _ in range(4):
        weight.grad = torch.zeros_like(weight)
        opt.step()
    assert torch.equal(weight, before)


# -- one of a user's own ----------------------------------------------------------------------------------------------


def test_a_rule_of_one_s_own_trains_and_is_found_again_by_its_name() -> None:
    opt, weight = optimizer((12, 20), Sign())
    assert opt.param_groups[0]["rule"] == "sign of a test"
    trained(opt, weight, 3)
    assert "exp_avg_sq" not in opt.state[weight]
    other, copied = optimizer((12, 20), "sign of a test")
    with torch.no_grad():
        copied.copy_(weight)
    other.load_state_dict(opt.state_dict())
    assert torch.equal(trained(opt, weight, 3, seed=2), trained(other, copied, 3, seed=2))
    assert copy.deepcopy(opt).param_groups[0].rule == Sign()


def test_a_rule_that_writes_nothing_is_told_so() -> None:
    opt, weight = optimizer((12, 20), Nothing())
    with pytest.raises(ValueError, match="rule 'nothing of a test' writes nothing: its step must give low, scales"):
        trained(opt, weight, 1)


def test_another_rule_of_a_name_that_is_taken_is_refused() -> None:
    @dataclass(frozen=True)
    class Other(Sign):
        name: ClassVar[str] = "galore"

    with pytest.raises(ValueError, match="rule has the name 'galore', which another rule has already"):
        optimizer((12, 20), Other())


def test_a_rule_without_a_name_is_refused() -> None:
    @dataclass(frozen=True)
    class Nameless(qg.Rule):
        def step(self, r: Tensor, state: RuleState) -> Written:
            return Written(r)

    with pytest.raises(ValueError, match="must have a name, a text by which a saved state finds it again"):
        optimizer((12, 20), Nameless())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["adam", "", "Fira", None, 3, qg.Rule])
def test_what_is_no_rule_is_told_which_there_are(given: object) -> None:
    with pytest.raises(
        ValueError, match=r"rule must be one of 'galore', 'fira', 'apollo', 'muon'.*or an object of a sub"
    ):
        optimizer((12, 20), given)


@pytest.mark.parametrize(
    ("rule", "keys", "words"),
    [
        (
            "apollo",
            {"moments_on_refresh": "rotate"},
            "moments_on_refresh must be 'keep' with rule 'apollo', which draws",
        ),
        (
            "muon",
            {"moments_on_refresh": "reset"},
            "moments_on_refresh must be 'keep' with rule 'muon', which keeps one m",
        ),
        (
            "factored",
            {"moments_on_refresh": "reset"},
            "moments_on_refresh must be 'keep' with rule 'factored', which draws",
        ),
        ("fira", {"rank": None}, "rank must be an integer of at least 1 with rule 'fira', got None"),
        ("factored", {"rank": None}, "rank must be an integer of at least 1 with rule 'factored', got None.*'muon'"),
        (
            "factored",
            {"momentum_format": "dynamic8/256"},
            "momentum_format must be one of '4bit', '8bit', '32bit', or",
        ),
        ("factored", {"momentum_format": "3bit"}, "momentum_format must be one of '4bit'"),
        (
            "apollo",
            {"projector_format": "nf4/64"},
            "rule 'apollo' draws its projectors and stores none; leave projector_f",
        ),
    ],
)
def test_keys_without_a_meaning_for_a_rule_are_refused(rule: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimizer((12, 20), rule, **keys)


def test_a_rule_has_a_meaning_in_a_projected_group_alone() -> None:
    with pytest.raises(ValueError, match="'rule' has a meaning only in a projected group"):
        qg.QGaLoreAdamW([{"params": [nn.Parameter(torch.zeros(3))], "rule": "fira"}])


def test_a_rule_cannot_be_set_afterwards_nor_a_state_of_another_loaded() -> None:
    opt, weight = optimizer((12, 20), "fira")
    with pytest.raises(ValueError, match="rule is 'fira' and cannot become 'galore'"):
        opt.param_groups[0]["rule"] = "galore"
    other, _ = optimizer((12, 20), "galore")
    trained(opt, weight, 1)
    with pytest.raises(ValueError, match="build it with"):
        other.load_state_dict(opt.state_dict())
