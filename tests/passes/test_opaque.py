"""dequantise → mm  ->  one call;  Adam → mm → write-back  ->  one call;  equal regions share one function."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import after, assert_bit_equal, position, results, targets, traced
from quantised_products import GROUP, forward_and_input_gradient, product_and_size, stored_int8, with_bias
from torch import Tensor, fx

from qgalore_compile import formats, rng
from qgalore_compile.passes.nodes import ANCHOR, FUNCTIONALIZED, INVOKE, is_gemm, shape, value

aten = torch.ops.aten

T, M, N, R = 7, 10, 12, 4


def opaque(module: fx.GraphModule) -> Any:
    """The record of the pass."""
    return after(module, "update", "opaque").records[-1]


def calls(module: fx.GraphModule) -> list[str]:
    """Names of the functions that the graph calls, in order."""
    return [node.args[1] for node in module.graph.find_nodes(op="call_function", target=INVOKE)]


def functions(module: fx.GraphModule) -> dict[str, fx.Graph]:
    return {name: body.graph for name, body in module.named_children()}


def check(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, Any]:
    """Trace, run the pass, compare the results bit for bit; the module after it, and the pass's record."""
    module = traced(function, *inputs)
    expected = results(module, inputs)
    record = opaque(module)
    assert_bit_equal(results(module, inputs), expected)
    return module, record


# -- updates ----------------------------------------------------------------------------------------------------------


def updated(dy: Tensor, x: Tensor, p: Tensor, m: Tensor, w: Tensor, decay: float = 0.0) -> tuple[Tensor, Tensor]:
    """New momentum and weight of a layer projected on the right."""
    low = dy.t() @ x @ p.t()
    momentum = 0.9 * m + low
    return momentum, w - 0.1 * (momentum @ p) - decay * w


def layer(m: int = M, n: int = N, r: int = R, t: int = T) -> list[Tensor]:
    """dY, X, projector, momentum and weight."""
    return [torch.randn(t, m), torch.randn(t, n), torch.randn(r, n), torch.randn(m, r), torch.randn(m, n)]


def two_layers(first: float = 0.0, second: float = 0.0) -> Callable[..., None]:
    def step(*tensors: Tensor) -> None:
        for (dy, x, p, m, w), decay in ((tensors[:5], first), (tensors[5:], second)):
            momentum, weight = updated(dy, x, p, m, w, decay)
            aten.copy_.default(w, weight)
            aten.copy_.default(m, momentum)

    return step


def test_equal_layers_share_one_function() -> None:
    module, record = check(two_layers(), *layer(), *layer())
    assert len(record.matches) == 2
    assert calls(module) == ["qgalore_update_0"] * 2
    assert list(functions(module)) == ["qgalore_update_0"]


def test_another_weight_decay_makes_another_function() -> None:
    module, _ = check(two_layers(0.1, 0.2), *layer(), *layer())
    assert calls(module) == ["qgalore_update_0", "qgalore_update_1"]


def test_another_shape_makes_another_function() -> None:
    module, _ = check(two_layers(), *layer(), *layer(m=9))
    assert len(set(calls(module))) == 2


def test_another_layout_makes_another_function() -> None:
    other = layer()
    other[4] = torch.randn(N, M).t()  # a weight stored transposed
    module, _ = check(two_layers(), *layer(), *other)
    assert len(set(calls(module))) == 2


def test_another_dtype_makes_another_function() -> None:
    module, _ = check(two_layers(), *layer(), *(each.bfloat16() for each in layer()))
    assert len(set(calls(module))) == 2


def test_layers_of_one_shape_with_other_token_counts_share_a_function() -> None:
    module, _ = check(two_layers(), *layer(), *layer(t=5))
    assert len(set(calls(module))) == 1


