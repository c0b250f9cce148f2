"""What stands at the same place of equal layers, in graphs written by hand, and the stretches of a list that repeat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from qgalore_compile.passes.columns import Columns, Place, Uneven, Window, windows

COUNT = 7


def taken(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(node.args, found.append)
    return found


def spelled(node: fx.Node) -> object:
    return node.op, node.target if node.op == "call_function" else "", len(node.args)


def stack(graph: fx.Graph, change: Callable[[fx.Graph, int, fx.Node], fx.Node] | None = None) -> list[fx.Node]:
    """Layers h ← h + sin(h · w) over a common node; returns the weights.  ``change`` may replace a product."""
    weights = [graph.placeholder(f"w{layer}") for layer in range(COUNT)]
    start = graph.placeholder("x")
    common = graph.call_function(torch.cos, (start,))
    hidden = graph.call_function(torch.exp, (start,))
    for layer, weight in enumerate(weights):
        product = graph.call_function(torch.mul, (graph.call_function(torch.mul, (hidden, weight)), common))
        product = change(graph, layer, product) if change else product
        hidden = graph.call_function(torch.add, (hidden, graph.call_function(torch.sin, (product,))))
    graph.output(hidden)
    return weights


def columns_of(graph: fx.Graph, weights: list[fx.Node]) -> Columns:
    return Columns(graph, [dict(enumerate(weights))], COUNT, taken, spelled)


def test_everything_of_a_layer_is_in_a_column_and_common_nodes_are_in_none() -> None:
    graph = fx.Graph()
    columns = columns_of(graph, stack(graph))
    core = set(columns.core)
    assert [sorted(core & set(elements)) for elements in columns.of] == [sorted(core)] * 5
    apart = [node.name for node in graph.nodes if node not in columns.place]
    assert {"x", "cos", "output"} <= set(apart)


def test_the_residual_stream_reads_itself_one_layer_before() -> None:
    graph = fx.Graph()
    columns = columns_of(graph, stack(graph))
    adds = [node for node in graph.nodes if node.target is torch.add]
    column, coordinate = columns.place[adds[3]]
    assert columns.takes[column][0] == (column, -1)
    assert columns.place[adds[4]] == (column, coordinate + 1)


def test_a_node_that_reads_every_layer_gathers() -> None:
    graph = fx.Graph()
    weights = stack(graph)
    with graph.inserting_before(graph.output_node()):
        norms = graph.call_function(torch.stack, (weights,))
    assert set(columns_of(graph, weights).gathering) == {norms}


def _other(graph: fx.Graph, layer: int, product: fx.Node) -> fx.Node:
    return graph.call_function(torch.tanh, (product,)) if layer == 3 else product


def _tapped(graph: fx.Graph, layer: int, product: fx.Node) -> fx.Node:
    if layer == 3:
        graph.call_function(torch.neg, (product,))
    return product


def _of_another(graph: fx.Graph, layer: int, product: fx.Node) -> fx.Node:
    """Layer 3's weight for layer 4's."""
    if layer == 4:
        node, weights = taken(product)[0], graph.find_nodes(op="placeholder")
        node.args = (node.args[0], weights[3])
    return product


@pytest.mark.parametrize("change", [_other, _tapped, _of_another])
def test_layers_that_differ_in_the_core_are_refused(change: Callable[[fx.Graph, int, fx.Node], fx.Node]) -> None:
    graph = fx.Graph()
    weights = stack(graph, change)
    with pytest.raises(Uneven):
        columns_of(graph, weights)


@pytest.mark.parametrize("away", [2, 3])
def test_a_layer_may_read_another_one_no_farther_away_than_an_edge_is_wide(away: int) -> None:
    graph = fx.Graph()
    weights = [graph.placeholder(f"w{layer}") for layer in range(COUNT + 2 * away)]
    hidden = [graph.call_function(torch.exp, (weight,)) for weight in weights]
    for layer in range(away, len(hidden)):
        graph.call_function(torch.mul, (hidden[layer], hidden[layer - away]))
    weights = weights[away:-away]
    if away > 2:
        with pytest.raises(Uneven):
            columns_of(graph, weights)
    else:
        assert columns_of(graph, weights).of


def test_the_first_layer_may_differ() -> None:
    graph = fx.Graph()

    def negated(_: fx.Graph, layer: int, product: fx.Node) -> fx.Node:
        return graph.call_function(torch.neg, (product,)) if layer == 0 else product

    assert columns_of(graph, stack(graph, negated)).of


def places(text: str) -> list[Place | None]:
    """Of a list written as letters, column by letter, coordinate by occurrence; dots are in no column."""
    return [None if letter == "." else (ord(letter), text[:at].count(letter)) for at, letter in enumerate(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("..abcabcabcabc.", [Window(5, 3)]),
        ("xxxxx.abababab", [Window(1, 1), Window(8, 2)]),  # a list of one each, and a stretch of two
        ("aabbaabb", None),  # a layer has two of a kind, which are not told apart here
        ("abcab.abcabc", None),  # something stands between
    ],
)
def test_windows_of_a_list(text: str, expected: list[Window] | None) -> None:
    if expected is None:
        with pytest.raises(Uneven):
            windows(places(text), 1, 1)
    else:
        assert windows(places(text), 1, 1) == expected


def test_layers_may_run_downwards() -> None:
    down: list[Place | None] = [(column, layer) for layer in reversed(range(5)) for column in range(3)]
    (window,) = windows(down, 2, 1)
    assert (window.start, window.step, window.part) == (6, -3, range(6, 9))
