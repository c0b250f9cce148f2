"""forward · backward · all R · all updates  ->  forward · (backward · R · update) of each layer.

The graphs are chains of layers yₗ = tanh(yₗ₋₁ Wₗᵀ), with the loss ½ Σ y_L² and with weight gradients and updates sunk
behind the whole backward, in the optimizer's order: what Inductor's own ``reorder_for_locality`` leaves.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from graphs import after, assert_bit_equal, position, results, traced
from torch import Tensor, fx

from qgalore_compile import formats
from qgalore_compile.passes import PassManager, PassRecord
from qgalore_compile.passes.liveness import liveness, readers
from qgalore_compile.passes.nodes import ANCHOR, is_anchor, is_gemm, operands, shape
from qgalore_compile.passes.order import order

aten = torch.ops.aten

T, N, R = 8, 16, 4
FLOAT = 4
ACTIVATION, WEIGHT, LOW = T * N * FLOAT, N * N * FLOAT, N * R * FLOAT


class Chain:
    """A training step over `layers` layers.

    Args:
        layers: how many.
        micro_batches: inputs, over whose gradients the step accumulates.
        ok: what decides whether a layer is written, from all R and this layer's; None where all are.
        returns_norm: whether the step returns the norm of all R beside the loss.
    """

    def __init__(
        self,
        layers: int,
        *,
        micro_batches: int = 1,
        ok: Callable[[list[Tensor], Tensor], Tensor] | None = None,
        returns_norm: bool = False,
    ) -> None:
        self.layers, self.micro_batches, self.ok, self.returns_norm = layers, micro_batches, ok, returns_norm
        self.names = [f"x{index}" for index in range(1, micro_batches + 1)]
        self.names += [f"{kind}{index}" for index in range(1, layers + 1) for kind in "wpm"]
        self.inputs = [torch.randn(T, N) for _ in range(micro_batches)]
        self.inputs += [torch.randn(size) / 4 for _ in range(layers) for size in ((N, N), (R, N), (N, R))]
        self.module = traced(self.step, *self.inputs, names=self.names)

    def step(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        batches, stored = tensors[: self.micro_batches], tensors[self.micro_batches :]
        layers = [stored[index : index + 3] for index in range(0, len(stored), 3)]
        factors, losses = [], []
        for x in batches:
            made, loss = self.forward_and_backward(x, [w for w, _, _ in layers])
            factors.append(made)
            losses.append(loss)

        def low_of(index: int) -> Tensor:
            gradient = reduce(torch.add, [each[index][0].t() @ each[index][1] for each in factors])
            return gradient @ layers[index][1].t()

        at_first = range(self.layers) if self.ok or self.returns_norm else ()
        lows = [low_of(index) for index in at_first]
        for index, (w, p, m) in enumerate(layers):
            low = lows[index] if lows else low_of(index)
            momentum = 0.9 * m + 0.1 * low
            weight = w - 0.1 * (momentum @ p)
            if self.ok is not None:
                fine = self.ok(lows, low)
                momentum, weight = torch.where(fine, momentum, m), torch.where(fine, weight, w)
            aten.copy_.default(m, momentum)
            aten.copy_.default(w, weight)
        loss = reduce(torch.add, losses)
        return (loss, norm(lows)) if self.returns_norm else (loss,)

    def forward_and_backward(self, x: Tensor, weights: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """(dY, X) of each layer, and the loss."""
        ys = [x]
        for w in weights:
            ys.append(torch.tanh(ys[-1] @ w.t()))
        gradient, grads = ys[-1], []
        for index in reversed(range(len(weights))):
            gradient = gradient * (1 - ys[index + 1] * ys[index + 1])
            grads.append(gradient)
            gradient = gradient @ weights[index]
        return list(zip(reversed(grads), ys, strict=False)), ys[-1].square().sum() / 2

    def ordered(self) -> PassRecord:
        """The record of the pass, whose results are bit for bit those before it."""
        manager = after(self.module, "update", "reassociate")
        assert len(manager.context.layers) == self.layers
        return run(self.module, manager, self.inputs)


def run(module: fx.GraphModule, manager: PassManager, inputs: list[Tensor]) -> PassRecord:
    """The pass after those that `manager` ran."""
    expected = results(module, inputs)
    record = PassRecord("order", "exact")
    order(module.graph, record, manager.context)
    module.graph.lint()
    assert_bit_equal(results(module, inputs), expected)
    return record


def norm(lows: list[Tensor]) -> Tensor:
    return torch.stack([low.square().sum() for low in lows]).sum().sqrt()


def story(graph: fx.Graph) -> str:
    """The products and write-backs of a chain in their order.

    f1 forward of layer 1 · d1 its input gradient · xp1 X Pᵀ · r1 dYᵀ (X Pᵀ) · u1 N P · =w1 copy_ into its weight
    """
    words: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if is_anchor(node):
            words[node] = f"={node.args[0].name}"
        elif is_gemm(node):
            sources = [source.args[0] if source.target is aten.permute.default else source for source in operands(node)]
            stored = [source.name for source in sources if source.op == "placeholder" and source.name[0] in "wp"]
            if not stored:
                words[node] = "r" + next(words[source][2:] for source in sources if source in words)
            elif stored[0][0] == "w":
                words[node] = ("d" if operands(node)[1].op == "placeholder" else "f") + stored[0][1:]
            else:
                words[node] = ("xp" if shape(node) == (T, R) else "u") + stored[0][1:]
    return " ".join(words.values())


# -- where things stand -----------------------------------------------------------------------------------------------


def test_each_r_directly_follows_its_factors_and_each_update_follows_the_last_reader_of_its_weight() -> None:
    chain = Chain(4)
    record = chain.ordered()
    assert len(record.matches) == 4
    assert story(chain.module.graph) == (
        "f1 f2 f3 f4 "
        "xp4 r4 =m4 d4 u4 =w4 "
        "xp3 r3 =m3 d3 u3 =w3 "
        "xp2 r2 =m2 d2 xp1 r1 =m1 u2 =w2 u1 =w1"  # what runs behind the last dY goes by the number of products
    )


def test_before_the_pass_they_stood_at_the_end() -> None:
    chain = Chain(3)
    after(chain.module, "update", "reassociate")
    assert story(chain.module.graph) == ("f1 f2 f3 d3 d2 xp1 r1 u1 =m1 =w1 xp2 r2 u2 =m2 =w2 xp3 r3 u3 =m3 =w3")


def test_the_product_of_inputs_and_projector_is_not_hoisted_into_the_forward() -> None:
    chain = Chain(5)
    chain.ordered()
    words = story(chain.module.graph).split()
    assert all(words.index(f"xp{index}") > words.index("f5") for index in range(1, 6))


def test_the_spine_keeps_its_order() -> None:
    chain = Chain(4)
    spine = [node for node in chain.module.graph.nodes if node.target in (aten.tanh.default, aten.sub.Tensor)]
    chain.ordered()
    assert [position(chain.module.graph, node) for node in spine[:4]] == sorted(
        position(chain.module.graph, node) for node in spine[:4]
    )
    words = [word for word in story(chain.module.graph).split() if word[0] in "fd"]
    assert words == ["f1", "f2", "f3", "f4", "d4", "d3", "d2"]


def test_decoded_projectors_and_moments_stand_behind_the_gradient_that_they_wait_for() -> None:
    layers = 3
    kinds = ("w", "pc", "ps", "po", "mc", "ma")
    names = ["x", *(f"{kind}{index}" for index in range(layers) for kind in kinds)]
    inputs = [torch.randn(T, N)]
    for _ in range(layers):
        inputs += [torch.randn(N, N) / 4, *formats.quantize_int4(torch.randn(R, N), 8)[:3]]
        inputs += formats.quantize_dynamic8(torch.randn(N, R), signed=True)[:2]

    def step(x: Tensor, *stored: Tensor) -> Tensor:
        each = [stored[index : index + 6] for index in range(0, len(stored), 6)]
        projectors = [formats.dequantize_int4(*parts[1:4], N, 8) for parts in each]
        moments = [formats.dequantize_dynamic8(*parts[4:6], True) for parts in each]
        ys = [x]
        for parts in each:
            ys.append(torch.tanh(ys[-1] @ parts[0].t()))
        gradient, grads = ys[-1], []
        for parts, y in zip(reversed(each), reversed(ys[1:]), strict=True):
            gradient = gradient * (1 - y * y)
            grads.append(gradient)
            gradient = gradient @ parts[0]
        for parts, p, m, y, dy in zip(each, projectors, moments, ys, reversed(grads), strict=False):
            momentum = 0.9 * m + 0.1 * (dy.t() @ y @ p.t())
            codes, absmax, _ = formats.quantize_dynamic8(momentum, signed=True)
            aten.copy_.default(parts[0], parts[0] - 0.1 * (momentum @ p))
            aten.copy_.default(parts[4], codes)
            aten.copy_.default(parts[5], absmax)
        return ys[-1].square().sum()

    module = traced(step, *inputs, names=names)
    manager = after(module, "update", "reassociate")
    assert len(manager.context.layers) == layers
    run(module, manager, inputs)
    graph = module.graph
    lows = {layer.parameter[0].name: layer.down for layer in manager.context.layers}
    ends = [position(graph, lows[f"w{index}"]) for index in range(layers)]
    for index in range(layers):
        previous = ends[index + 1] if index + 1 < layers else position(graph, _last_tanh(graph))
        (projector, moment) = (
            next(node for node in graph.nodes if node.op == "placeholder" and node.name == f"{kind}{index}")
            for kind in ("pc", "mc")
        )
        assert all(previous < position(graph, user) for user in projector.users)
        assert all(previous < position(graph, user) for user in moment.users)


def _last_tanh(graph: fx.Graph) -> fx.Node:
    return list(graph.find_nodes(op="call_function", target=aten.tanh.default))[-1]


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3, 4, 8])
def test_the_peak_grows_by_the_activations_alone(layers: int) -> None:
    """Before, Y and dY of every layer are live when the last dY is made, and what that is made from.  After, Y of every
    layer (the forward makes them all), one gradient that goes down, and U (n, n) of the last layer and its momentum."""
    chain = Chain(layers)
    manager = after(chain.module, "update", "reassociate")
    run(chain.module, manager, chain.inputs)
    live = manager.context.program["live_bytes"]
    assert live["before"]["peak"] == (2 * layers + 1) * ACTIVATION
    if layers > 2:
        assert live["after"]["peak"] == WEIGHT + LOW + (layers + 1) * ACTIVATION
        assert live["after"]["peak"] == liveness(chain.module.graph).peak


def test_at_the_peak_one_layers_update_is_live() -> None:
    chain = Chain(4)
    manager = after(chain.module, "update", "reassociate")
    run(chain.module, manager, chain.inputs)
    live = manager.context.program["live_bytes"]["after"]
    assert [item["shape"] for item in live["holds"]] == [[N, N], *[[T, N]] * 5, [N, R]]
    assert live["holds"][0] == {"node": live["at"], "shape": [N, N], "dtype": "torch.float32", "bytes": WEIGHT}


def test_the_graph_stays_as_it_was_where_the_model_finds_a_larger_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the schedule one that makes every X Pᵀ in the forward."""

    def hoisting(nodes: list[fx.Node], layers: object) -> list[fx.Node]:
        weights = {node: shape(node) == (N, N) for node in nodes}
        late = [node for node in nodes if is_anchor(node)]
        rest = [node for node in nodes if not is_anchor(node)]
        return [*rest, *late] if any(weights.values()) else nodes

    monkeypatch.setattr(sys.modules[order.__module__], "_schedule", hoisting)
    chain = Chain(3)
    manager = after(chain.module, "update", "reassociate")
    before = list(chain.module.graph.nodes)
    record = run(chain.module, manager, chain.inputs)
    assert list(chain.module.graph.nodes) == before
    assert record.matches == []
    ((_, reason),) = record.skipped
    peaks = re.fullmatch(r"the peak would grow from ([\d,]+) to ([\d,]+) bytes", reason)
    assert peaks is not None
    assert int(peaks[1].replace(",", "")) == liveness(chain.module.graph).peak
    live = manager.context.program["live_bytes"]
    assert live["before"] == live["after"]