def test_the_up_projection_and_the_new_weight_exist_inside_the_function_only() -> None:
    def whole(dy: Tensor, x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, p: Tensor, m: Tensor) -> None:
        low = p @ (dy.t() @ x)
        momentum = 0.9 * m + low
        weight = formats.dequantize_int8(codes, scale, offset, GROUP) - 0.1 * (p.t() @ momentum)
        for part, new in zip((codes, scale, offset), formats.quantize_int8(weight, GROUP)[:3], strict=True):
            aten.copy_.default(part, new)
        aten.copy_.default(m, momentum)

    stored = formats.quantize_int8(torch.randn(M, N), GROUP)[:3]
    inputs = [torch.randn(T, M), torch.randn(T, N), *stored, torch.randn(R, M), torch.randn(R, N)]
    module, reassociated = traced(whole, *inputs), traced(whole, *inputs)
    after(module, "update", "reassociate", "opaque")
    after(reassociated, "update", "reassociate")  # the same products of the same shapes, outlined or not
    floats = [
        node.name for node in module.graph.nodes if shape(node) in ((M, N), (N, M)) and value(node).is_floating_point()
    ]
    assert floats == []
    (body,) = functions(module).values()
    assert [shape(node) for node in body.nodes if is_gemm(node)] == [(M, N)]
    assert_bit_equal(results(module, inputs), results(reassociated, inputs))


def test_a_layer_is_noted_under_its_functions_name() -> None:
    module = traced(two_layers(), *layer(), *layer())
    context = after(module, "update", "opaque").context
    assert [note.update_function for note in context.notes.values()] == ["qgalore_update_0"] * 2
    assert context.program["functions"] == {"qgalore_update_0": 2}


def test_anchors_that_stood_before_the_call_come_behind_it() -> None:
    def step(dy: Tensor, x: Tensor, p: Tensor, m: Tensor, w: Tensor) -> None:
        momentum, weight = updated(dy, x, p, m, w)
        aten.copy_.default(m, momentum)
        aten.copy_.default(w, weight)

    inputs = layer()
    module = traced(step, *inputs)
    graph = module.graph
    stored = next(node for node in graph.find_nodes(op="call_function", target=ANCHOR) if node.args[0].name == "m_1")
    stored.args[1].append(stored)  # before the up-projection, which reads the new momentum, not the input
    graph.lint()
    expected = results(module, inputs)
    opaque(module)
    (call,) = graph.find_nodes(op="call_function", target=INVOKE)
    assert all(position(graph, anchor) > position(graph, call) for anchor in graph.nodes if anchor.target is ANCHOR)
    assert_bit_equal(results(module, inputs), expected)


def test_an_anchor_that_overwrites_what_the_call_reads_comes_behind_it() -> None:
    """A step counter that all layers read: the region read it early, the call reads it late."""

    def step(dy: Tensor, x: Tensor, p: Tensor, m: Tensor, w: Tensor, count: Tensor) -> None:
        low = dy.t() @ x @ p.t()
        momentum = (0.9 * m + low) / count
        aten.copy_.default(count, count + 1)
        aten.copy_.default(w, w - 0.1 * (momentum @ p))

    module, record = check(step, *layer(), torch.ones(1))
    assert len(record.matches) == 1
    (call,) = module.graph.find_nodes(op="call_function", target=INVOKE)
    assert any(shape(source) == (1,) for source in call.args[2:])


def test_a_statistic_of_two_layers_that_stood_before_the_second_call_comes_behind_it() -> None:
    def step(*tensors: Tensor) -> None:
        largest: list[Tensor] = []
        *layers, statistic = tensors
        stored = []
        for dy, x, p, m, w in (layers[:5], layers[5:]):
            momentum = 0.9 * m + dy.t() @ x @ p.t()
            update = momentum @ p
            largest.append(update.abs().amax())
            stored += [(w, update, m, momentum)]
        both = torch.maximum(*largest)
        for w, update, m, momentum in stored:
            aten.copy_.default(w, w - 0.1 * update)
            aten.copy_.default(m, momentum)
        aten.copy_.default(statistic, both)

    module, record = check(step, *layer(), *layer(), torch.zeros(()))
    assert len(record.matches) == 2
    assert len(calls(module)) == 2


