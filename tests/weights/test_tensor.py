"""Int8Weight reads like the float parameter that it stands for, in modules, state dicts, files and compiled code."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8 import INNER, Context, Tiny, assert_same, float_twin, int8, linear, storage, values
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile import Int8Weight

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
CONTEXTS = pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])

# -- forward and backward ---------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -2) if x.dim() > 2 else x.t().contiguous().t() if x.dim() == 2 else x,
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() > 1 else x,
}


@CONTEXTS
@given(
    m=st.integers(1, 43),
    n=st.integers(1, 43),
    group_size=st.sampled_from([1, 3, 16, 256]),
    leading=st.lists(st.integers(0, 4), max_size=3),
    bias=st.booleans(),
    frozen=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_linear_and_its_gradients_are_those_of_the_dequantised_weight(
    context: Context,
    m: int,
    n: int,
    group_size: int,
    leading: list[int],
    bias: bool,
    frozen: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    layer = qg.quantize_(nn.Sequential(nn.Linear(n, m, bias, dtype=dtype)), group_size=group_size)[0]  # type: ignore[index]
    int8(layer).requires_grad_(not frozen)
    twin = float_twin(layer)
    x = LAYOUTS[layout](torch.randn(*leading, n, dtype=dtype)).requires_grad_()
    with context():
        y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected)
    if context is not torch.enable_grad:
        return
    dy = torch.randn_like(expected)
    dx, *gradients = torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)
    expected_dx, *expected_gradients = torch.autograd.grad(expected, [x, *twin.parameters()], dy)
    torch.testing.assert_close(dx, expected_dx)
    for ours, theirs in zip(gradients, expected_gradients[frozen:], strict=True):
        assert type(ours) is Tensor
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_ordinary_floats_that_accumulate() -> None:
    layer = linear()
    x = torch.randn(3, 13)
    for _ in range(2):
        layer(x).sum().backward()
    assert type(layer.weight.grad) is Tensor
    torch.testing.assert_close(layer.weight.grad, 2 * x.sum(0).expand(8, 13))
    assert nn.utils.clip_grad_norm_(layer.parameters(), 1.0) > 1
    assert nn.utils.get_total_norm([layer.weight.grad, layer.bias.grad]) == pytest.approx(1.0, rel=1e-4)


@CONTEXTS
@pytest.mark.parametrize("shape", [(13,), (3, 13), (2, 3, 13), (2, 1, 3, 13)], ids=str)
def test_autocast_computes_in_bfloat16_and_keeps_a_float32_gradient(context: Context, shape: tuple[int, ...]) -> None:
    layer = linear()
    twin = float_twin(layer)
    x = torch.randn(shape)
    with context(), torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), twin(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    if context is torch.enable_grad:
        y.sum().backward()
        expected.sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_generation_picks_the_tokens_of_the_dequantised_model(context: Context) -> None:
    model = qg.quantize_(Tiny(), group_size=7).eval()
    twin = Tiny().eval()
    twin.load_state_dict(model.state_dict())
    before = [storage(p) for p in model.parameters() if isinstance(p, Int8Weight)]
    ours = theirs = torch.tensor([[1, 2]])
    with context():
        for _ in range(8):
            ours = torch.cat([ours, model(ours)[:, -1:].argmax(-1)], dim=1)
            theirs = torch.cat([theirs, twin(theirs)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours, theirs)
    for weight, was in zip((p for p in model.parameters() if isinstance(p, Int8Weight)), before, strict=True):
        assert_same(weight, was)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_forward_and_backward_equal_eager_and_new_codes_do_not_recompile(dtype: torch.dtype) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    model = qg.quantize_(Tiny().to(dtype), group_size=7)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    tokens = torch.randint(0, 17, (2, 5))
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.detach() * scale)
        results = []
        for forward in (model, compiled):
            model.zero_grad()
            forward(tokens).square().mean().backward()
            results.append({name: p.grad for name, p in model.named_parameters()})
        for name, gradient in results[0].items():
            assert type(results[1][name]) is Tensor
            torch.testing.assert_close(results[1][name], gradient, msg=name)
    assert counter.frame_count == 1


# -- what a module does with its parameters ---------------------------------------------------------------------------


@DTYPES
@CONTEXTS
def test_dequantize_gives_codes_times_scale_plus_offset(context: Context, dtype: torch.dtype) -> None:
    weight = int8(linear(dtype=dtype))
    assert weight.dtype == dtype
    with context():
        back = weight.dequantize()
        assert type(back) is Tensor
        assert not back.requires_grad
        torch.testing.assert_close(back, values(weight).to(dtype))
        torch.testing.assert_close(weight.dequantize(torch.float64), values(weight), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weight.t().dequantize(), values(weight).to(dtype).t())


@DTYPES
@CONTEXTS
def test_changing_a_modules_dtype_keeps_every_code(context: Context, dtype: torch.dtype) -> None:
    layer = linear()
    before = storage(int8(layer))
    layer(torch.randn(3, 13)).sum().backward()
    with context():
        layer.to(dtype)
    weight = int8(layer)
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.requires_grad, weight.label) == (dtype, True, "0.weight")
    assert_same(weight, before)
    torch.testing.assert_close(layer(torch.ones(13, dtype=dtype)), float_twin(layer)(torch.ones(13, dtype=dtype)))
    layer.float()
    assert_same(int8(layer), before)


@pytest.mark.parametrize("convert", [Tensor.bfloat16, Tensor.half, Tensor.double, lambda w: w.to(torch.bfloat16)])
def test_a_converted_weight_is_still_int8(convert: Callable[[Tensor], Tensor]) -> None:
    weight = int8(linear())
    converted = convert(weight)
    assert isinstance(converted, Int8Weight)
    assert_same(converted, storage(weight))
    assert converted.codes.data_ptr() != weight.codes.data_ptr()


def test_moving_to_meta_keeps_the_subclass_without_storage() -> None:
    for layer in (linear().to("meta"), linear().to(torch.device("meta"), torch.bfloat16)):
        weight = int8(layer)
        assert all(getattr(weight, part).is_meta for part in INNER)
        assert weight.device.type == "meta"
        assert layer(torch.ones(3, 13, device="meta", dtype=weight.dtype)).shape == (3, 8)
    assert isinstance(int8(linear()).to(device="meta"), Int8Weight)


def test_nbytes_counts_codes_scales_and_offsets() -> None:
    assert int8(linear(8, 13)).nbytes == 8 * 13 + 2 * 4 * 8 * 3
    assert int8(linear(8, 13)).t().nbytes == 8 * 13 + 2 * 4 * 8 * 3


def test_a_clone_has_storage_of_its_own_and_a_detached_weight_has_not() -> None:
    weight = int8(linear())
    before = storage(weight)
    clone, detached = weight.detach().clone(), weight.detach()
    assert_same(clone, before)
    with torch.no_grad():
        clone.copy_(torch.randn(8, 13))
    assert_same(weight, before)
    detached.copy_(clone)
    assert isinstance(clone, Int8Weight)
    assert_same(weight, storage(clone))


def test_a_deep_copy_has_storage_of_its_own() -> None:
    model = qg.quantize_(Tiny())
    model(torch.tensor([[1, 2]])).sum().backward()
    twin = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if isinstance(ours, Int8Weight):
            assert isinstance(theirs, Int8Weight)
            assert isinstance(theirs, nn.Parameter)
            assert (theirs.label, theirs.group_size) == (ours.label, ours.group_size)
            before = storage(ours)
            assert_same(theirs, before)
            with torch.no_grad():
                theirs.copy_(torch.randn(theirs.shape))
            assert_same(ours, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_state_dict_and_deepcopy_work_without_grad(context: Context) -> None:
    layer = linear()
    with context():
        assert_same(layer.state_dict()["weight"], storage(int8(layer)))
        assert_same(int8(copy.deepcopy(layer)), storage(int8(layer)))
        torch.testing.assert_close(
            torch.ones(3, 13) @ layer.weight.T, torch.ones(3, 13) @ values(int8(layer)).float().T
        )


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("from_int8", [False, True], ids=["from float", "from int8"])
@pytest.mark.parametrize("into_int8", [False, True], ids=["into float", "into int8"])
def test_state_dicts_load_between_float_and_int8(assign: bool, from_int8: bool, into_int8: bool) -> None:
    source = linear() if from_int8 else nn.Linear(13, 8)
    target = linear() if into_int8 else nn.Linear(13, 8)
    assert not target.load_state_dict(source.state_dict(), assign=assign).missing_keys
    assert isinstance(target.weight, nn.Parameter)
    assert target.weight.requires_grad
    assert isinstance(target.weight, Int8Weight) == (into_int8 or (assign and from_int8))
    if isinstance(target.weight, Int8Weight):
        expected = source.weight if isinstance(source.weight, Int8Weight) else Int8Weight.from_float(source.weight, 5)
        assert_same(target.weight, storage(expected))
    else:
        expected_values = source.weight.detach() if not from_int8 else values(int8(source)).float()
        torch.testing.assert_close(target.weight.detach(), expected_values)
    assert target(torch.ones(13)).shape == (8,)


def test_loading_another_group_size_quantises_anew_and_another_shape_is_an_error() -> None:
    source = qg.quantize_(nn.Sequential(nn.Linear(13, 8)), group_size=4).bfloat16()[0]  # type: ignore[index]
    target = linear()
    target.load_state_dict(source.state_dict())
    assert int8(target).group_size == 5
    assert_same(int8(target), storage(Int8Weight.from_float(int8(source).dequantize(torch.float32), 5)))
    before = storage(int8(target))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        target.load_state_dict(nn.Linear(13, 7, bias=False).state_dict(), strict=False)
    assert_same(int8(target), before)


def test_a_saved_state_dict_loads_weights_only_in_a_process_that_imports_the_package_alone(tmp_path: Path) -> None:
    model = qg.quantize_(Tiny(), group_size=7).bfloat16()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    script = """if True:
        import sys, qgalore_compile, torch
        state = torch.load(sys.argv[1], weights_only=True)
        weight = state["blocks.1.o_proj.weight"]
        assert type(weight) is qgalore_compile.Int8Weight, type(weight)
        assert (weight.dtype, weight.group_size) == (torch.bfloat16, 7)
        torch.save([weight.codes, weight.scale, weight.offset], sys.argv[2])
    """
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pt", tmp_path / "inner.pt"], check=True, timeout=120
    )
    inner = torch.load(tmp_path / "inner.pt", weights_only=True)
    assert_same(int8(model.blocks[1]["o_proj"]), dict(zip(INNER, inner, strict=True)))
    loaded = torch.load(tmp_path / "model.pt", weights_only=True, mmap=True, map_location="cpu")
    twin = qg.quantize_(Tiny(), group_size=7).bfloat16()
    twin.load_state_dict(loaded)
    assert torch.equal(twin(torch.tensor([[1]])), model(torch.tensor([[1]])))


def test_dynamo_compiles_no_frame_of_a_weight_s_own_arithmetic() -> None:
    """A frame that Dynamo gives up runs in Python, and what it calls is looked at frame by frame."""
    from torch._dynamo.testing import CompileCounter

    weight, counter = int8(linear()).detach(), CompileCounter()

    def step(x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()  # inside of a loop: the whole frame is given up
            x = x + x @ weight.t() @ weight
        return x

    compiled = torch.compile(step, backend=counter)
    torch.testing.assert_close(compiled(torch.ones(3, 13)), step(torch.ones(3, 13)))
    assert counter.frame_count == 0
