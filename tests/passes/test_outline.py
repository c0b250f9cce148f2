"""layer · layer · layer  ->  three calls of one function; every result stays bit for bit.

A layer here is y = x + tanh(x W) · sigmoid(x V), with some padding of its own, so that it is long enough for a section.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graphs import after, assert_bit_equal, results, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from qgalore_compile import rng
from qgalore_compile.backend.entry import Options
from qgalore_compile.passes import PassRecord
from qgalore_compile.passes.liveness import liveness
from qgalore_compile.passes.mutation import FUNCTIONALIZED, functional_arguments
from qgalore_compile.passes.nodes import ANCHOR, INVOKE
from qgalore_compile.passes.sections import SHORTEST

aten = torch.ops.aten

T, N = 8, 16


def inputs(layers: int, each: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(T, N), *(torch.randn(N, N) / 4 for _ in range(layers * each))]


def layer(x: Tensor, w: Tensor) -> Tensor:
    """Eighteen operations."""
    for _ in range(3):
        y = x @ w
        x = x + torch.tanh(y) * torch.sigmoid(y) + 0.5
    return x


def other(x: Tensor, w: Tensor) -> Tensor:
    """As many, of another kind."""
    for _ in range(3):
        y = x @ w
        x = x - torch.sin(y) * torch.cos(y) - 0.5
    return x


def outlined(
    function: Callable[..., object], given: Sequence[Tensor], **options: Any
) -> tuple[fx.GraphModule, PassRecord]:
    """The graph behind the pass, and its record; results are compared bit for bit."""
    module = traced(function, *given, **options)
    expected = results(module, given)
    record = after(module, "outline", outline=True).records[-1]
    assert_bit_equal(results(module, given), expected)
    return module, record


def calls(module: fx.GraphModule) -> list[int]:
    """How often each function is called, the most frequent first."""
    return sorted(Counter(node.args[1] for node in module.graph.nodes if node.target is INVOKE).values(), reverse=True)


# -- which sections ----------------------------------------------------------------------------------------------------


def chain(*kinds: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        for kind, weight in zip(kinds, weights, strict=True):
            x = kind(x, weight)
        return x

    return forward


def test_equal_layers_are_calls_of_one_function() -> None:
    module, record = outlined(chain(*[layer] * 4), inputs(4))
    assert calls(module) == [4]
    assert len(record.matches) == 4
    assert not [node for node in module.graph.nodes if node.target is aten.mm.default]


def test_the_graph_does_not_grow_with_the_layers() -> None:
    sizes = [len(outlined(chain(*[layer] * count), inputs(count))[0].graph.nodes) for count in (4, 8)]
    assert sizes[1] - sizes[0] == 4 * 4  # a weight, the function, the call, its result


def layers(count: int) -> fx.GraphModule:
    return traced(chain(*[layer] * count), *inputs(count))


def test_unasked_layers_are_outlined_where_that_saves_much(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layers(4)
    nodes = sum(node.op == "call_function" for node in module.graph.nodes) // 4
    monkeypatch.setattr(sys.modules["qgalore_compile.passes.outline"], "MUCH", 3 * nodes + 1)
    after(module, "outline", outline=None)
    assert not calls(module)
    module = layers(5)
    after(module, "outline", outline=None)
    assert calls(module) == [5]


def test_unasked_nothing_is_outlined_on_a_gpu_nor_where_bits_are_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qgalore_compile.passes.outline"], "MUCH", 1)
    module = layers(4)
    for node in module.graph.find_nodes(op="placeholder"):
        meta = torch.empty(node.meta["val"].shape, device="meta")
        node.meta["val"] = FakeTensor(node.meta["val"].fake_mode, meta, torch.device("cuda"))
    after(module, "outline", outline=None)
    assert not calls(module)
    assert Options.parse({"exact": True}).passes().outline is False
    assert Options.parse({"exact": True, "outline": True}).passes().outline is True
    assert Options.parse({}).passes().outline is None


def test_layers_of_two_kinds_that_alternate() -> None:
    assert calls(outlined(chain(*[layer, other] * 3), inputs(6))[0]) == [3]


def test_a_kind_that_comes_back_behind_another() -> None:
    kinds = [layer, layer, other, other, other, layer]
    assert calls(outlined(chain(*kinds), inputs(6))[0]) == [3, 3]


def test_a_single_layer_of_a_kind_stays() -> None:
    module, _ = outlined(chain(other, layer, layer, layer), inputs(4))
    assert calls(module) == [3]
    assert len([node for node in module.graph.nodes if node.target is aten.sin.default]) == 3


def test_short_sections_stay() -> None:
    module, record = outlined(chain(*[lambda x, w: torch.tanh(x @ w)] * 5), inputs(5))
    assert SHORTEST > 2 * 5
    assert not calls(module)
    assert not record.matches


def with_constant(by: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: layer(layer(x, w) * by, w)


def test_sections_of_other_constants_are_of_another_kind() -> None:
    module, _ = outlined(chain(with_constant(0.5), with_constant(0.5), with_constant(0.25)), inputs(3))
    assert calls(module) == [2, 2]  # whole layers, and the halves of the third, which are equal to each other
    assert [node.args[1] for node in module.graph.find_nodes(op="call_function", target=aten.mul.Tensor)] == [0.25]


def test_sections_that_take_their_results_in_another_way_are_of_another_kind() -> None:
    def crossed(x: Tensor, w: Tensor) -> Tensor:
        y, z = torch.sin(x @ w), torch.sin(x @ w.t())
        return layer(y - z, w)

    def straight(x: Tensor, w: Tensor) -> Tensor:
        y, z = torch.sin(x @ w), torch.sin(x @ w.t())
        return layer(z - y, w)

    assert calls(outlined(chain(crossed, straight, crossed, straight), inputs(4))[0]) == [2, 2]


def test_what_all_layers_read_is_an_argument_though_the_first_one_computes_it() -> None:
    def shared(x: Tensor, m: Tensor, *weights: Tensor) -> Tensor:
        mask = None
        for weight in weights:
            x = layer(x, weight)
            mask = m @ m if mask is None else mask
            x = layer(x @ mask, weight)
        return x

    assert calls(outlined(shared, inputs(5))[0]) == [4]


def test_what_is_read_at_the_end_does_not_part_equal_layers() -> None:
    def late(x: Tensor, *weights: Tensor) -> Tensor:
        early = None
        for index, weight in enumerate(weights):
            if index == 2:
                early = weights[0] * 2
            x = layer(x, weight)
        return x @ early

    assert calls(outlined(late, inputs(4))[0]) == [4]


# -- what functions change ---------------------------------------------------------------------------------------------


def step(x: Tensor, *weights: Tensor) -> Tensor:
    """Forward, backward and an update right behind each layer's gradient."""
    seen = [x]
    for weight in weights:
        seen.append(torch.tanh(seen[-1] @ weight))
    loss = (seen[-1] * seen[-1]).sum()
    gradient = seen[-1] * 2
    new = []
    for weight, y, before in reversed(list(zip(weights, seen[1:], seen, strict=False))):
        gradient = gradient * (1 - y * y)
        direction = before.t() @ gradient
        gradient = gradient @ weight.t()
        scale = direction.abs().mean() + 1e-3
        new.append(
            (weight, weight - 0.01 * torch.sign(direction) * torch.sqrt(direction.abs() / scale) - 0.001 * weight)
        )
    for weight, value in new:
        aten.copy_.default(weight, value)
    return loss


