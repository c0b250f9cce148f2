"""Functions of a graph: called with tensors they run, asked what their results look like they do not."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from qgalore_compile.passes.functions import add_function, call_function
from qgalore_compile.passes.nodes import ANCHOR, INVOKE, aten, make

FAKE = FakeTensorMode()


def called() -> tuple[fx.GraphModule, fx.Node, list[fx.Node]]:
    """A graph that calls a function of two matrices: returns their product, transposed, and doubles the second."""
    body, like = fx.Graph(), []
    given = [body.placeholder(name) for name in "xy"]
    with FAKE:
        for node in given:
            node.meta["val"] = torch.empty(3, 3)
        like.append(product := make(body, aten.t.default, make(body, aten.mm.default, *given)))
    make(body, ANCHOR, given[1], make(body, aten.mul.Tensor, given[1], 2))
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    inputs = [module.graph.placeholder(name) for name in "xy"]
    for node, inner in zip(inputs, given, strict=True):
        node.meta["val"] = inner.meta["val"]
    name = add_function(module.graph, body, [product], [1])
    call, results = call_function(module.graph, name, inputs, like)
    module.graph.output(tuple(results))
    module.recompile()
    return module, call, results


def test_a_call_runs_the_function_and_changes_what_it_changes() -> None:
    module, call, _ = called()
    assert call.target is INVOKE
    x, y = torch.randn(3, 3), torch.randn(3, 3)
    expected, doubled = (x @ y).t(), 2 * y
    (found,) = module(x, y)
    assert torch.equal(found, expected)
    assert torch.equal(y, doubled)


def test_what_results_look_like_is_known_without_running_it() -> None:
    module, _, results = called()
    function = module.get_submodule("qgalore_layer_0")
    ran: list[str] = []

    def remembered(name: str) -> Tensor:
        ran.append(name)
        raise AssertionError

    for node in function.graph.find_nodes(op="call_function", target=aten.mm.default):  # type: ignore[attr-defined]
        node.target = lambda *_: remembered("mm")
    function.recompile()  # type: ignore[operator]
    with FAKE:
        (found,) = INVOKE(function, "qgalore_layer_0", torch.empty(3, 3), torch.empty(3, 3))
    assert not ran
    like = results[0].meta["val"]
    assert (found.shape, found.stride(), found.dtype) == (like.shape, like.stride(), like.dtype)
    assert found.stride() == (1, 3)


def test_names_of_functions_are_counted() -> None:
    module, _, _ = called()
    body = fx.Graph()
    with FAKE:
        (given := body.placeholder("x")).meta["val"] = torch.empty(2)
        result = make(body, aten.neg.default, given)
    assert add_function(module.graph, body, [result], []) == "qgalore_layer_1"