# -- what may not be moved --------------------------------------------------------------------------------------------


def assert_anchors_come_last(graph: fx.Graph) -> None:
    for anchor in graph.nodes:
        if is_anchor(anchor):
            others = readers(anchor.args[0]) - {anchor}
            assert all(position(graph, reader) < position(graph, anchor) for reader in others)


def test_every_other_reader_of_an_input_precedes_its_write_back() -> None:
    chain = Chain(4)
    chain.ordered()
    assert_anchors_come_last(chain.module.graph)


def test_readers_of_a_view_of_an_input_precede_its_write_back_too() -> None:
    """A weight that the forward reads transposed, and that no input gradient reads."""

    def step(x: Tensor, w: Tensor, p: Tensor, m: Tensor, late: Tensor) -> Tensor:
        turned = w.t()
        momentum = 0.9 * m + 0.1 * ((torch.tanh(x).t() @ x) @ p.t())
        weight = w - 0.1 * (momentum @ p)
        loss = (late @ turned).sum()
        aten.copy_.default(m, momentum)
        aten.copy_.default(w, weight)
        return loss

    inputs = [torch.randn(T, N), torch.randn(N, N), torch.randn(R, N), torch.randn(N, R), torch.randn(T, N)]
    module = traced(step, *inputs, names=["x", "w1", "p1", "m1", "late"])
    manager = after(module, "update", "reassociate")
    assert len(manager.context.layers) == 1
    run(module, manager, inputs)
    assert_anchors_come_last(module.graph)


