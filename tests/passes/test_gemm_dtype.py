"""float32 products -> bfloat16 products between casts, of the projections and of what is decoded, and of no other."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from graphs import after, results, targets, traced
from kernels_support import evaluated_kernels
from passes_support import Built, Layer, assert_near, galore
from quantised_products import forward_and_input_gradient, stored_int8, with_bias
from support import Interpreted, assert_same_step, data, decoded, small, step_of, tokens, toy, training_step
from torch import Tensor

import qgalore_compile as qg
from qgalore_compile.kernels.ops import gemm as gemm_op
from qgalore_compile.passes.nodes import dtype, is_gemm
from qgalore_compile.passes.printing import program_text

aten = torch.ops.aten
T, M, N = 7, 10, 13
BFLOAT16 = 2.0**-7
"""Of a product's norm: two operands and the result, rounded to eight bits each."""
PASSES = ("update", "refresh", "reassociate", "gemm_dtype")


def built(*layers: Layer, passes: tuple[str, ...] = PASSES, tolerance: float = 4 * BFLOAT16) -> tuple[Built, Any]:
    """The step after the passes, compared with itself before them; and the manager.  A state follows from two products
    in a row, the weight from three."""
    made = galore(*layers)
    expected = made.run()
    with evaluated_kernels():
        manager = made.after(*passes, gemm="bf16")
        assert_near(made.run(), expected, tolerance)
    return made, manager


def dtypes(made: Built) -> Counter[torch.dtype]:
    """Of the graph's products."""
    return Counter(dtype(node) for node in made.graph.nodes if is_gemm(node))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_projections_are_taken_in_bfloat16(accumulate: int, side: str) -> None:
    made, manager = built(Layer(rule="sgd", side=side, accumulate=accumulate))
    assert dtypes(made) == {torch.bfloat16: 2 * accumulate + 1}
    assert len(manager.records[-1].matches) == manager.context.program["products_in_bfloat16"] == 2 * accumulate + 1


def test_a_gradient_that_is_not_taken_apart_stays_float32() -> None:
    made, _ = built(Layer(rule="sgd"), passes=("update", "gemm_dtype"))
    assert dtypes(made) == {torch.bfloat16: 2, torch.float32: 1}


def test_a_projection_that_something_is_added_to_stays_float32() -> None:
    def step(g: Tensor, w: Tensor, m: Tensor, p: Tensor) -> None:
        momentum = torch.addmm(m, g, p.t())
        aten.copy_.default(m, momentum)
        aten.copy_.default(w, w - 0.1 * (momentum @ p))

    module = traced(step, torch.randn(M, N), torch.randn(M, N), torch.randn(M, 4), torch.randn(4, N))
    record = after(module, "update", "gemm_dtype", gemm="bf16").records[-1]
    assert record.skipped == [("addmm", "a batch of products, or a projection that something is added to")]
    assert record.matches == ["mm"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_kernels_take_the_casts_in(side: str) -> None:
    """N is stored in bfloat16, the projector is decoded to it, and the write-back reads a bfloat16 product."""
    layer = Layer(rule="sgd", side=side, weight="int8", projector="int4", refresh="svd", due=False)
    made = galore(layer)
    with evaluated_kernels():
        manager = made.after(*PASSES, "fuse", "fuse_products", gemm="bf16")
        found = made.run()
    assert [record.skipped for record in manager.records] == [[]] * 6
    # R's first product decodes the projector; its second has two matrices as they are
    assert dtypes(made) == {torch.bfloat16: 1}
    assert targets(made.graph).count(gemm_op) == 1
    texts = [text for node in made.graph.nodes if (text := program_text(node))]
    assert [text.count("bf16") > 0 for text in texts] == [True] * 3
    twin = galore(layer, values=dict(zip(made.names, made.inputs, strict=True)))
    assert_near({"m": found["a_m"]}, {"m": twin.run()["a_m"]}, 4 * BFLOAT16)


def test_int8_products_are_taken_in_bfloat16_in_the_forward_and_for_the_inputs_gradient() -> None:
    inputs = [torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N)]
    module = traced(forward_and_input_gradient, *inputs)
    expected = results(module, inputs)
    assert len(after(module, "gemm_dtype", gemm="bf16").records[-1].matches) == 2
    assert {dtype(node) for node in module.graph.nodes if is_gemm(node)} == {torch.bfloat16}
    for one, other in zip(results(module, inputs)[:2], expected[:2], strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() <= BFLOAT16 * other.norm()


def test_a_bias_is_added_in_float32() -> None:
    inputs = [torch.randn(T, N), 1000 + torch.randn(M), *stored_int8(M, N)]
    module = traced(with_bias, *inputs)
    (expected, *_) = results(module, inputs)
    after(module, "gemm_dtype", gemm="bf16")
    (found, *_) = results(module, inputs)
    assert (found - expected).norm() <= BFLOAT16 * (expected - inputs[1]).norm()


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float64])
def test_products_of_another_dtype_stay(how: torch.dtype) -> None:
    made, manager = built(Layer(rule="sgd", dtype=how), tolerance=BFLOAT16)
    assert dtypes(made) == {how: 3}
    assert {reason for _, reason in manager.records[-1].skipped} == {f"a product of {how}"}


def test_nothing_changes_without_the_option() -> None:
    made = galore(Layer())
    before = targets(made.graph)
    assert made.after("update", "gemm_dtype").records[-1].matches == []
    assert targets(made.graph) == before


def test_a_whole_step_equals_the_eager_one_up_to_bfloat16() -> None:
    model, opt = toy(int8=True)
    step, backend = training_step(model, opt), Interpreted(gemm="bf16", strict=True)
    fast = torch.compile(step, backend=backend, fullgraph=True)
    for index in range(2):
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
        before = decoded(model, opt)
        with evaluated_kernels():
            fast(tokens(seed=index))
        found = decoded(model, opt)
        model.load_state_dict(weights)
        opt.load_state_dict(state)
        step(tokens(seed=index))
        # N is close to ±1 in the first steps, and a few of them change sign
        assert_same_step(before, found, decoded(model, opt), tolerance=0.5)
    assert backend.count == 1


def test_the_report_counts_the_products() -> None:
    model, opt = small(int8=True)
    report = qg.explain(step_of(model, opt), data(), options={"gemm": "bf16"})
    # R from its factors, the update, and the forward
    assert '4 products in bfloat16, since the option gemm is "bf16"' in str(report)
