"""Int8Weight quantises what is assigned to it, refuses every other change, and is read through views."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8 import assert_same, int8, linear, storage, values
from torch import Tensor, nn

from qgalore_compile import Int8Weight, formats
from qgalore_compile.rng import random_bits
from qgalore_compile.weights import write_back_

NAMED = r"Int8Weight\('0\.weight', shape=\(8, 13\)"
"""What a message about ``linear()``'s weight must hold: the parameter's name and shape."""

# -- assigning --------------------------------------------------------------------------------------------------------


def copied(weight: Int8Weight, value: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)


def set_data(weight: Int8Weight, value: Tensor) -> None:
    weight.data = value


def copied_into_data(weight: Int8Weight, value: Tensor) -> None:
    weight.data.copy_(value)


def copied_transposed(weight: Int8Weight, value: Tensor) -> None:
    with torch.no_grad():
        weight.t().copy_(value.t())


def loaded(weight: Int8Weight, value: Tensor) -> None:
    module = nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": value})


@pytest.mark.parametrize("assign", [copied, set_data, copied_into_data, copied_transposed, loaded])
@given(
    m=st.integers(1, 43),
    n=st.integers(1, 43),
    group_size=st.sampled_from([1, 3, 16, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32]),
    seed=st.integers(0, 99),
)
def test_assigning_a_float_tensor_quantises_it_to_nearest(
    assign: Callable[[Int8Weight, Tensor], None], m: int, n: int, group_size: int, dtype: torch.dtype, seed: int
) -> None:
    weight = nn.Parameter(Int8Weight.from_float(torch.zeros(m, n), group_size))
    codes = weight.codes
    value = (torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)
    assign(weight, value)
    expected = formats.quantize_int8(value.float(), group_size)
    assert_same(weight, {"codes": expected.codes, "scale": expected.scale, "offset": expected.offset})
    assert weight.codes is codes  # in place: views, state dicts and compiled code see it
    assert weight.dtype == torch.float32


def test_copying_one_int8_weight_into_another_copies_codes_and_into_a_float_tensor_values() -> None:
    source, target = int8(linear()), int8(linear())
    with torch.no_grad():
        target.copy_(torch.randn(8, 13))
        target.copy_(source)
        assert_same(target, storage(source))
        assert target.codes.data_ptr() != source.codes.data_ptr()
        plain = torch.empty(8, 13, dtype=torch.bfloat16)
        assert type(plain.copy_(source)) is Tensor
    torch.testing.assert_close(plain, values(source).bfloat16())


@pytest.mark.parametrize("shape", [(13,), (8, 1), (13, 8), (1, 8, 13)], ids=str)
def test_a_tensor_of_another_shape_is_not_broadcast(shape: tuple[int, ...]) -> None:
    weight = int8(linear())
    before = storage(weight)
    for assign in (copied, set_data):
        with pytest.raises(ValueError, match=re.escape(f"shape {shape}") + ".*" + NAMED):
            assign(weight, torch.ones(shape))
    assert_same(weight, before)


def test_a_weight_changed_between_forward_and_backward_is_an_error_as_for_any_parameter() -> None:
    layer = linear()
    y = layer(torch.randn(3, 13, requires_grad=True)).sum()
    copied(int8(layer), torch.randn(8, 13))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_nan_stays_visible_after_it_is_copied_in() -> None:
    weight, value = int8(linear()), torch.randn(8, 13)
    value[2, 3] = float("nan")
    copied(weight, value)
    bad = ~torch.isfinite(weight.dequantize())
    assert bad[2, 3]
    assert bad.sum() <= 5  # its group


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(3), ValueError, r"two dimensions, got shape \(3,\)"),
        (torch.ones(2, 3, 4), ValueError, r"two dimensions, got shape \(2, 3, 4\)"),
        (torch.tensor([[1.0, float("nan")]]), ValueError, r"shape \(1, 2\) holds NaN or Inf"),
        (torch.tensor([[1.0], [float("inf")]]), ValueError, r"shape \(2, 1\) holds NaN or Inf"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "int64"),
    ],
)
def test_what_has_no_int8_form_is_an_error_with_words(value: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Int8Weight.from_float(value)


# -- the optimizer's write-back ---------------------------------------------------------------------------------------


@given(m=st.integers(1, 43), n=st.integers(1, 300), group_size=st.sampled_from([1, 16, 256]), seed=st.integers(0, 99))
def test_write_back_rounds_stochastically_unless_told_not_to_write(m: int, n: int, group_size: int, seed: int) -> None:
    start, value = torch.randn(2, m, n, generator=torch.Generator().manual_seed(seed))
    weight = nn.Parameter(Int8Weight.from_float(start, group_size))
    noise = random_bits((m, n), seed=seed, step=1, param=0)
    before = storage(weight)
    with torch.no_grad():
        write_back_(weight, value, noise, torch.tensor(False))
        assert_same(weight, before)
        write_back_(weight, value, noise, torch.tensor(True))
    expected = formats.quantize_int8(value, group_size, noise=noise)
    assert_same(weight, {"codes": expected.codes, "scale": expected.scale, "offset": expected.offset})


def test_a_skipped_write_back_keeps_the_weight_though_the_value_is_nan() -> None:
    weight = int8(linear())
    before = storage(weight)
    noise = random_bits((8, 13), seed=0, step=0, param=0)
    with torch.no_grad():
        write_back_(weight, torch.full((8, 13), float("nan")), noise, torch.tensor(False))
    assert_same(weight, before)


def test_writing_back_into_a_float_tensor_or_a_transpose_is_an_error() -> None:
    value, noise, ok = torch.ones(8, 13), random_bits((8, 13), seed=0, step=0, param=0), torch.tensor(True)
    with pytest.raises(TypeError, match=r"Int8Weight is needed here, got a Tensor of dtype torch\.float32"):
        write_back_(torch.ones(8, 13), value, noise, ok)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(ValueError, match="not into its transpose"):
        write_back_(int8(linear()).t(), value.t(), noise.t(), ok)  # type: ignore[arg-type]


# -- what would be lost raises ----------------------------------------------------------------------------------------

ones = torch.ones(8, 13)
index = torch.tensor([0])
mask = ones > 0

MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "data.add_": lambda w: w.data.add_(1),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "t().sub_": lambda w: w.detach().t().sub_(1),
    "+=": lambda w: w.__iadd__(1),
    "div_": lambda w: w.div_(2),
    "pow_": lambda w: w.pow_(2),
    "lerp_": lambda w: w.lerp_(ones, 0.1),
    "addcdiv_": lambda w: w.addcdiv_(ones, ones),
    "addcmul_": lambda w: w.addcmul_(ones, ones),
    "addmm_": lambda w: w.addmm_(torch.ones(8, 2), torch.ones(2, 13)),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(3.0),
    "clamp_": lambda w: w.clamp_(0, 1),
    "relu_": lambda w: w.relu_(),
    "copysign_": lambda w: w.copysign_(ones),
    "masked_fill_": lambda w: w.masked_fill_(mask, 0.0),
    "masked_scatter_": lambda w: w.masked_scatter_(mask, ones),
    "index_add_": lambda w: w.index_add_(0, index, ones[:1]),
    "index_copy_": lambda w: w.index_copy_(0, index, ones[:1]),
    "scatter_": lambda w: w.scatter_(0, index[None], 1.0),
    "put_": lambda w: w.put_(index, torch.ones(1)),
    "w[0] =": lambda w: w.__setitem__(0, 1.0),
    "w[mask] =": lambda w: w.__setitem__(mask, 1.0),
    "w[index] =": lambda w: w.__setitem__(index, ones[:1]),
    "fill_diagonal_": lambda w: w.fill_diagonal_(1.0),
    "tril_": lambda w: w.tril_(),
    "uniform_": lambda w: w.uniform_(),
    "normal_": lambda w: w.normal_(),
    "bernoulli_": lambda w: w.bernoulli_(),
    "init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "out=": lambda w: torch.add(ones, 1, out=w),
    "_foreach_add_": lambda w: torch._foreach_add_([torch.ones(2), w], 1.0),
    "_foreach_copy_": lambda w: torch._foreach_copy_([w], [ones]),
    "_foreach_zero_": lambda w: torch._foreach_zero_([w]),
    "resize_": lambda w: w.detach().resize_(2, 2),
    "set_": lambda w: w.set_(torch.zeros(3)),
    "t_": lambda w: w.t_(),
    "unsqueeze_": lambda w: w.unsqueeze_(0),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutating_operation_raises_names_the_weight_and_changes_nothing(name: str) -> None:
    weight = int8(linear())
    before = storage(weight)
    named = NAMED.replace("8, 13", "(8, 13|13, 8)")  # or its transpose
    words = named + r".*(in place.*weight\.copy_\(.*QGaLoreAdamW|would be lost.*weight\.copy_\()"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=words):
        MUTATIONS[name](weight)
    assert_same(weight, before)
    assert weight.shape == (8, 13)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "w[0]": lambda w: w[0],
    "w[:, :4]": lambda w: w[:, :4],
    "w[None]": lambda w: w[None],
    "view": lambda w: w.view(-1),
    "view dtype": lambda w: w.view(torch.int32),
    "reshape": lambda w: w.reshape(13, 8),
    "flatten": lambda w: w.flatten(),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "squeeze": lambda w: w.squeeze(),
    "select": lambda w: w.select(0, 0),
    "narrow": lambda w: w.narrow(0, 0, 2),
    "split": lambda w: w.split(3),
    "chunk": lambda w: w.chunk(2),
    "unbind": lambda w: w.unbind(),
    "iteration": lambda w: list(w),
    "diagonal": lambda w: w.diagonal(),
    "as_strided": lambda w: w.as_strided((2, 2), (1, 1)),
    "unfold": lambda w: w.unfold(0, 2, 2),
    "parameters_to_vector": lambda w: nn.utils.parameters_to_vector([w]),
}


def first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, (list, tuple)) else result
    return found


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_view_reads_as_the_dequantised_values_and_so_do_its_gradients(name: str, context: Callable[[], Any]) -> None:
    weight = int8(linear())
    twin = weight.dequantize().requires_grad_()
    with context():
        ours, theirs = (first(VIEWS[name](w)) for w in (weight, twin))
        torch.testing.assert_close(ours + 0, theirs + 0)
        assert type(ours + 0) is Tensor
    if context is torch.enable_grad and ours.is_floating_point():
        ours.square().sum().backward()
        theirs.square().sum().backward()
        assert type(weight.grad) is Tensor
        torch.testing.assert_close(weight.grad, twin.grad)


WRITES_THROUGH_VIEWS: dict[str, Callable[[Any], Any]] = {
    "w[0].zero_()": lambda w: w[0].zero_(),
    "w[0][1] =": lambda w: w[0].__setitem__(1, 3.0),
    "w.view(-1).add_": lambda w: w.view(-1).add_(1),
    "w.data[:, 0].copy_": lambda w: w.data[:, 0].copy_(torch.ones(8)),
    "w.detach()[:2] +=": lambda w: w.detach()[:2].__iadd__(1),
    "w.flatten().t().mul_": lambda w: w.flatten().unsqueeze(0).t().mul_(2),
    "w.unbind()[0].fill_": lambda w: w.unbind()[0].fill_(1.0),
    "out= a row": lambda w: torch.add(ones[0], 1, out=w[0]),
    "_foreach_add_ of rows": lambda w: torch._foreach_add_(list(w), 1.0),
    "init of a part": lambda w: nn.init.zeros_(w[:4]),
}


@pytest.mark.parametrize("name", WRITES_THROUGH_VIEWS)
def test_a_write_through_a_view_raises_names_the_weight_and_changes_nothing(name: str) -> None:
    weight = int8(linear())
    before = storage(weight)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=f"a view of {NAMED}.*would be lost.*weight.copy_"):
        WRITES_THROUGH_VIEWS[name](weight)
    assert_same(weight, before)


def test_copies_of_a_view_are_ordinary_tensors() -> None:
    weight = int8(linear())
    row = weight.detach()[2]
    for plain in (row.clone(), copy.deepcopy(row), pickle.loads(pickle.dumps(row)), torch.from_numpy(row.numpy())):
        assert type(plain) is Tensor
        torch.testing.assert_close(plain, values(weight)[2].float())


def test_a_view_in_compiled_code_is_refused() -> None:
    weight = int8(linear()).detach()
    with pytest.raises(Exception, match=f"view of {NAMED.replace(chr(92) + '(', '.')}|view of .*Int8Weight"):
        torch.compile(lambda w: w[0] * 2, backend="aot_eager", fullgraph=True)(weight)


READS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda w: w.sum(),
    "norm": lambda w: w.norm(),
    "arithmetic": lambda w: 2 * w - w.abs(),
    "w[index]": lambda w: w[index],
    "embedding": lambda w: nn.functional.embedding(index, w),
    "matmul": lambda w: torch.ones(2, 8) @ w,
    "T": lambda w: w.T + 0,
    "permute": lambda w: w.permute(-1, -2) + 0,
    "transpose nothing": lambda w: w.transpose(0, -2) + 0,
    "cat": lambda w: torch.cat([w, w]),
    "isfinite": torch.isfinite,
    "expand": lambda w: w.expand(2, 8, 13),
    "einsum": lambda w: torch.einsum("bi,oi->bo", torch.ones(2, 13), w),
    "tensordot": lambda w: torch.tensordot(torch.ones(13, 3), w, dims=([0], [1])),
    "bilinear": lambda w: nn.functional.bilinear(torch.ones(2, 8), torch.ones(2, 13), w[None]),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "stack": lambda w: torch.stack([w[0], w[1]]),
    "item": lambda w: torch.tensor(w[1, 2].item()),
    "vmap": lambda w: torch.vmap(lambda x: nn.functional.linear(x, w))(torch.ones(4, 13)),
    "vmap over rows": lambda w: torch.vmap(torch.sum)(w),
}


@pytest.mark.parametrize("name", READS)
def test_reading_operations_see_the_dequantised_values(name: str) -> None:
    weight = int8(linear())
    result = READS[name](weight)
    assert type(result) is Tensor
    torch.testing.assert_close(result, READS[name](values(weight).float().requires_grad_()))


@pytest.mark.parametrize("keys", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_stock_optimizer_raises_and_leaves_the_weight(optimizer: Any, decay: float, keys: dict[str, bool]) -> None:
    layer = linear()
    before = storage(int8(layer))
    layer(torch.randn(3, 13)).sum().backward()
    opt = optimizer([layer.weight], lr=0.1, weight_decay=decay, **keys)
    with pytest.raises(NotImplementedError, match=NAMED + r".*qgalore_compile\.QGaLoreAdamW"):
        opt.step()
    assert_same(int8(layer), before)


def test_share_memory_raises_in_place_of_crashing() -> None:
    with pytest.raises(NotImplementedError, match=NAMED + r".*weight\.codes"):
        int8(linear()).share_memory_()
    with pytest.raises(NotImplementedError, match="shared memory"):
        linear().share_memory()


@pytest.mark.parametrize("of", [lambda w: w, lambda w: w[0]], ids=["weight", "view"])
def test_what_takes_memory_of_floats_raises_in_place_of_crashing(of: Callable[[Any], Tensor]) -> None:
    weight = int8(linear()).detach()
    before = storage(weight)
    with pytest.raises(BufferError, match=r"Int8Weight\('0\.weight'.*take weight\.dequantize\(\)"):
        torch.from_dlpack(of(weight))
    with pytest.raises(NotImplementedError, match=r"apply_ would change .*weight\.copy_"):
        of(weight).apply_(lambda _: 0.0)
    assert_same(weight, before)
