"""The optimizer with moments and projectors in every kind of format: state, checkpoints, bounds, refreshes."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from formats_support import batch, made
from kernels_support import evaluated_kernels
from support import Interpreted, training_step
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.formats import Format
from qgalore_compile.formats.base import dtype_of
from qgalore_compile.optim import layout
from qgalore_compile.subspace.moments import least_root
from qgalore_compile.subspace.projection import projector_shape

MOMENTS = ("8bit", "4bit", "32bit", "e4m3/128", "e5m2/128+pow2", "bfloat16", "int8/128")
PROJECTORS = (
    "int4/32+planar",
    "nf4/64",
    "nf4/32+double",
    "e4m3/32",
    "e2m1/32+pow2row",
    "int6/32",
    "float32",
    "bfloat16",
)


def trained(steps: int, **keys: Any) -> tuple[nn.Module, qg.QGaLoreAdamW, list[float]]:
    net, opt = made(**keys)
    step = training_step(net, opt)
    return net, opt, [float(step(batch(index))) for index in range(steps)]


def tensors(net: nn.Module, opt: qg.QGaLoreAdamW) -> list[Tensor]:
    """Every tensor of weights and state, those within weights in their place."""
    found: list[Tensor] = []
    for p in net.parameters():
        found += p.parts if isinstance(p, qg.weights.QuantizedWeight) else [p.detach()]
        found += [value for _, value in sorted(opt.state[p].items())]
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7))


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", MOMENTS)
def test_moments_are_stored_in_the_parts_that_their_format_has(text: str) -> None:
    net, opt, _ = trained(2, moments=text)
    for p, shape in ((net.embed.weight, (64, 72)), (net.blocks[0].weight, (8, 72)), (net.blocks[1].weight, (72, 8))):
        formats = opt.param_groups[0].formats.moments
        state = {name: value for name, value in opt.state[p].items() if name.startswith("exp_avg")}
        assert set(state) == set(formats.names)
        count = len(formats.first.parts)
        for form, names in ((formats.first, formats.names[:count]), (formats.second, formats.names[count:])):
            assert [(tuple(state[name].shape), state[name].dtype) for name in names] == [
                (form.shape_of(part, shape), dtype_of(part)) for part in form.parts
            ]


def test_four_bits_have_these_names_and_bytes() -> None:
    net, opt, _ = trained(1, moments="4bit")
    state = opt.state[net.embed.weight]
    assert {name: (value.dtype, value.numel()) for name, value in state.items() if name.startswith("exp")} == {
        "exp_avg": (torch.uint8, 64 * 72 // 2), "exp_avg_absmax": (torch.float32, 64 * 72 // 128),
        "exp_avg_sq_root": (torch.uint8, 64 * 72 // 2), "exp_avg_sq_root_absmax": (torch.float32, 64 * 72 // 128),
    }  # fmt: skip


@pytest.mark.parametrize("text", MOMENTS)
def test_small_parameters_that_are_not_projected_keep_32_bits(text: str) -> None:
    net, opt, _ = trained(1, moments=text)
    state = opt.state[net.norm.weight]
    assert {name: value.dtype for name, value in state.items() if name.startswith("exp")} == {
        "exp_avg": torch.float32, "exp_avg_sq": torch.float32
    }  # fmt: skip


@pytest.mark.parametrize("text", PROJECTORS)
def test_a_projector_is_stored_in_the_parts_that_its_format_has_and_is_orthonormal(text: str) -> None:
    net, opt, _ = trained(2, projector_format=text)
    form = Format.parse(text)
    for layer in net.blocks:
        p = layer.weight
        assert isinstance(p, nn.Parameter)
        shape = projector_shape(p.shape, 8)
        state = opt.state[p]
        names = [name for name in state if name.startswith("projector")]
        assert names == ["projector", *(f"projector_{part.name}" for part in form.parts[1:])]
        assert [(tuple(state[name].shape), state[name].dtype) for name in names] == [
            (form.shape_of(part, shape), dtype_of(part)) for part in form.parts
        ]
        group = next(group for group in opt.param_groups if any(p is each for each in group["params"]))
        basis = layout.projector(p, group, state)
        gram = basis.t() @ basis if shape[0] > shape[1] else basis @ basis.t()
        # e2m1's nearest entries are a fifth apart, and of two bits less a quarter
        torch.testing.assert_close(gram, torch.eye(8), rtol=0, atol=0.25)


@pytest.mark.parametrize("text", PROJECTORS)
def test_projector_format_says_it_whatever_galore_s_keys_say(text: str) -> None:
    _, one = made(projector_format=text, quant=True, quant_n_bit=8)
    _, other = made(projector_format=text, quant=False)
    group, same = (next(each for each in opt.param_groups if "rank" in each) for opt in (one, other))
    assert group.formats.projector == same.formats.projector == Format.parse(text)


@pytest.mark.parametrize("keys", [{}, {"quant_n_bit": 8}, {"quant": False}], ids=str)
def test_without_it_galore_s_keys_do(keys: dict[str, Any]) -> None:
    _, opt = made(**keys)
    group = next(each for each in opt.param_groups if "rank" in each)
    expected = {"{}": "int4/32+planar", "{'quant_n_bit': 8}": "int8/32", "{'quant': False}": "float32"}[str(keys)]
    assert str(group.formats.projector) == expected


# -- training ---------------------------------------------------------------------------------------------------------


def losses(**settings: Any) -> list[float]:
    net, opt = made(**settings)
    step = training_step(net, opt)
    return [float(step(batch())) for _ in range(25)]


@functools.cache
def in_floats() -> list[float]:
    return losses(moments="32bit", projector_format="float32")


@pytest.mark.parametrize(
    "keys",
    [{"moments": text} for text in MOMENTS]
    + [{"projector_format": text} for text in PROJECTORS]
    + [{"weights": text} for text in ("e4m3/32", "nf4/64+double", "int6/32", "e2m1/32+rotated")]
    + [{"weights": "e4m3/32", "moments": "4bit", "projector_format": "nf4/32", "moments_on_refresh": "rotate"}],
    ids=str,
)
def test_training_in_it_is_near_training_in_floats(keys: dict[str, Any]) -> None:
    """On a batch that is learnt by heart."""
    full, found = in_floats(), losses(**keys)
    assert full[-1] < 0.5 * full[0]
    assert found[-1] < full[-1] + 0.25 * (full[0] - full[-1])


@pytest.mark.parametrize("text", [text for text in MOMENTS if text not in ("32bit", "bfloat16")])
@pytest.mark.parametrize("period", [1, 3])
def test_no_element_moves_further_than_gradients_can_make_float_moments_move_it(text: str, period: int) -> None:
    """As 8-bit moments are held to it in ``test_moments_bounded.py``, on gradients over nine decades within a block."""
    p = nn.Parameter(torch.zeros(32, 128))
    opt = qg.QGaLoreAdamW([p], lr=1.0, moments=text)
    sizes, worst = torch.logspace(-9, 0, 128), 0.0
    for step in range(1, 61):
        p.data.zero_()
        p.grad = torch.randn(32, 128) * sizes * (step % period == 0)
        opt.step()
        worst = max(worst, float(p.detach().abs().max()))
    assert 0.3 < worst <= 1 / least_root((0.9, 0.999)) * (1 + 1e-5)


@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("moments", ["4bit", "e4m3/128"])
@pytest.mark.parametrize("shape", [(72, 24), (24, 72)], ids=["right", "left"])
def test_moments_follow_a_projector_and_updates_stay_bounded(how: str, moments: str, shape: tuple[int, int]) -> None:
    p = nn.Parameter(torch.zeros(shape))
    group: dict[str, Any] = dict(rank=8, quant=False, scale=1.0, update_proj_gap=5, stagger=False, max_gap=5)
    opt = qg.QGaLoreAdamW([{"params": [p], "moments_on_refresh": how, **group}], lr=1.0, moments=moments)
    worst = 0.0
    for step in range(22):
        p.data.zero_()
        p.grad = torch.randn(shape) * (step % 3 != 1)
        opt.step()
        worst = max(worst, float(p.detach().norm() / 8**0.5 / max(shape) ** 0.5))  # a rank's, root mean square
    assert opt.schedule()[0].refreshes >= 4
    assert 0.1 < worst <= 1 / least_root((0.9, 0.999))


@pytest.mark.parametrize("moments", ["4bit", "e4m3/128"])
def test_reset_moments_are_those_of_zeros(moments: str) -> None:
    p = nn.Parameter(torch.zeros(24, 72))
    group: dict[str, Any] = dict(rank=8, update_proj_gap=2, stagger=False, moments_on_refresh="reset")
    opt = qg.QGaLoreAdamW([{"params": [p], **group}], lr=1.0, betas=(0.0, 0.0), moments=moments)
    for step in range(3):
        before = p.detach().clone()
        p.grad = torch.randn(24, 72) if step < 2 else torch.zeros(24, 72)
        opt.step()
    assert torch.equal(p.detach(), before)


# -- checkpoints ------------------------------------------------------------------------------------------------------

KEPT = [
    {"moments": "4bit"},
    {"moments": "e4m3/128", "projector_format": "nf4/64"},
    {"moments": "bfloat16", "projector_format": "e2m1/32+pow2row"},
    {"weights": "nf4/64+double", "moments": "int8/128", "projector_format": "nf4/32+double"},
]


@pytest.mark.parametrize("keys", KEPT, ids=str)
def test_a_run_goes_on_from_a_file_as_if_it_had_not_stopped(keys: dict[str, Any]) -> None:
    net, opt, _ = trained(4, **keys)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = made(**keys)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_equal(tensors(other, resumed), tensors(net, opt))
    for index in range(4, 8):
        for model, each in ((net, opt), (other, resumed)):
            training_step(model, each)(batch(index))
    assert_equal(tensors(other, resumed), tensors(net, opt))


def test_a_format_object_is_its_text_in_files() -> None:
    _, opt, _ = trained(1, moments=Format.parse("e4m3"), projector_format=Format.parse("nf4"))
    texts = {(group["moments"], group.get("projector_format")) for group in opt.state_dict()["param_groups"]}
    assert all(value is None or isinstance(value, str) for pair in texts for value in pair)
    copy.deepcopy(opt.state_dict())
    other = made(moments="e4m3/128", projector_format="nf4/64")[1]
    other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    ("own", "saved"),
    [
        ({"moments": "4bit"}, {"moments": "8bit"}),
        ({"moments": "8bit"}, {"moments": "4bit"}),
        ({"moments": "32bit"}, {"moments": "4bit"}),
        ({"moments": "e4m3/128"}, {"moments": "e5m2/128"}),
        ({"projector_format": "nf4/64"}, {"projector_format": "int4/32+planar"}),
        ({"projector_format": "nf4/64"}, {"projector_format": "nf4/32"}),
        ({"projector_format": "e4m3/32"}, {"projector_format": "e5m2/32"}),
        ({"projector_format": "float32"}, {"projector_format": "bfloat16"}),
        ({}, {"projector_format": "nf4/32"}),
    ],
    ids=str,
)
def test_state_of_another_format_is_refused_and_nothing_is_loaded(own: dict[str, Any], saved: dict[str, Any]) -> None:
    net, opt, _ = trained(2, **own)
    _, other, _ = trained(2, **saved)
    before = [each.clone() for each in tensors(net, opt)]
    with pytest.raises(ValueError, match=r"settings of the saved one|moments as the saved one"):
        opt.load_state_dict(other.state_dict())
    assert_equal(tensors(net, opt), before)


@pytest.mark.parametrize("text", ["int4/32+planar", "e4m3+pow2row", "nf4+double", "16bit", "int7", 4, None])
def test_what_cannot_hold_moments_is_refused_in_words(text: Any) -> None:
    with pytest.raises(ValueError, match="moments must be one of '8bit', '4bit', '32bit', or a format's text: "):
        made(moments=text)


@pytest.mark.parametrize("text", ["int4/5", "nf5", 4])
def test_what_is_no_format_of_projectors_is_refused_in_words(text: Any) -> None:
    with pytest.raises(ValueError, match=r"projector_format .*(share bytes|there is no format|a format is a text)"):
        made(projector_format=text)


# -- compiled ---------------------------------------------------------------------------------------------------------


def test_a_compiled_step_is_the_eager_one_in_three_formats_at_once() -> None:
    """Of weights, moments and projectors, tensor by tensor, in a step without a refresh and in one with it."""
    net, opt = made("e4m3/32", moments="4bit", projector_format="nf4/64")
    step = training_step(net, opt)
    for index in range(2):
        step(batch(index))
        with evaluated_kernels():
            found = qg.check(step, batch(9), backend=Interpreted())
        assert found.ok, found
        errors = {error.name: error for error in found.errors}
        for name in ("weight", "weight/exp_avg", "weight/exp_avg_sq_root", "weight/projector"):
            assert f"model.blocks.0.{name}" in errors
        assert errors["model.blocks.0.weight"].codes_differing is not None
        assert errors["model.blocks.0.weight/exp_avg"].codes_differing is not None
