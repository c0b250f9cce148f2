"""Parameter groups: what ``param_groups`` makes of a model, and which groups the optimizer refuses, in which words."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import Toy
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile import formats


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [group["param_names"] for group in groups]


# -- param_groups -----------------------------------------------------------------------------------------------------


def test_linear_layers_of_the_blocks_are_projected_and_all_else_is_plain() -> None:
    groups = qg.param_groups(Toy(), rank=4)
    assert names(groups) == [
        ["blocks.0.weight", "blocks.1.weight"],
        ["embed.weight", "blocks.0.bias", "blocks.1.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"],
    ]
    assert groups[0]["rank"] == 4
    assert "rank" not in groups[1]


def test_names_belong_to_their_parameters() -> None:
    model = qg.quantize_(Toy())
    named = dict(model.named_parameters())
    for group in qg.param_groups(model, rank=4, weight_decay=0.1):
        assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))


def test_with_weight_decay_what_has_fewer_than_two_dimensions_is_not_decayed() -> None:
    groups = qg.param_groups(Toy(), rank=4, weight_decay=0.1)
    assert names(groups) == [
        ["blocks.0.weight", "blocks.1.weight"],
        ["embed.weight", "head.weight"],
        ["blocks.0.bias", "blocks.1.bias", "norm.weight", "norm.bias", "head.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize(
    "targets", ["head", ["head"], re.compile(r"^head"), lambda name, linear: linear.out_features == 17]
)
def test_targets_are_those_of_quantize(targets: Any) -> None:
    assert names(qg.param_groups(Toy(), rank=4, targets=targets))[0] == ["head.weight"]


def test_adam_s_keys_go_to_every_group_and_the_projector_s_to_the_projected_one() -> None:
    keys = dict(lr=0.5, betas=(0.8, 0.9), rounding="nearest", update_proj_gap=7, scale=2.0)
    groups = qg.param_groups(Toy(), rank=4, **keys)
    assert [group["lr"] for group in groups] == [0.5, 0.5]
    assert [group["betas"] for group in groups] == [(0.8, 0.9)] * 2
    assert [group["rounding"] for group in groups] == ["nearest"] * 2
    assert (groups[0]["update_proj_gap"], groups[0]["scale"]) == (7, 2.0)
    assert not {"update_proj_gap", "scale"} & groups[1].keys()


def test_a_tied_weight_appears_once() -> None:
    model = Toy()
    model.head.weight = model.embed.weight
    every_name = [name for group in names(qg.param_groups(model, rank=4)) for name in group]
    assert every_name.count("embed.weight") == 1
    assert "head.weight" not in every_name
    model.blocks.append(model.blocks[0])
    assert names(qg.param_groups(model, rank=4))[0] == ["blocks.0.weight", "blocks.1.weight"]


def test_frozen_parameters_are_left_out() -> None:
    model = Toy()
    model.embed.weight.requires_grad_(False)
    model.blocks[0].weight.requires_grad_(False)
    groups = qg.param_groups(model, rank=4)
    assert names(groups)[0] == ["blocks.1.weight"]
    assert "embed.weight" not in names(groups)[1]


def test_what_is_not_projected_may_have_keys_of_its_own() -> None:
    groups = qg.param_groups(Toy(), rank=4, lr=0.1, weight_decay=0.1, plain=dict(lr=0.02, moments="32bit"))
    assert [group["lr"] for group in groups] == [0.1, 0.02, 0.02]
    assert [group.get("moments") for group in groups] == [None, "32bit", "32bit"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert len(qg.param_groups(Toy(), rank=4, plain=dict(weight_decay=0.1))) == 3


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (dict(lrs=0.1), r"param_groups: plain: unknown key 'lrs'"),
        (dict(scale=0.1), r"param_groups: plain: 'scale' has a meaning only in a projected group"),
    ],
)
def test_keys_that_mean_nothing_for_them_are_refused(plain: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        qg.param_groups(Toy(), rank=4, plain=plain)


def test_a_model_whose_parameters_are_all_projected_has_one_group() -> None:
    assert names(qg.param_groups(nn.Sequential(nn.Linear(3, 4, bias=False)), rank=2)) == [["0.weight"]]


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = Toy()
    every_name = [name for group in names(qg.param_groups(model, rank=4, weight_decay=0.1)) for name in group]
    assert sorted(every_name) == sorted(name for name, _ in model.named_parameters())


def test_targets_that_match_nothing_are_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ValueError, match=r"q_proj.*blocks\.0.*head"):
        qg.param_groups(Toy(), rank=4, targets="q_proj")


def test_an_unknown_key_is_refused_with_the_keys_that_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'ranks'.*rank.*update_proj_gap"):
        qg.param_groups(Toy(), rank=4, ranks=3)


# -- groups that the optimizer takes ----------------------------------------------------------------------------------


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(6, 4))


def test_galore_s_keys_have_the_documented_defaults() -> None:
    group = qg.QGaLoreAdamW([{"params": [matrix()], "rank": 2}]).param_groups[0]
    expected = {
        "update_proj_gap": 200,
        "scale": 0.25,
        "proj_type": "std",
        "quant": True,
        "quant_n_bit": 4,
        "quant_group_size": 256,
        "cos_threshold": 0.4,
        "gamma_proj": 2,
        "queue_size": 5,
        "refresh": "randomized",
        "power_iterations": 1,
        "moments_on_refresh": "keep",
        "similarity": "subspace",
        "max_gap": None,
        "shrink_threshold": None,
        "stagger": True,
        "trigger": "similarity",
        "energy_threshold": 0.8,
        "moments": "8bit",
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
    }
    assert {key: group[key] for key in expected} == expected


def test_a_plain_group_has_none_of_galore_s_keys() -> None:
    group = qg.QGaLoreAdamW([matrix()]).param_groups[0]
    assert not {"update_proj_gap", "scale", "rank"} & group.keys()


def test_a_group_s_own_dict_stays_as_it_was() -> None:
    group: dict[str, Any] = {"params": [matrix()], "rank": 2}
    before = dict(group)
    qg.QGaLoreAdamW([group], lr=0.1)
    assert group == before


def test_parameters_may_come_with_names() -> None:
    opt = qg.QGaLoreAdamW([{"params": [("this.weight", matrix())], "rank": 2}])
    assert [record.name for record in opt.schedule()] == ["this.weight"]


def test_a_rank_above_the_smaller_side_is_clipped_and_shown() -> None:
    opt = qg.QGaLoreAdamW([{"params": [matrix()], "rank": 100}])
    assert opt.schedule()[0].rank == 4


# -- and those it refuses ---------------------------------------------------------------------------------------------

IMPOSSIBLE = [
    (dict(rank=0), r"rank.*at least 1.*0"),
    (dict(rank=-3), r"rank.*at least 1.*-3"),
    (dict(rank=True), r"rank.*integer.*True"),
    (dict(rank=2.0), r"rank.*integer.*2\.0"),
    (dict(rank=None), r"rank.*integer.*None"),
    (dict(rank="4"), r"rank.*integer.*'4'"),
    (dict(rank=2, proj_type="reverse_std"), r"proj_type 'reverse_std'.*'std'"),
    (dict(rank=2, proj_type="left"), r"proj_type 'left'.*'std'"),
    (dict(rank=2, refresh="qr"), r"refresh.*'svd', 'randomized', 'power'.*'qr'"),
    (dict(rank=2, power_iterations=0), r"power_iterations.*at least 1.*0"),
    (dict(rank=2, power_iterations=1.0), r"power_iterations.*integer.*1\.0"),
    (dict(rank=2, moments_on_refresh="project"), r"moments_on_refresh.*'keep', 'reset', 'rotate'.*'project'"),
    (dict(rank=2, similarity="cosine"), r"similarity.*'subspace', 'official'.*'cosine'"),
    (dict(rank=2, quant_n_bit=3), r"quant_n_bit.*4, 8.*3"),
    (dict(rank=2, quant_n_bit=4.0), r"quant_n_bit.*4, 8.*4\.0"),
    (dict(rank=2, quant_group_size=0), r"quant_group_size.*at least 1.*0"),
    (dict(rank=2, update_proj_gap=0), r"update_proj_gap.*at least 1.*0"),
    (dict(rank=2, update_proj_gap=2.5), r"update_proj_gap.*integer.*2\.5"),
    (dict(rank=2, queue_size=0), r"queue_size.*at least 1.*0"),
    (dict(rank=2, gamma_proj=0.5), r"gamma_proj.*at least 1.*0\.5"),
    (dict(rank=2, gamma_proj=float("nan")), r"gamma_proj.*at least 1.*nan"),
    (dict(rank=2, max_gap=100), r"max_gap.*update_proj_gap=200.*100"),
    (dict(rank=2, shrink_threshold=0.5), r"shrink_threshold.*similarity_threshold=0\.4.*0\.5"),
    (dict(rank=2, shrink_threshold=float("nan")), r"shrink_threshold.*finite.*nan"),
    (dict(rank=2, stagger=1), r"stagger.*True or False.*1"),
    (dict(rank=2, trigger="loss"), r"trigger.*'similarity', 'energy'.*'loss'"),
    (dict(rank=2, trigger="energy", similarity="official"), r"trigger 'energy'.*'official'.*'subspace'"),
    (dict(rank=2, energy_threshold=-0.1), r"energy_threshold.*at least 0.*-0\.1"),
    (dict(rank=2, moments="int4/64+planar"), r"moments.*'8bit', '4bit', '32bit'.*'int4/64\+planar'"),
    (dict(rank=2, projector_format="int5"), r"projector_format.*'int5'.*there are int8"),
    (dict(rank=2, projector_format=4), r"projector_format.*text.*4"),
    (dict(rounding="up"), r"rounding.*'stochastic', 'nearest'.*'up'"),
    (dict(moments="16bit"), r"moments.*'8bit', '4bit', '32bit'.*'16bit'"),
    (dict(ranks=2), r"unknown key 'ranks'.*rank"),
    (dict(rank=2, update_gap=5), r"unknown key 'update_gap'.*update_proj_gap"),
    (dict(scale=0.5), r"'scale'.*projected group.*rank"),
    (dict(quant=True), r"'quant'.*projected group.*rank"),
    (dict(update_proj_gap=200), r"'update_proj_gap'.*projected group.*rank"),
    (dict(lr=-1.0), r"lr.*negative.*-1\.0"),
    (dict(lr=float("nan")), r"lr.*nan"),
    (dict(lr=torch.tensor([0.1, 0.2])), r"lr"),
    (dict(betas=(1.0, 0.9)), r"betas.*\[0, 1\).*1\.0"),
    (dict(betas=(0.9, -0.1)), r"betas.*\[0, 1\).*-0\.1"),
    (dict(eps=-1e-8), r"eps.*negative.*-1e-08"),
    (dict(eps=float("nan")), r"eps.*nan"),
    (dict(weight_decay=-0.1), r"weight_decay.*negative.*-0\.1"),
    (dict(weight_decay=float("nan")), r"weight_decay.*nan"),
    (dict(seed=2**64), r"seed.*64 bits"),
]


@pytest.mark.parametrize(("keys", "message"), IMPOSSIBLE, ids=[str(keys) for keys, _ in IMPOSSIBLE])
def test_a_value_that_cannot_be_is_refused_with_key_value_and_what_may_be(keys: dict[str, Any], message: str) -> None:
    opt = qg.QGaLoreAdamW([matrix()])
    with pytest.raises(ValueError, match=message) as error:
        opt.add_param_group({"params": [matrix()], **keys})
    assert "group 1" in str(error.value)
    assert len(opt.param_groups) == 1
    assert len(opt.state) == 1


@pytest.mark.parametrize(
    "bad",
    [
        dict(lr=-1.0),
        dict(lr=float("nan")),
        dict(betas=(0.9, 1.0)),
        dict(betas=(0.9,)),
        dict(eps=-1.0),
        dict(weight_decay=-1.0),
        dict(moments="fp8"),
        dict(nonfinite="ignore"),
        dict(max_grad_norm=0.0),
        dict(max_grad_norm=-1.0),
        dict(max_grad_norm=float("nan")),
        dict(seed=2**64),
        dict(seed=-(2**63) - 1),
    ],
    ids=str,
)
def test_a_setting_of_the_optimizer_that_cannot_be_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        qg.QGaLoreAdamW([matrix()], **bad)


@pytest.mark.parametrize("keys", [dict(rank=0), dict(rank=-1), dict(rank=2, proj_type="full")], ids=str)
def test_a_projection_that_cannot_be_names_the_parameter_and_its_shape(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.weight.*\(6, 4\)"):
        qg.QGaLoreAdamW([{"params": [("blocks.0.weight", matrix())], **keys}])


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4)])
def test_only_matrices_can_be_projected(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    message = rf"norm\.weight of shape {re.escape(str(shape))}.*{len(shape)} dimension.*group without rank"
    with pytest.raises(ValueError, match=message):
        qg.QGaLoreAdamW([{"params": [("ok", matrix()), ("norm.weight", p)], "rank": 2}])


def test_a_parameter_without_a_name_is_named_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 of shape \(5,\)"):
        qg.QGaLoreAdamW([{"params": [matrix(), nn.Parameter(torch.ones(5))], "rank": 2}])


def test_an_empty_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w of shape \(0, 4\) is empty; leave it out"):
        qg.QGaLoreAdamW([{"params": [("w", nn.Parameter(torch.ones(0, 4)))], "rank": 2}])


def test_a_complex_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w.*complex64"):
        qg.QGaLoreAdamW([("w", nn.Parameter(torch.ones(3, 4, dtype=torch.complex64)))])


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params),
        lambda params: torch.optim.AdamW(params, foreach=True),
        lambda params: torch.optim.AdamW(params, fused=True),
        lambda params: torch.optim.Adam(params),
        lambda params: torch.optim.SGD(params, lr=0.1),
    ],
    ids=["AdamW", "AdamW foreach", "AdamW fused", "Adam", "SGD"],
)
def test_an_int8_weight_in_another_optimizer_is_refused_by_name_and_stays(make: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    qg.quantize_(model)
    opt = make(model.parameters())
    before: Tensor = model[0].weight.dequantize()
    model(torch.randn(3, 6)).sum().backward()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?s)0\.weight.*\(4, 6\).*QGaLoreAdamW"):
        opt.step()
    assert torch.equal(model[0].weight.dequantize(), before)


def test_moments_begin_as_encoded_zeros() -> None:
    weight = nn.Parameter(torch.ones(40, 300))
    opt = qg.QGaLoreAdamW([{"params": [weight], "rank": 7}])
    for name, signed in (("exp_avg", True), ("exp_avg_sq_root", False)):
        expected = formats.quantize_dynamic8(torch.zeros(7, 300), signed=signed)
        assert torch.equal(opt.state[weight][name], expected.codes.clamp(min=0 if signed else 1))
        assert torch.equal(opt.state[weight][f"{name}_absmax"], expected.absmax)