def test_results_keep_their_strides() -> None:
    def step(dy: Tensor, x: Tensor, p: Tensor, m: Tensor, w: Tensor) -> None:
        momentum, weight = updated(dy, x, p, m, w)
        aten.copy_.default(m, momentum)
        aten.copy_.default(w, weight)

    inputs = layer()
    inputs[3] = torch.randn(R, M).t()  # so is what is computed from it, pointwise
    inputs[4] = torch.randn(N, M).t()
    module, _ = check(step, *inputs)
    (body,) = functions(module).values()
    (end,) = body.find_nodes(op="output")
    assert end.meta["original_output_strides"] == [(1, M), (1, M)]
    assert end.meta["user_visible_output_idxs"] == [0, 1]


def test_a_region_that_takes_a_size_of_the_graph_is_left_with_a_reason() -> None:
    def step(dy: Tensor, x: Tensor, p: Tensor, m: Tensor, w: Tensor) -> None:
        momentum, weight = updated(dy / x.shape[0], x, p, m, w)
        aten.copy_.default(m, momentum * x.shape[0])
        aten.copy_.default(w, weight)

    inputs = layer()
    module = traced(step, *inputs, symbolic=[0, 1])
    expected = results(module, inputs)
    record = opaque(module)
    assert record.matches == []
    assert [reason for _, reason in record.skipped] == [
        "mul_3 takes sym_size_int, which is no tensor: a size or a tuple of the graph"
    ]
    assert_bit_equal(results(module, inputs), expected)


def test_random_bits_are_inputs_for_the_parameters_number_in_them_would_tell_layers_apart() -> None:
    def step(at: Tensor, *tensors: Tensor) -> None:
        for param, (dy, x, p, m, w) in enumerate((tensors[:5], tensors[5:])):
            momentum, weight = updated(dy, x, p, m, w)
            noise = rng.random_bits((M, N), seed=1, step=at + 1, param=param)
            aten.copy_.default(w, rounded(weight, noise))
            aten.copy_.default(m, momentum)
        aten.copy_.default(at, at + 1)

    def rounded(weight: Tensor, noise: Tensor) -> Tensor:
        return torch.ops.qgalore.stochastic_round.default(weight, noise, torch.bfloat16).float()

    module, record = check(step, torch.tensor(3), *layer(), *layer())
    assert len(record.matches) == 2
    assert calls(module) == ["qgalore_update_0"] * 2
    random = torch.ops.qgalore.random_bits.default
    assert targets(module.graph).count(random) == 2
    assert random not in targets(functions(module)["qgalore_update_0"])


def test_a_layers_part_of_an_unbind_is_an_input() -> None:
    """`nonfinite="skip_parameter"`: whether a layer is written is one of several results of an op that all share."""

    def step(*tensors: Tensor) -> None:
        each = (tensors[:5], tensors[5:])
        lows = [dy.t() @ x @ p.t() for dy, x, p, _, _ in each]
        finite = torch.isfinite(torch.stack([low.square().sum() for low in lows])).unbind()
        for low, fine, (_, _, p, m, w) in zip(lows, finite, each, strict=True):
            momentum = 0.9 * m + low
            aten.copy_.default(m, torch.where(fine, momentum, m))
            aten.copy_.default(w, torch.where(fine, w - 0.1 * (momentum @ p), w))

    module, record = check(step, *layer(), *layer())
    assert len(record.matches) == 2
    assert record.skipped == []
    assert calls(module) == ["qgalore_update_0"] * 2


