"""dequantise → mm  ->  one call of a product that decodes its operand; what cannot be stays, with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import after, assert_bit_equal, results, targets, traced
from quantised_products import GROUP, forward_and_input_gradient, product_and_size, stored_int8, with_bias
from torch import Tensor, fx

from qgalore_compile import formats, rng
from qgalore_compile.kernels import lowering, ops

aten = torch.ops.aten
T, M, N, R = 7, 10, 13, 4


def check(function: Callable[..., Any], *inputs: Tensor, **how: Any) -> tuple[fx.GraphModule, Any]:
    """Trace, run the pass, compare the results; the module after it, and the pass's record."""
    module = traced(function, *inputs, **how)
    expected = results(module, inputs)
    record = after(module, "update", "fuse_products").records[-1]
    for one, other in zip(results(module, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    return module, record


def test_forward_and_input_gradient_of_an_int8_linear_are_all_that_is_left() -> None:
    module, record = check(forward_and_input_gradient, torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N))
    assert (len(record.matches), record.skipped) == (2, [])
    assert targets(module.graph) == [ops.gemm, ops.gemm]


def test_an_int4_projector_is_decoded_on_either_side_of_a_product() -> None:
    packed = formats.quantize_int4(torch.randn(R, N), GROUP)

    def step(x: Tensor, y: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
        projector = formats.dequantize_int4(*stored, N, GROUP)
        return x @ projector.t(), projector.t() @ y

    module, record = check(step, torch.randn(T, N), torch.randn(R, T), *packed[:3])
    assert len(record.matches) == 2
    assert set(targets(module.graph)) == {ops.gemm}


def test_bfloat16_operands_are_decoded_to_bfloat16() -> None:
    def step(x: Tensor, *stored: Tensor) -> Tensor:
        return x @ formats.dequantize_int8(*stored, GROUP, dtype=torch.bfloat16).t()

    inputs = [torch.randn(T, N).bfloat16(), *stored_int8(M, N)]
    module = traced(step, *inputs)
    expected = results(module, inputs)
    assert len(after(module, "update", "fuse_products").records[-1].matches) == 1
    assert_bit_equal(results(module, inputs), expected)


def test_an_operand_that_draws_random_bits_is_decoded_once_and_not_once_a_block() -> None:
    def step(x: Tensor, at: Tensor, *stored: Tensor) -> Tensor:
        noise = rng.random_bits((M, N), seed=1, step=at, param=2).to(torch.float32)
        return x @ (formats.dequantize_int8(*stored, GROUP) + noise * 2.0**-16).t()

    module, record = check(step, torch.randn(T, N), torch.tensor(3), *stored_int8(M, N))
    ((_, reason),) = record.skipped
    assert reason.startswith("an operand that draws random bits as it is decoded")
    assert ops.gemm not in targets(module.graph)


def test_a_symbolic_token_count_is_no_obstacle() -> None:
    inputs = [torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N)]
    module, record = check(forward_and_input_gradient, *inputs, symbolic=[0, 1])
    assert len(record.matches) == 2
    more = [torch.randn(T + 3, N), torch.randn(T + 3, M), *inputs[2:]]
    expected = forward_and_input_gradient(*more)
    for one, other in zip(results(module, more)[:2], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_decoding_that_somebody_else_reads_stays_for_that_reader() -> None:
    module, record = check(product_and_size, torch.randn(T, N), *stored_int8(M, N))
    assert len(record.matches) == 1
    assert torch.ops.prims.convert_element_type.default in targets(module.graph)


def test_a_bias_is_added_to_the_product() -> None:
    module, record = check(with_bias, torch.randn(T, N), torch.randn(M), *stored_int8(M, N))
    assert (record.matches, record.skipped) == (["addmm"], [])
    assert targets(module.graph) == [ops.gemm, aten.add.Tensor]


def test_a_whole_matrix_is_added_to_the_product() -> None:
    """A residual, or the gradients of an input that several layers read."""

    def step(x: Tensor, y: Tensor, *stored: Tensor) -> Tensor:
        return torch.addmm(y, x, formats.dequantize_int8(*stored, GROUP).t())

    module, _ = check(step, torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N), symbolic=[0, 1])
    assert set(targets(module.graph)) - {aten.sym_size.int} == {ops.gemm, aten.add.Tensor}


def test_a_bias_in_bfloat16_is_added_to_the_rounded_product() -> None:
    """What the pass does to its rounding: at most that of the product itself."""

    def step(x: Tensor, bias: Tensor, *stored: Tensor) -> Tensor:
        return torch.addmm(bias, x, formats.dequantize_int8(*stored, GROUP, dtype=torch.bfloat16).t())

    inputs = [torch.randn(T, N).bfloat16(), torch.randn(M).bfloat16(), *stored_int8(M, N)]
    module = traced(step, *inputs)
    (expected, *_) = results(module, inputs)
    weight = formats.dequantize_int8(*inputs[2:], GROUP, dtype=torch.bfloat16)
    assert after(module, "update", "fuse_products").records[-1].matches == ["addmm"]
    (found, *_) = results(module, inputs)
    assert torch.equal(found, inputs[0] @ weight.t() + inputs[1])
    rounding = torch.finfo(torch.bfloat16).eps * ((inputs[0] @ weight.t()).abs() + expected.abs()).float()
    assert ((found - expected).float().abs() <= rounding).all()


def test_a_sum_with_factors_is_left_with_the_reason() -> None:
    def step(x: Tensor, y: Tensor, *stored: Tensor) -> Tensor:
        return torch.addmm(y, x, formats.dequantize_int8(*stored, GROUP).t(), alpha=2)

    module, record = check(step, torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N))
    assert record.skipped == [("addmm", "a sum with factors")]
    assert aten.addmm.default in targets(module.graph)


