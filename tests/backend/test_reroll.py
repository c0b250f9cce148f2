"""Which layers are taken out of Dynamo's graph, in graphs recorded from functions of one input and a weight a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qgalore_compile.backend import reroll
from qgalore_compile.backend.reroll import KEPT
from qgalore_compile.passes import PASSES, PassManager
from qgalore_compile.passes.columns import Uneven

COUNT = KEPT + 5

Step = Callable[[Any, Sequence[Any]], Any]


class _Seen(fx.Interpreter):
    """Notes values as Dynamo does."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]


def recorded(step: Step, requires_grad: bool = True) -> fx.GraphModule:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = ["x", *(f"w{layer}" for layer in range(COUNT))]
    x, *weights = (fx.Proxy(graph.placeholder(name), tracer) for name in names)
    result = step(x, weights)
    graph.output(result.node if isinstance(result, fx.Proxy) else tuple(each.node for each in result))
    gm = fx.GraphModule({}, graph)
    _Seen(gm).run(torch.ones(4), *(torch.ones(4, requires_grad=requires_grad) for _ in range(COUNT)))
    return gm


def layer(hidden: Any, weight: Any) -> Any:
    return hidden + torch.sin(torch.mul(hidden, weight))


def plain(x: Any, weights: Sequence[Any]) -> Any:
    for weight in weights:
        x = layer(x, weight)
    return x


def test_layers_that_are_alike_go_and_their_inputs_stay() -> None:
    fewer, _, _ = reroll.reroll(recorded(plain), [])
    assert len(fewer.graph.find_nodes(op="placeholder")) == 1 + COUNT
    assert len(fewer.graph.find_nodes(op="call_function", target=torch.sin)) == KEPT


def hiddens(x: Any, weights: Sequence[Any]) -> list[Any]:
    found = []
    for weight in weights:
        x = layer(x, weight)
        found.append(torch.linalg.vector_norm(x))
    return found


def one_twice(x: Any, weights: Sequence[Any]) -> Any:
    found = hiddens(x, weights)
    return torch.linalg.vector_norm(torch.stack([*found, found[5]]))


def permuted(x: Any, weights: Sequence[Any]) -> Any:
    found = hiddens(x, weights)
    found[4], found[5] = found[5], found[4]
    return torch.linalg.vector_norm(torch.stack(found))


def gradient_of_one_twice(x: Any, weights: Sequence[Any]) -> Any:
    found = hiddens(x, weights)
    return torch.autograd.grad([*found, found[5]], list(weights))[0]


@pytest.mark.parametrize("step", [one_twice, permuted, gradient_of_one_twice])
def test_a_list_must_hold_every_layer_once_in_their_order(step: Step) -> None:
    with pytest.raises(Uneven):
        reroll.reroll(recorded(step), [])


def test_a_graph_of_one_layer_more_is_made_for_comparison() -> None:
    reduced = reroll.reroll(recorded(plain), [])
    counts = [len(gm.graph.find_nodes(op="call_function", target=torch.sin)) for gm in (reduced.fewer, reduced.more)]
    one, others = reduced.missing
    assert counts == [KEPT, KEPT + 1]
    assert (one.kept, one.layers) == (KEPT, 1)
    assert (others.kept, others.layers) == (KEPT + 1, COUNT - KEPT - 1)
    (first,), (all_,) = ([each for each in plan.inputs if len(each) > 1] for plan in (one, others))
    cut = one.cut[0]
    assert sorted(first) == list(range(KEPT + 1))
    assert [first[at] for at in sorted(first)] == [all_[at] for at in sorted(all_)
                                                  if not cut < at <= cut + others.layers]  # fmt: skip


@pytest.mark.parametrize("least", [COUNT, COUNT + 1])
def test_there_must_be_layers_enough(least: int) -> None:
    if least == COUNT:
        assert reroll.reroll(recorded(plain), [], least)
    else:
        with pytest.raises(Uneven, match=f"no {least} layers stand in a row"):
            reroll.reroll(recorded(plain), [], least)


@pytest.mark.parametrize(
    ("dropped", "goes"),
    [
        pytest.param(lambda x: torch.nn.functional.dropout(x, 0.1), False, id="ten-percent"),
        pytest.param(lambda x: torch.nn.functional.dropout(x, 0.1, True), False, id="training"),
        pytest.param(lambda x: torch.nn.functional.dropout(x, p=0.0), True, id="none"),
        pytest.param(lambda x: torch.nn.functional.dropout(x, 0.1, training=False), True, id="evaluating"),
        pytest.param(lambda x: attended(x, dropout_p=0.1), False, id="attention"),
        pytest.param(lambda x: attended(x, None, 0.1), False, id="attention-by-place"),
        pytest.param(lambda x: attended(x), True, id="attention-none"),
    ],
)
def test_what_drops_out_is_seen_before_anything_is_traced(dropped: Callable[[Any], Any], goes: bool) -> None:
    def step(x: Any, weights: Sequence[Any]) -> Any:
        for weight in weights:
            x = layer(dropped(x), weight)
        return x

    if goes:
        assert reroll.reroll(recorded(step), [])
    else:
        with pytest.raises(Uneven, match="draws"):
            reroll.reroll(recorded(step), [])


def attended(x: Any, *args: Any, **kwargs: Any) -> Any:
    q = x.view(2, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, *args, **kwargs).flatten()


def test_an_error_in_the_graph_of_fewer_layers_is_no_error_of_the_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[fx.GraphModule] = []

    def compile_fx(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        seen.append(gm)
        if len(seen) == 1:
            raise RuntimeError("7 is not 12")
        return gm.forward

    monkeypatch.setattr(reroll, "compile_fx", compile_fx)
    caplog.set_level("INFO")
    manager, gm = PassManager(PASSES, rerolls=COUNT), recorded(plain)
    reroll.compiled(gm, [], manager, [], known=True)
    assert len(seen[0].graph.nodes) < len(gm.graph.nodes)
    assert (seen[1], manager.rerolled) == (gm, None)
    assert "7 is not 12" in caplog.text


def test_layers_that_could_not_be_put_back_are_not_taken_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[fx.GraphModule] = []

    def compile_fx(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(reroll, "compile_fx", compile_fx)
    gm = recorded(plain)
    reroll.compiled(gm, [], PassManager(PASSES, rerolls=COUNT), [], known=False)
    assert seen == [gm]


def test_an_error_in_the_graph_of_all_layers_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_fx(*_: Any) -> Callable[..., Any]:
        raise RuntimeError("no")

    monkeypatch.setattr(reroll, "compile_fx", compile_fx)
    with pytest.raises(RuntimeError, match="no"):
        reroll.compiled(recorded(plain), [], PassManager(PASSES, rerolls=COUNT), [], known=True)
