"""A GPU's generated kernels become Triton kernels of the graph: one for equal layers, written in place.

Graphs are compiled for a GPU that is not there and interpreted on the CPU (``interpreted.triton_on_cpus``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import after, results, targets, traced
from passes_support import Built, Layer, galore
from quantised_products import GROUP, forward_and_input_gradient, stored_int8
from support import assert_within_contract
from torch import Tensor, fx

pytest.importorskip("triton")

from interpreted import Calls
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

from qgalore_compile import formats, rng
from qgalore_compile.backend.dry_run import final_graph
from qgalore_compile.kernels import ops
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton.tiling import NoTilingError
from qgalore_compile.passes import PASSES, PassManager
from qgalore_compile.passes.nodes import FUNCTIONALIZED, TRITON, value

pytestmark = pytest.mark.triton

aten = torch.ops.aten
T, M, N = 7, 10, 13
NAMES = ("update", "reassociate", "fuse", "fuse_products", "triton_calls")
UPDATE = Layer("a", weight="int8", projector="int4")


def triton_nodes(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=TRITON))


def kernels(graph: fx.Graph) -> list[int]:
    """Each call's kernel, as a number."""
    return [node.kwargs["kernel_idx"] for node in triton_nodes(graph)]


def final(module: fx.GraphModule, *names: str) -> tuple[fx.GraphModule, PassManager]:
    """What Inductor's own passes make of a graph, with those of ours among them."""
    manager = PassManager([each for each in PASSES if each.name in names], lint=True)
    fakes = [value(node) for node in module.graph.find_nodes(op="placeholder")]
    with torch._inductor.config.patch(post_grad_custom_post_pass=manager):
        return final_graph(module, fakes, is_inference=False), manager


def ran(calls: Calls, module: fx.GraphModule, inputs: list[Tensor]) -> list[Tensor]:
    """As ``graphs.results``, of a final graph."""
    cloned = [given.clone() for given in inputs]
    returned = torch.utils._pytree.tree_leaves(calls.runner(module)(*cloned))
    return [*(each for each in returned if each is not None), *cloned]


def update_with_random_bits(params: tuple[int, ...]) -> Callable[..., None]:
    """SGD with momentum of one INT8 weight a parameter, rounded stochastically."""

    def step(at: Tensor, *given: Tensor) -> None:
        for index, param in enumerate(params):
            dy, x, p, m, *stored = given[7 * index : 7 * index + 7]
            momentum = 0.9 * m + dy.t() @ x @ p.t()
            weight = formats.dequantize_int8(*stored, GROUP) - 0.1 * (momentum @ p)
            noise = rng.random_bits(weight.shape, seed=2**40 + 1, step=at, param=param)
            new = formats.quantize_int8(weight, GROUP, noise=noise)[:3]
            for part, one in zip(stored, new, strict=True):
                aten.copy_.default(part, one)
            aten.copy_.default(m, momentum)

    return step


def inputs_with_random_bits(count: int) -> list[Tensor]:
    inputs = [torch.tensor(3)]
    for _ in range(count):
        inputs += [torch.randn(T, 20), torch.randn(T, N), torch.randn(4, N), torch.randn(20, 4), *stored_int8(20, N)]
    return inputs


# -- the pass ---------------------------------------------------------------------------------------------------------


def test_a_call_that_writes_becomes_a_functional_one_whose_results_are_named(calls: Calls) -> None:
    built = galore(UPDATE)
    record = built.after(*NAMES).records[-1]
    assert (len(record.matches), record.skipped) == (3, [])
    assert FUNCTIONALIZED not in targets(built.graph)
    assert ops.gemm not in targets(built.graph)
    *_, low, up = triton_nodes(built.graph)
    assert [call.kwargs["tensors_to_clone"] for call in (low, up)] == [["b0", "b3", "b4"], ["e_b0", "e_b1", "e_b2"]]
    for call in (low, up):
        for name in call.kwargs["tensors_to_clone"]:
            assert value(call)[name].shape == value(call.kwargs["kwargs"][name]).shape
        for user in call.users:
            assert user.target is operator.getitem
            assert user.args[1] in call.kwargs["tensors_to_clone"]
    written = {built.name_of.get(node.name) for node in up.kwargs["kwargs"].values() if isinstance(node, fx.Node)}
    assert {"a_w_codes", "a_w_scale", "a_w_offset"} <= written