def behind_its_value(module: fx.GraphModule) -> fx.GraphModule:
    """Anchors where ``order`` puts them."""
    for anchor in module.graph.find_nodes(op="call_function", target=ANCHOR):
        anchor.args[1].append(anchor)
    return module


def outlined_step(layers: int) -> fx.GraphModule:
    module, given = traced(step, *inputs(layers)), inputs(layers)
    expected = results(module, given)
    after(behind_its_value(module), "outline", outline=True)
    assert_bit_equal(results(module, given), expected)
    return module


def test_a_function_writes_what_its_layer_updates() -> None:
    module = outlined_step(5)
    bodies = [body for _, body in module.named_children()]
    changing = [body for body in bodies if body.meta["qgalore_changes"]]
    assert len(changing) == 1
    (body,) = changing
    (anchor,) = body.graph.find_nodes(op="call_function", target=ANCHOR)
    assert anchor.args[0].op == "placeholder"
    assert [*body.graph.find_nodes(op="placeholder")].index(anchor.args[0]) == body.meta["qgalore_changes"][0]
    (result,) = body.graph.find_nodes(op="output")
    assert anchor.args[1] not in result.all_input_nodes  # written, not returned


@pytest.mark.parametrize("layers", [4, 8])
def test_live_bytes_do_not_grow(layers: int) -> None:
    plain = behind_its_value(traced(step, *inputs(layers)))
    assert liveness(outlined_step(layers).graph).peak <= liveness(plain.graph).peak