def test_a_momentum_that_a_projection_adds_to_stays_the_updates() -> None:
    packed = formats.quantize_int4(torch.randn(R, N), GROUP)

    def step(g: Tensor, w: Tensor, m: Tensor, *stored: Tensor) -> None:
        projector = formats.dequantize_int4(*stored, N, GROUP)
        momentum = torch.addmm(m, g, projector.t())
        aten.copy_.default(m, momentum)
        aten.copy_.default(w, w - 0.1 * (momentum @ projector))

    module, record = check(step, torch.randn(M, N), torch.randn(M, N), torch.randn(M, R), *packed[:3])
    assert record.skipped == [("addmm", "a sum of a projected gradient and something else")]
    assert aten.addmm.default in targets(module.graph)


def test_a_product_of_floating_point_matrices_is_nothing_to_tell_of() -> None:
    _, record = check(lambda x, w: x @ w.t(), torch.randn(T, N), torch.randn(M, N))
    assert record.matches == record.skipped == []


def test_an_embeddings_tokens_are_not_codes() -> None:
    def step(tokens: Tensor, table: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, table) @ w.t()

    _, record = check(step, torch.randint(0, 5, (T,)), torch.randn(5, N), torch.randn(M, N))
    assert record.matches == record.skipped == []


def test_what_a_product_made_of_inputs_alone_gives_is_not_decoded_from_them() -> None:
    """The first layer's activations follow from nothing but inputs, through a product that this pass replaced."""

    def step(x: Tensor, w: Tensor, *stored: Tensor) -> Tensor:
        return (x @ formats.dequantize_int8(*stored, GROUP).t()) @ w

    module, record = check(step, torch.randn(T, N), torch.randn(M, R), *stored_int8(M, N))
    assert len(record.matches) == 1
    assert targets(module.graph) == [ops.gemm, aten.mm.default]
    assert after(module, "opaque").records[-1].matches == []


def test_another_device_is_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_registered", [replace(lowering.CPP, devices=("xpu",))])
    _, record = check(forward_and_input_gradient, torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N))
    assert record.matches == []
    assert "no generated kernels for 'cpu', only for 'xpu'" in record.skipped[0][1]