def test_layers_that_read_each_others_weights_are_written_after_both_reads() -> None:
    """Two parameters outside of the projection that decay towards each other, besides a projected layer."""
    chain = Chain(2)

    def step(first: Tensor, second: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        loss = chain.step(*tensors)
        mean = (first + second) / 2
        aten.copy_.default(first, first - 0.1 * (first - second) * mean)
        aten.copy_.default(second, second - 0.1 * (second - first))
        return loss

    inputs = [torch.randn(N, N), torch.randn(N, N), *chain.inputs]
    module = traced(step, *inputs, names=["a", "b", *chain.names])
    run(module, after(module, "update", "reassociate"), inputs)
    assert_anchors_come_last(module.graph)


def test_a_weight_that_two_places_read_is_written_after_both() -> None:
    """Tied weights: the gradient is a sum over both places."""

    def step(x: Tensor, w: Tensor, p: Tensor, m: Tensor) -> Tensor:
        first = torch.tanh(x @ w.t())
        second = torch.tanh(first @ w.t())
        dy = second * (1 - second * second)
        dx = (dy @ w) * (1 - first * first)
        momentum = 0.9 * m + 0.1 * ((dy.t() @ first + dx.t() @ x) @ p.t())
        aten.copy_.default(m, momentum)
        aten.copy_.default(w, w - 0.1 * (momentum @ p))
        return second.sum()

    inputs = [torch.randn(T, N), torch.randn(N, N), torch.randn(R, N), torch.randn(N, R)]
    module = traced(step, *inputs, names=["x1", "w1", "p1", "m1"])
    manager = after(module, "update", "reassociate")
    assert len(manager.context.layers) == 1
    run(module, manager, inputs)
    assert_anchors_come_last(module.graph)
    assert story(module.graph).split()[-2:] == ["u1", "=w1"]


def test_an_input_that_is_written_twice_keeps_the_order_of_its_writes() -> None:
    chain = Chain(1)

    def step(twice: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        aten.copy_.default(twice, twice * 2)
        loss = chain.step(*tensors)
        aten.copy_.default(twice, tensors[0] + 1)
        return loss

    inputs = [torch.randn(T, N), *chain.inputs]
    module = traced(step, *inputs, names=["twice", *chain.names])
    twice, *_ = module.graph.find_nodes(op="placeholder")
    first, *_, second = module.graph.find_nodes(op="call_function", target=ANCHOR)
    second.args = (twice, second.args[1])  # tracing calls it the result of the first
    run(module, after(module, "update", "reassociate"), inputs)
    assert position(module.graph, first) < position(module.graph, second)


# -- barriers and accumulation ----------------------------------------------------------------------------------------


def finite(low: Tensor) -> Tensor:
    return torch.isfinite(low.square().sum())


def test_with_skip_step_the_small_r_wait_for_the_last_one_and_the_factors_do_not() -> None:
    chain = Chain(4, ok=lambda lows, _: torch.isfinite(norm(lows)))
    chain.ordered()
    assert story(chain.module.graph) == (
        "f1 f2 f3 f4 xp4 r4 d4 xp3 r3 d3 xp2 r2 d2 xp1 r1 =m1 =m2 u2 =w2 =m3 u3 =w3 =m4 u4 =w4 u1 =w1"
    )


def test_with_skip_parameter_each_update_follows_its_own_r() -> None:
    chain = Chain(4, ok=lambda _, low: finite(low))
    chain.ordered()
    assert story(chain.module.graph).startswith("f1 f2 f3 f4 xp4 r4 =m4 d4 u4 =w4 xp3 r3 =m3 d3 u3 =w3 xp2 r2 ")


def test_a_norm_of_all_gradients_that_the_step_returns_holds_nothing_back() -> None:
    chain = Chain(4, returns_norm=True)
    chain.ordered()
    assert story(chain.module.graph).startswith("f1 f2 f3 f4 xp4 r4 =m4 d4 u4 =w4 xp3 r3 =m3 d3 u3 =w3 xp2 r2 ")


def test_with_accumulation_factors_die_before_the_next_micro_batchs_backward() -> None:
    chain = Chain(3, micro_batches=2)
    chain.ordered()
    words = story(chain.module.graph)
    first, second = (words.split()[start:end] for start, end in ((0, words.split().index("d3") + 1), (0, None)))
    assert first == ["f1", "f2", "f3", "xp3", "r3", "d3"]
    assert " ".join(second) == (
        "f1 f2 f3 xp3 r3 d3 xp2 r2 d2 xp1 r1 f1 f2 f3 xp3 r3 =m3 d3 u3 =w3 xp2 r2 =m2 d2 xp1 r1 =m1 u2 =w2 u1 =w1"
    )


def test_without_a_matched_layer_nothing_moves() -> None:
    inputs = [torch.randn(T, N), torch.randn(N, N)]

    def step(x: Tensor, w: Tensor) -> None:
        aten.copy_.default(w, w - x.t() @ x)

    module = traced(step, *inputs)
    before = list(module.graph.nodes)
    manager = after(module, "update", "order")
    assert list(module.graph.nodes) == before
    assert manager.records[-1].matches == manager.records[-1].skipped == []
    assert "live_bytes" not in manager.context.program