def test_a_second_run_does_not_take_a_name_that_is_taken() -> None:
    def step(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return x @ formats.dequantize_int8(codes, scale, offset, GROUP).t()

    inputs = [torch.randn(T, N), *formats.quantize_int8(torch.randn(M, N), GROUP)[:3]]
    module = traced(step, *inputs)
    opaque(module)
    with module.graph.inserting_before(next(iter(module.graph.find_nodes(op="output")))):
        end = module.graph.find_nodes(op="output")[0]
        x, codes, *_ = module.graph.find_nodes(op="placeholder")
        decoded = module.graph.call_function(torch.ops.prims.convert_element_type.default, (codes, torch.float32))
        decoded.meta["val"] = value(codes).float()
        turned = module.graph.call_function(aten.permute.default, (decoded, [1, 0]))
        turned.meta["val"] = value(decoded).t()
        product = module.graph.call_function(aten.mm.default, (x, turned))
        product.meta["val"] = value(x) @ value(turned)
        end.args = ((end.args[0], product),)
    expected = results(module, inputs)
    opaque(module)
    assert len(set(calls(module))) == 2
    assert_bit_equal(results(module, inputs), expected)


# -- products with a quantised matrix ---------------------------------------------------------------------------------


def test_forward_and_input_gradient_of_an_int8_linear_become_a_call_each() -> None:
    module, record = check(forward_and_input_gradient, torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N))
    assert len(record.matches) == 2
    assert len(set(calls(module))) == 2
    assert set(targets(module.graph)) == {INVOKE, operator.getitem}


def test_a_decoding_that_two_products_share_stands_in_both_functions_and_nowhere_else() -> None:
    module, _ = check(forward_and_input_gradient, torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N))
    decodes = [targets(body).count(torch.ops.prims.convert_element_type.default) for body in functions(module).values()]
    assert decodes == [1, 1]
    assert torch.ops.prims.convert_element_type.default not in targets(module.graph)


def test_a_decoding_that_somebody_else_reads_stays_for_that_reader() -> None:
    module, record = check(product_and_size, torch.randn(T, N), *stored_int8(M, N))
    assert len(record.matches) == 1
    assert torch.ops.prims.convert_element_type.default in targets(module.graph)


def test_a_bias_is_an_input_of_the_function() -> None:
    module, _ = check(with_bias, torch.randn(T, N), torch.randn(M), *stored_int8(M, N))
    (body,) = functions(module).values()
    assert aten.addmm.default in targets(body)
    assert len(body.find_nodes(op="placeholder")) == 5


def test_linears_of_one_shape_share_forward_and_input_gradient() -> None:
    def step(x: Tensor, *stored: Tensor) -> Tensor:
        for index in range(0, len(stored), 3):
            x = torch.relu(x @ formats.dequantize_int8(*stored[index : index + 3], GROUP).t())
        return x

    module, _ = check(step, torch.randn(T, N), *stored_int8(N, N), *stored_int8(N, N), *stored_int8(N, N))
    assert calls(module) == ["qgalore_product_0"] * 3


def test_a_product_of_three_dimensions_becomes_a_call() -> None:
    def step(x: Tensor, *stored: Tensor) -> Tensor:
        weight = formats.dequantize_int8(*stored, GROUP)
        return torch.bmm(x, weight.t().expand(x.shape[0], N, M))

    _, record = check(step, torch.randn(3, T, N), *stored_int8(M, N))
    assert len(record.matches) == 1


def test_an_int4_projector_is_decoded_inside() -> None:
    packed = formats.quantize_int4(torch.randn(R, N), GROUP)

    def step(x: Tensor, *stored: Tensor) -> Tensor:
        return x @ formats.dequantize_int4(*stored, N, GROUP).t()

    module, record = check(step, torch.randn(T, N), *packed[:3])
    assert len(record.matches) == 1
    assert [shape(node) for node in module.graph.nodes if node.target is not INVOKE][-2] == (T, R)