def test_a_product_that_is_read_writes_to_a_tensor_of_its_own(calls: Calls) -> None:
    module = traced(forward_and_input_gradient, torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N))
    record = after(module, *NAMES).records[-1]
    assert (len(record.matches), record.skipped) == (2, [])
    assert targets(module.graph) == [aten.empty.memory_format, TRITON, operator.getitem] * 2
    for call, size in zip(triton_nodes(module.graph), ((T, M), (T, N)), strict=True):
        assert value(call.kwargs["kwargs"]["product"]).shape == size
        assert call.kwargs["tensors_to_clone"] == ["product"]


def test_equal_layers_share_their_kernels(calls: Calls) -> None:
    built = galore(*(Layer(name, weight="int8", projector="int4") for name in "abc"), Layer("d", shape=(12, 20)))
    built.after(*NAMES)
    found = kernels(built.graph)
    assert len(found) == 3 * 3 + 2  # a projector in floating point is a library's to multiply with
    assert len(set(found)) == 3 + 2


def test_two_parameters_share_a_kernel_and_point_to_numbers_16_bytes_apart(calls: Calls) -> None:
    module = traced(update_with_random_bits((2, 5)), *inputs_with_random_bits(2))
    after(module, *NAMES)
    ups = [node for node in triton_nodes(module.graph) if "e_b0" in node.kwargs["tensors_to_clone"]]
    assert len(ups) == 2
    assert ups[0].kwargs["kernel_idx"] == ups[1].kwargs["kernel_idx"]
    constants = [kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"]) for node in ups]
    assert [list(each.values()) for each in constants] == [[2**40 + 1]] * 2  # the seed, and no more
    (name,) = (name for name in ups[0].kwargs["kwargs"] if name not in ups[0].kwargs["tensors_to_clone"]
               and ups[0].kwargs["kwargs"][name].target is aten.select.int)  # fmt: skip
    places = [node.kwargs["kwargs"][name] for node in ups]
    table = places[0].args[0]
    assert [place.args for place in places] == [(table, 0, 8), (table, 0, 20)]
    assert value(table).dtype == torch.int32
    assert 8 * value(table).element_size() % 16 == 0
    assert value(table).numel() == 4 * (5 + 1)
    assert value(places[0]).shape == ()


def test_an_unknown_number_of_tokens_makes_the_grid_a_node(calls: Calls) -> None:
    inputs = [torch.randn(T, N), torch.randn(T, M), *stored_int8(M, N)]
    module = traced(forward_and_input_gradient, *inputs, symbolic=[0, 1])
    after(module, *NAMES)
    for call in triton_nodes(module.graph):
        (grid,) = call.kwargs["grid"]
        assert isinstance(grid[0], fx.Node)
        assert isinstance(call.kwargs["kwargs"]["m"], fx.Node)
        assert "n" not in call.kwargs["kwargs"]
    module = traced(forward_and_input_gradient, *inputs, symbolic=[0, 1])
    made, _ = final(module, *NAMES)
    for tokens in (T, 1, 200):
        given = [torch.randn(tokens, N), torch.randn(tokens, M), *inputs[2:]]
        for one, other in zip(ran(calls, made, given), forward_and_input_gradient(*given), strict=False):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def test_an_operand_whose_strides_are_unknown_is_copied(calls: Calls) -> None:
    inputs = [torch.randn(M, T).t(), *stored_int8(M, N)]  # (T, M), whose second stride is T

    def step(x: Tensor, *stored: Tensor) -> Tensor:
        return x @ formats.dequantize_int8(*stored, GROUP)

    module = traced(step, *inputs, symbolic=[0])
    after(module, *NAMES)
    (call,) = triton_nodes(module.graph)
    assert call.kwargs["kwargs"]["left"].target is aten.clone.default
    module = traced(step, *inputs)
    after(module, *NAMES)
    (call,) = triton_nodes(module.graph)
    assert aten.clone.default not in targets(module.graph)


def test_a_graph_on_cpus_is_left_alone() -> None:
    built = galore(UPDATE)
    record = built.after(*NAMES).records[-1]
    assert (record.matches, record.skipped, record.ops) == ([], [], {})
    assert FUNCTIONALIZED in targets(built.graph)


def test_a_product_that_no_tile_fits_is_left_with_the_reason(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise NoTilingError("no tile fits")

    monkeypatch.setattr(triton_kernels, "of_call", refuse)
    built = galore(UPDATE)
    record = built.after(*NAMES).records[-1]
    assert len(record.matches) == 1
    assert [reason for _, reason in record.skipped] == ["no tile fits"] * 2
    assert ops.gemm in targets(built.graph)


def test_layers_know_their_new_calls(calls: Calls) -> None:
    built = galore(UPDATE)
    manager = built.after(*NAMES)
    (layer,) = manager.context.layers
    assert layer.up in triton_nodes(built.graph)


# -- behind Inductor's own passes -------------------------------------------------------------------------------------


def assert_written_in_place(built: Built, written: set[str]) -> None:
    """No tensor is cloned or copied into an input: kernels write what the step was given."""
    assert [target for target in targets(built.graph) if target in (aten.clone.default, aten.copy_.default)] == []
    found = set()
    for call in built.operator(triton_kernel_wrapper_mutation):
        found |= {built.name_of.get(node.name) for node in call.kwargs["kwargs"].values() if isinstance(node, fx.Node)}
    assert written <= found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("weight", ["int8", "float"])
@pytest.mark.parametrize("rule", ["adam", "lion"])
def test_an_update_is_written_in_place_and_is_what_it_was(rule: str, weight: str, side: str, calls: Calls) -> None:
    layer = Layer("a", weight=weight, projector="int4", rule=rule, side=side)
    torch.manual_seed(0)
    plain = galore(layer)
    torch.manual_seed(0)
    built = galore(layer)
    plain.after("update", "reassociate")
    final(built.module, *NAMES)
    states = {"a_m", *(["a_v"] if rule == "adam" else [])}
    weights = {"a_w_codes", "a_w_scale", "a_w_offset"} if weight == "int8" else {"a_w"}
    assert_written_in_place(built, states | weights)
    found = dict(zip(built.names, ran(calls, built.module, built.inputs), strict=True))
    assert_within_contract(found, plain.run())
    assert len(calls.counted) == 3


def test_random_bits_differ_by_parameter_and_are_eagers(calls: Calls) -> None:
    step, inputs = update_with_random_bits((2, 5)), inputs_with_random_bits(2)
    plain = traced(step, *inputs)
    after(plain, "update", "reassociate")
    made, _ = final(traced(step, *inputs), *NAMES)
    found, expected = (
        dict(zip(map(str, range(99)), each, strict=False))
        for each in (ran(calls, made, inputs), results(plain, inputs))
    )
    assert_within_contract(found, expected)
    swapped, _ = final(traced(update_with_random_bits((5, 2)), *inputs), *NAMES)
    other = ran(calls, swapped, inputs)
    assert not torch.equal(other[5], found["5"])


def test_every_pass_together_gives_the_step_that_no_pass_has_seen(calls: Calls) -> None:
    layers = [Layer("a", weight="int8", projector="int4"), Layer("b", (12, 20), weight="int8", projector="int4"),
              Layer("c", (9, 7), rule="sgd")]  # fmt: skip
    torch.manual_seed(0)
    plain = galore(*layers)
    torch.manual_seed(0)
    built = galore(*layers)
    plain.after("update", "reassociate")
    _, manager = final(built.module, *(each.name for each in PASSES))
    assert [record.name for record in manager.records] == [each.name for each in PASSES]
    assert FUNCTIONALIZED not in targets(built.graph)
    found = dict(zip(built.names, ran(calls, built.module, built.inputs), strict=True))
    assert_within_contract(found, plain.run())
