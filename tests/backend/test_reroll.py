"""Which layers are taken out of Dynamo's graph, in graphs recorded from functions of one input and a weight a layer."""

from __future__ import annotations

import operator
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
    fewer, plan = reroll.reroll(recorded(plain), [])
    assert (plan.kept, plan.layers) == (KEPT, COUNT - KEPT)
    assert len(fewer.graph.find_nodes(op="placeholder")) == 1 + COUNT
    assert len(fewer.graph.find_nodes(op="call_function", target=torch.sin)) == KEPT


def shared(x: Any, weights: Sequence[Any]) -> Any:
    for _ in weights:
        x = layer(x, weights[0])
    return x


def counted(x: Any, weights: Sequence[Any]) -> Any:
    count = torch.mul(x, 0)
    for weight in weights:
        x, count = layer(x, weight), torch.add(count, 1)
    return x / count


def counted_by_looks(x: Any, weights: Sequence[Any]) -> Any:
    count = x.new_zeros(())
    for weight in weights:
        x = layer(x, weight)
        count = count + x.new_ones(())
    return x / count


def counted_and_used(x: Any, weights: Sequence[Any]) -> Any:
    """What Inductor makes of ``count > 0`` is the same in all layers, and tells nothing of how many there are."""
    count = x.new_zeros(())
    for weight in weights:
        count = count + 1
        x = torch.where(count > 0, layer(x, weight), x)
    return x / count


def hiddens(x: Any, weights: Sequence[Any]) -> list[Any]:
    found = []
    for weight in weights:
        x = layer(x, weight)
        found.append(torch.linalg.vector_norm(x))
    return found


def averaged(x: Any, weights: Sequence[Any]) -> Any:
    return torch.mean(torch.stack(hiddens(x, weights)))


def weighted(x: Any, weights: Sequence[Any]) -> Any:
    return torch.sum(torch.stack(hiddens(x, weights)) * torch.linspace(0, 1, COUNT))


def in_chunks(x: Any, weights: Sequence[Any]) -> Any:
    return torch.chunk(torch.stack(hiddens(x, weights)), 3)[0]


def one_twice(x: Any, weights: Sequence[Any]) -> Any:
    found = hiddens(x, weights)
    return torch.linalg.vector_norm(torch.stack([*found, found[5]]))


def permuted(x: Any, weights: Sequence[Any]) -> Any:
    found = hiddens(x, weights)
    found[4], found[5] = found[5], found[4]
    return torch.linalg.vector_norm(torch.stack(found))


@pytest.mark.parametrize(
    ("step", "requires_grad"),
    [
        (shared, True), (counted, True), (counted_by_looks, True), (counted_and_used, True), (averaged, False),
        (weighted, False), (in_chunks, False), (one_twice, False), (permuted, False),
    ],
)  # fmt: skip
def test_what_could_not_be_put_back_as_it_was_stays(step: Step, requires_grad: bool) -> None:
    with pytest.raises(Uneven):
        reroll.reroll(recorded(step, requires_grad), [])


def norm_of_norms(x: Any, weights: Sequence[Any]) -> Any:
    return torch.linalg.vector_norm(torch.stack(hiddens(x, weights)))


def test_a_list_that_becomes_its_norm_may_grow_unless_it_is_differentiated() -> None:
    assert reroll.reroll(recorded(norm_of_norms, requires_grad=False), [])[1].layers == COUNT - KEPT
    with pytest.raises(Uneven):
        reroll.reroll(recorded(norm_of_norms), [])


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
    manager, gm = PassManager(PASSES, rerolls=True), recorded(plain)
    reroll.compiled(gm, [], manager, [])
    assert len(seen[0].graph.nodes) < len(gm.graph.nodes)
    assert (seen[1], manager.rerolled) == (gm, None)
    assert "7 is not 12" in caplog.text


def test_an_error_in_the_graph_of_all_layers_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_fx(*_: Any) -> Callable[..., Any]:
        raise RuntimeError("no")

    monkeypatch.setattr(reroll, "compile_fx", compile_fx)
    with pytest.raises(RuntimeError, match="no"):
        reroll.compiled(recorded(plain), [], PassManager(PASSES, rerolls=True), [])


# -- what every layer writes ------------------------------------------------------------------------------------------


def _counted(x: Any, weights: Sequence[Any]) -> Any:
    """As a batch norm that layers share counts its batches."""
    seen = torch.zeros_like(x)
    for weight in weights:
        x = layer(x, weight)
        seen.add_(1)
    return x, seen


def _averaged(x: Any, weights: Sequence[Any]) -> Any:
    mean, var = (torch.full_like(x.narrow(0, 0, 2), value) for value in (0.0, 1.0))
    for weight in weights:
        x = layer(x, weight)
        torch.nn.functional.batch_norm(x.view(2, 2), mean, var, training=True)
    return x, mean, var


def _through_a_view(x: Any, weights: Sequence[Any]) -> Any:
    sums = torch.stack([x, x])
    view = sums[0]
    for weight in weights:
        x = layer(x, weight)
        view.add_(x)
    return x, sums


def _of_a_view_of_each(x: Any, weights: Sequence[Any]) -> Any:
    sums = torch.stack([x, x])
    for weight in weights:
        x = layer(x, weight)
        sums.select(0, 0).mul_(0.5)
    return x, sums


def _set(x: Any, weights: Sequence[Any]) -> Any:
    last = torch.zeros_like(x)
    for weight in weights:
        x = layer(x, weight)
        x.tracer.create_proxy("call_function", operator.setitem, (last, 0, x.sum()), {})
    return x, last


def _listed(x: Any, weights: Sequence[Any]) -> Any:
    both = [torch.zeros_like(x), torch.zeros_like(x)]
    for weight in weights:
        x = layer(x, weight)
        torch._foreach_add_(both, 1.0)
    return (x, *both)


def _drawn(x: Any, weights: Sequence[Any]) -> Any:
    noise = torch.zeros_like(x)
    for weight in weights:
        x = layer(x, weight)
        noise.uniform_()
    return x, noise


SHARED_WRITES = [_counted, _averaged, _through_a_view, _of_a_view_of_each, _set, _listed, _drawn]


@pytest.mark.parametrize("step", SHARED_WRITES, ids=lambda step: step.__name__.strip("_"))
def test_what_every_layer_writes_is_written_by_all(step: Step) -> None:
    with pytest.raises(Uneven, match=r"writes what every layer is given|reads nothing of their own"):
        reroll.reroll(recorded(step, requires_grad=False), [])


def test_layers_may_read_what_was_written_before_them() -> None:
    def step(x: Any, weights: Sequence[Any]) -> Any:
        mask = torch.add(x, 1).mul_(2)
        for weight in weights:
            x = layer(torch.mul(x, mask), weight)
        return x

    _, plan = reroll.reroll(recorded(step, requires_grad=False), [])
    assert plan.layers == COUNT - KEPT