def test_a_tensor_that_is_changed_and_read_under_a_second_name_is_left() -> None:
    def tied(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        total = x
        for one, two in ((w, v), (w, w)):
            y = layer(total, two)
            total = y.sin()
            aten.copy_.default(one, one + 1) if one is not two else aten.copy_.default(v, two + 1)
        return total

    module = behind_its_value(traced(tied, *inputs(2)))
    given = inputs(2)
    expected = results(module, given)
    after(module, "outline", outline=True)
    assert_bit_equal(results(module, given), expected)


library = torch.library.Library("outline_test", "FRAGMENT")
library.define("bump_(Tensor(a!) state, Tensor x) -> ()")


def bump_(state: Tensor, x: Tensor) -> None:
    state.add_(x)


library.impl("bump_", bump_, "CompositeExplicitAutograd")


def with_states(old: Callable[[Tensor], Tensor] | None = None) -> Callable[..., Tensor]:
    """Layers each of which changes a state of its own in place, and what is read of the states in the end: what they
    then hold and, of what ``old`` makes of them before, also what they held."""

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        states, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        changed = []
        held = [old(state) for state in states] if old else []
        for state, weight in zip(states, weights, strict=True):
            x = layer(x, weight)
            given = functional_arguments({"state": state}, {"x": x})
            changed.append(FUNCTIONALIZED(torch.ops.outline_test.bump_.default, **given)[1])
        total = x
        for each in held:
            total = total - each.sum()
        for state, new in zip(states, changed, strict=True):
            total = total + new
            aten.copy_.default(state, new)
        return total

    return forward


def states_and_weights(layers: int) -> list[Tensor]:
    x, *weights = inputs(layers)
    return [x, *(torch.randn(T, N) for _ in range(layers)), *weights]


def test_a_state_that_a_function_changes_is_read_behind_its_call() -> None:
    module, _ = outlined(with_states(), states_and_weights(4))
    assert calls(module) == [4]
    (body,) = [body for _, body in module.named_children()]
    assert len(body.meta["qgalore_changes"]) == 1
    assert not module.graph.find_nodes(op="call_function", target=FUNCTIONALIZED)
    assert not module.graph.find_nodes(op="call_function", target=ANCHOR)  # what they wrote, the functions have written


@pytest.mark.parametrize(
    "old",
    [
        pytest.param(lambda state: state, id="itself"),
        pytest.param(lambda state: state.t(), id="a-view"),
        pytest.param(lambda state: state.split(4)[1], id="a-part"),
    ],
)
def test_a_state_that_is_read_as_it_was_is_not_changed_by_a_function(old: Callable[[Tensor], Tensor]) -> None:
    module, record = outlined(with_states(old), states_and_weights(4))
    assert len(module.graph.find_nodes(op="call_function", target=FUNCTIONALIZED)) == 4
    assert any("is read as it was" in reason for _, reason in record.skipped)


# -- what else differs between layers ----------------------------------------------------------------------------------


def test_numbers_of_parameters_become_tensors() -> None:
    def drawn(x: Tensor, count: Tensor, *weights: Tensor) -> Tensor:
        for index, weight in enumerate(weights):
            x = layer(x + rng.random_bits((T, N), seed=3, step=count, param=2 * index + 1), weight)
        return x

    x, *weights = inputs(3)
    module, _ = outlined(drawn, [x, torch.tensor(7), *weights])
    assert calls(module) == [3]
    (body,) = (body for _, body in module.named_children())
    assert [node.target for node in body.graph.nodes if "random_bits" in str(node.target)] == [
        torch.ops.qgalore.random_bits.numbered
    ]


def test_numbers_of_a_stream_take_no_tensor_that_counts_up_to_it() -> None:
    """Half a thousand million elements, that would be."""

    def drawn(x: Tensor, count: Tensor, *weights: Tensor) -> Tensor:
        for index, weight in enumerate(weights):
            own = rng.random_bits((T, N), seed=3, step=count, param=index)
            x = layer(x + own + rng.random_bits((T, N), seed=3, step=count, param=index | rng.PROJECTOR_STREAM), weight)
        return x

    x, *weights = inputs(3)
    module, _ = outlined(drawn, [x, torch.tensor(7), *weights])
    assert calls(module) == [3]
    assert max(node.meta["val"].numel() for node in module.graph.nodes if "iota" in node.name) == 3


def test_a_size_that_is_computed_is_told() -> None:
    def sized(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = layer(x.reshape(N, x.shape[0]).t().reshape(x.shape[0], N), weight)
        return x

    _, record = outlined(sized, inputs(3), symbolic=[0])
    assert all("no tensor" in reason for _, reason in record.skipped) or record.matches


# -- any order of any kinds --------------------------------------------------------------------------------------------


def _with_result(x: Tensor, w: Tensor) -> Tensor:
    y, z = (layer(x, w) @ w).split(N // 2, -1)
    return torch.cat([z, y], -1)


def _in_half(x: Tensor, w: Tensor) -> Tensor:
    return layer(x.to(torch.bfloat16).float(), w).t().contiguous().t()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([layer, other, _with_result, _in_half]), min_size=2, max_size=7), st.booleans())
def test_results_stay_in_any_order_of_any_kinds(
    kinds: list[Callable[[Tensor, Tensor], Tensor]], returns_all: bool
) -> None:
    def forward(x: Tensor, *weights: Tensor) -> list[Tensor]:
        seen = [x]
        for kind, weight in zip(kinds, weights, strict=True):
            seen.append(kind(seen[-1], weight))
        total = sum((each.sum() for each in seen), torch.zeros(()))
        gradients = []
        for kind, weight, y in reversed(list(zip(kinds, weights, seen[1:], strict=True))):
            total = total + kind(y * 0.1, weight).sum()
            gradients.append(y.t() @ y)
        return [total, *(seen[1:] if returns_all else []), *gradients]

    outlined(forward, inputs(len(kinds)))