def test_products_with_drawn_projectors_share_a_function() -> None:
    """Bits are drawn outside of it: a parameter's number is a constant of theirs."""

    def step(at: Tensor, *xs: Tensor) -> list[Tensor]:
        found = []
        for param, x in enumerate(xs):
            words = rng.random_bits((R, N // 4), seed=1, step=at, param=param)
            bits = (words.unsqueeze(-1) >> torch.arange(4, dtype=torch.int32)) & 1
            found.append(x @ (1 - 2 * bits.view(R, N)).to(torch.float32).t())
        return found

    module, record = check(step, torch.tensor(3), torch.randn(T, N), torch.randn(T, N))
    assert len(record.matches) == 2
    assert calls(module) == ["qgalore_product_0"] * 2
    assert targets(module.graph).count(torch.ops.qgalore.random_bits.default) == 2


def test_a_product_of_floating_point_matrices_is_left() -> None:
    module, record = check(lambda x, w: x @ w.t(), torch.randn(T, N), torch.randn(M, N))
    assert record.matches == record.skipped == []
    assert calls(module) == []


@pytest.mark.parametrize("targets", [torch.int64, torch.int32, torch.bool])
def test_the_targets_of_a_loss_are_not_codes(targets: torch.dtype) -> None:
    """The gradient by the logits, in a backward that is a graph of its own: it follows from inputs alone."""

    def step(logits: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
        return (torch.softmax(logits, -1) - chosen.float()) @ w

    chosen = torch.randint(0, 2, (T, M if targets == torch.bool else 1)).to(targets)
    module, record = check(step, torch.randn(T, M), chosen, torch.randn(M, N))
    assert record.matches == []
    assert calls(module) == []


@pytest.mark.parametrize("look_up", ["embedding", "index"])
def test_an_embeddings_tokens_are_not_codes(look_up: str) -> None:
    def step(tokens: Tensor, table: Tensor, w: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(tokens, table) if look_up == "embedding" else table[tokens]
        return rows @ w.t()

    module, record = check(step, torch.randint(0, 5, (T,)), torch.randn(5, N), torch.randn(M, N))
    assert record.matches == []
    assert calls(module) == []


def test_a_symbolic_token_count_is_no_obstacle() -> None:
    inputs = [torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N)]
    module = traced(forward_and_input_gradient, *inputs, symbolic=[0, 1])
    other = [torch.randn(T + 3, N), torch.randn(T + 3, M), *inputs[2:]]
    expected = [results(module, each) for each in (inputs, other)]
    assert len(opaque(module).matches) == 2
    for each, before in zip((inputs, other), expected, strict=True):
        assert_bit_equal(results(module, each), before)


def test_an_update_with_a_symbolic_token_count_is_one_call() -> None:
    inputs = [*layer(), *layer()]
    module = traced(two_layers(), *inputs, symbolic=[0, 1, 5, 6])
    expected = results(module, inputs)
    assert len(opaque(module).matches) == 2
    assert calls(module) == ["qgalore_update_0"] * 2
    assert_bit_equal(results(module, inputs), expected)


def test_the_analysis_stays_true_where_the_projection_itself_becomes_a_call() -> None:
    """With a quantised projector and `reassociate="never"` R is a product with a quantised matrix."""
    packed = formats.quantize_int4(torch.randn(R, N), GROUP)

    def step(dy: Tensor, x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, m: Tensor, w: Tensor) -> None:
        p = formats.dequantize_int4(codes, scale, offset, N, GROUP)
        momentum, weight = updated(dy, x, p, m, w)
        aten.copy_.default(m, momentum)
        aten.copy_.default(w, weight)

    inputs = [torch.randn(T, M), torch.randn(T, N), *packed[:3], torch.randn(M, R), torch.randn(M, N)]
    module = traced(step, *inputs)
    expected = results(module, inputs)
    (found,) = after(module, "update", "opaque").context.layers
    assert not found.down._erased
    assert shape(found.down) == (M, R)
    assert FUNCTIONALIZED not in targets(module.graph)
    assert Counter(calls(module)) == {"qgalore_update_0": 1, "qgalore_product_1": 1}
    assert_bit_equal(results(module, inputs), expected)
