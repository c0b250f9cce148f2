"""What is no update as the passes look for it: refused, with the reason and the node in the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes_support import RULES, SHARED, Built, Layer, Tensors, build, galore, own, write
from torch import Tensor

from qgalore_compile.passes.nodes import ANCHOR
from qgalore_compile.passes.update import Reason, find_updates

aten = torch.ops.aten

SHAPES = {"right": (20, 12), "left": (12, 20)}


# -- refused: more of the gradient is needed than an element at a time -------------------------------------------------

Reading = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From N, R and G what is added to the update."""

NEEDED: dict[str, Reading] = {
    "a norm of the gradient": lambda n, r, g: g / g.norm(),
    "a norm of what is written": lambda n, r, g: (g * 0.1) * torch.where((g * 0.1).norm() > 1, 0.5, 1.0),
    "norms of its columns": lambda n, r, g: g / (g.square().sum(0, keepdim=True).sqrt() + 1),
    "its largest element": lambda n, r, g: g / g.abs().amax(),
}


def writing(layer: Layer, added: Reading, **how: Any) -> Built:
    """A layer whose update has something of its gradient added."""
    inputs = {**SHARED, **layer.inputs()}

    def body(t: Tensors) -> None:
        o = own(layer, t)
        gradient = layer.full_gradient(o)
        low = layer.project(gradient, o["p"])
        update, states = RULES[layer.rule](low, o)
        full = update @ o["p"] if layer.right else o["p"] @ update
        new = {"w": o["w"] - 0.1 * (full + added(update, low, gradient)), **states}
        write(t, {f"{layer.name}_{name}": value for name, value in new.items()})

    return build(body, inputs, **how)


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("name", NEEDED)
def test_what_follows_from_all_of_the_gradient_needs_it_and_is_named(name: str, where: str) -> None:
    refused = writing(Layer(shape=SHAPES[where]), NEEDED[name]).refused()
    assert (refused.name, refused.shape) == ("a_w", SHAPES[where])
    assert refused.reason is Reason.NEEDS_GRADIENT


@pytest.mark.parametrize("where", SHAPES)
def test_an_update_below_that_follows_from_the_gradient_itself_is_refused(where: str) -> None:
    layer = Layer(shape=SHAPES[where], rule="sgd")
    inputs = {**SHARED, **layer.inputs()}

    def body(t: Tensors) -> None:
        gradient = layer.full_gradient(own(layer, t))
        low = layer.project(gradient, t["a_p"])
        momentum = 0.9 * t["a_m"] + low * gradient.square().sum(1 if layer.right else 0, keepdim=True)
        full = momentum @ t["a_p"] if layer.right else t["a_p"] @ momentum
        write(t, {"a_m": momentum, "a_w": t["a_w"] - full})

    assert build(body, inputs).refused().reason is Reason.NEEDS_GRADIENT


@pytest.mark.parametrize("kind", ["another layer's", "of other factors"])
def test_a_gradient_that_is_not_the_projected_one_is_another_product(kind: str) -> None:
    """Factors of another layer, and a sum with one more product."""
    layer = Layer(rule="sgd")
    other = {"dy": torch.randn(9, 20), "x": torch.randn(9, 12)}
    inputs = {**SHARED, **layer.inputs(), **other}

    def body(t: Tensors) -> None:
        gradient = layer.full_gradient(own(layer, t))
        momentum = 0.9 * t["a_m"] + layer.project(gradient, t["a_p"])
        foreign = t["dy"].t() @ t["x"]
        read = foreign if kind == "another layer's" else gradient + foreign
        write(t, {"a_m": momentum, "a_w": t["a_w"] - momentum @ t["a_p"] - 0.1 * read})

    assert build(body, inputs).refused().reason is Reason.PRODUCT_INSIDE


def test_an_embeddings_gradient_that_is_only_projected_is_matched() -> None:
    def body(t: Tensors) -> None:
        gradient = torch.zeros(20, 12).index_put([t["at"]], t["dy"], accumulate=True)
        m = 0.9 * t["m"] + gradient @ t["p"].t()
        write(t, {"m": m, "w": t["w"] - m @ t["p"]})

    inputs = {"dy": torch.randn(7, 12), "at": torch.randint(0, 20, (7,)), "p": torch.randn(4, 12)}
    found = build(body, {**inputs, "m": torch.randn(20, 4), "w": torch.randn(20, 12)}).layer()
    assert found.factors.obstacle is not None
    assert "index_put" in found.factors.obstacle.name


# -- refused: an update at full rank ----------------------------------------------------------------------------------


def iterated(x: Tensor, steps: int = 3) -> Tensor:
    """Newton and Schulz's."""
    for _ in range(steps):
        square = x @ x.t()
        x = 1.5 * x - 0.5 * square @ x
    return x


MUONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "gradient first": lambda m, g: (g + 0.9 * m, iterated(g + 0.9 * m)),
    "momentum first": lambda m, g: (0.9 * m + g, iterated((0.9 * m + g) / 7)),
    "of the state as it was": lambda m, g: (0.9 * m + g, iterated(m, 1)),
    "without momentum": lambda m, g: (m, iterated(g)),
}


@pytest.mark.parametrize("shape", [(6, 9), (9, 9)])
@pytest.mark.parametrize("given", [False, True], ids=["whole step", "gradient given"])
@pytest.mark.parametrize("name", MUONS)
def test_muon_at_full_rank_is_no_projection(name: str, given: bool, shape: tuple[int, int]) -> None:
    m, n = shape
    inputs = {"m": torch.randn(shape), "w": torch.randn(shape)}
    inputs |= {"g": torch.randn(shape)} if given else {"dy": torch.randn(14, m), "x": torch.randn(14, n)}

    def body(t: Tensors) -> None:
        momentum, update = MUONS[name](t["m"], t["g"] if given else t["dy"].t() @ t["x"])
        write(t, {"m": momentum, "w": t["w"] - 0.1 * update})

    assert not build(body, inputs).updates().layers


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_an_update_at_full_rank_is_none_even_where_tokens_are_as_many_as_rows(optimizer: str) -> None:
    inputs = {"m": torch.randn(6, 9), "w": torch.randn(6, 9), "dy": torch.randn(6, 6), "x": torch.randn(6, 9)}

    def body(t: Tensors) -> None:
        g = t["dy"].t() @ t["x"]
        momentum = 0.9 * t["m"] + g
        update = {"sgd": g, "momentum": momentum, "adam": momentum / (g.square().sqrt() + 1)}[optimizer]
        write(t, {"m": momentum, "w": t["w"] - 0.1 * update})

    assert not build(body, inputs).updates().layers


# -- refused: the projector -------------------------------------------------------------------------------------------

Pieces = Callable[[Tensors], tuple[Tensor, Tensor]]


def between(layer: Layer, operands: Pieces, extra: Tensors | None = None) -> Built:
    """A layer with SGD between ``operands``: what G is multiplied with, and what N is multiplied with."""
    inputs = {**SHARED, **layer.inputs(), **(extra or {})}

    def body(t: Tensors) -> None:
        down, up = operands(t)
        m = 0.9 * t["a_m"] + layer.full_gradient(own(layer, t)) @ down
        write(t, {"a_m": m, "a_w": t["a_w"] - 0.1 * (m @ up)})

    return build(body, inputs)


def test_a_projector_from_another_layer_is_named() -> None:
    built = between(Layer(rule="sgd"), lambda t: (t["b"].t(), t["a_p"]), {"b": torch.randn(4, 12)})
    refused = built.refused()
    assert (refused.name, refused.reason) == ("a_w", Reason.OTHER_PROJECTOR)
    assert refused.node == built.operator(aten.mm.default)[1].name


DECODINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda p: p * 2,
    "another row order": lambda p: p.flip(0),
    "the absolute value": torch.abs,
    "rounded": lambda p: (p * 7).to(torch.int8).to(torch.float32),
}


@pytest.mark.parametrize("name", DECODINGS)
def test_two_decodings_of_one_storage_are_two_projectors(name: str) -> None:
    built = between(Layer(rule="sgd"), lambda t: (DECODINGS[name](t["a_p"]).t(), t["a_p"]))
    assert built.refused().reason is Reason.OTHER_PROJECTOR


@pytest.mark.parametrize("name", DECODINGS)
def test_one_decoding_computed_twice_is_one_projector(name: str) -> None:
    decode = DECODINGS[name]
    assert between(Layer(rule="sgd"), lambda t: (decode(t["a_p"]).t(), decode(t["a_p"]))).layer().rank == 4


def test_a_square_projector_that_stands_the_same_way_twice_is_refused() -> None:
    layer = Layer(shape=(12, 12), rank=12, rule="sgd")
    built = between(layer, lambda t: (t["a_p"], t["a_p"]))
    assert built.refused().reason is Reason.SAME_ORIENTATION
    assert between(layer, lambda t: (t["a_p"].t(), t["a_p"])).layer().rank == 12
    assert between(layer, lambda t: (t["a_p"], t["a_p"].t())).layer().rank == 12


@pytest.mark.parametrize("transposed", [*itertools.product([False, True], repeat=3)])
def test_a_square_sandwich_is_matched_in_its_four_spellings_and_refused_in_the_others(
    transposed: tuple[bool, bool, bool],
) -> None:
    """Which way P stands below and above, and on which side of G."""
    below, above, first = transposed
    inputs = {"dy": torch.randn(7, 6), "x": torch.randn(7, 6), "p": torch.randn(6, 6), "w": torch.randn(6, 6)}

    def body(t: Tensors) -> None:
        down, up = (t["p"].t() if flag else t["p"] for flag in (below, above))
        gradient = t["dy"].t() @ t["x"]
        low = torch.sign(down @ gradient if first else gradient @ down)
        write(t, {"w": t["w"] - (up @ low if first else low @ up)})

    built = build(body, inputs)
    if below != above:
        assert built.layer().side == ("left" if first else "right")
    else:
        assert built.refused().reason is Reason.SAME_ORIENTATION


def test_a_projector_that_the_step_computes_is_refused() -> None:
    def compute(t: Tensors) -> tuple[Tensor, Tensor]:
        gradient = t["a_dy0"].t() @ t["a_x0"]
        projector = torch.linalg.svd(gradient, full_matrices=False)[2][:4]
        return projector.t(), projector

    built = between(Layer(rule="sgd"), compute)
    assert built.refused().reason is Reason.COMPUTED_PROJECTOR


# -- refused: more than a sandwich ------------------------------------------------------------------------------------


def test_a_product_between_the_projections_with_something_else_is_refused_and_named() -> None:
    def body(t: Tensors) -> None:
        low = t["dy"].t() @ t["x"] @ t["p"].t()
        m = 0.9 * t["m"] + low @ (t["a"] @ t["b"])
        write(t, {"m": m, "w": t["w"] - m @ t["p"]})

    inputs = {"dy": torch.randn(7, 20), "x": torch.randn(7, 12), "p": torch.randn(4, 12), "m": torch.randn(20, 4)}
    inputs |= {"a": torch.randn(4, 9), "b": torch.randn(9, 4)}
    built = build(body, {**inputs, "w": torch.randn(20, 12)})
    assert built.refused().reason is Reason.PRODUCT_INSIDE


def test_a_product_behind_the_projections_is_refused() -> None:
    def body(t: Tensors) -> None:
        m = 0.9 * t["m"] + t["dy"].t() @ t["x"] @ t["p"].t()
        write(t, {"m": m, "w": t["w"] - (m @ t["p"] + t["a"] @ t["b"])})

    inputs = {"dy": torch.randn(7, 20), "x": torch.randn(7, 12), "p": torch.randn(4, 12), "m": torch.randn(20, 4)}
    built = build(body, {**inputs, "w": torch.randn(20, 12), "a": torch.randn(20, 3), "b": torch.randn(3, 12)})
    assert built.refused().reason is Reason.PRODUCT_INSIDE


def sharing(kind: str) -> Built:
    layers = [Layer("a", rule="sgd"), Layer("b", rule="sgd")]
    inputs = dict(SHARED)
    for layer in layers:
        inputs.update(layer.inputs())

    def body(t: Tensors) -> None:
        lows = [layer.project(layer.full_gradient(o := own(layer, t)), o["p"]) for layer in layers]
        moments = [0.9 * t["a_m"] + lows[0], 0.9 * t["b_m"] + lows[1]]
        new: Tensors = {}
        if kind == "written":
            shared = 0.9 * t["a_m"] + lows[0] + lows[1]
            moments, new = [shared, shared], {"a_m": shared}
        elif kind == "read":
            moments[1] = moments[1] + t["a_m"]
            new = {"a_m": moments[0], "b_m": moments[1]}
        elif kind == "one projection":
            moments[1] = 0.9 * t["b_m"] + torch.sign(lows[0])
            new = {"a_m": moments[0], "b_m": moments[1]}
        for layer, moment in zip(layers, moments, strict=True):
            p = t["a_p"] if kind == "one projection" else t[f"{layer.name}_p"]
            new[f"{layer.name}_w"] = t[f"{layer.name}_w"] - moment @ p
        write(t, new)

    return build(body, inputs)


@pytest.mark.parametrize("kind", ["written", "read", "one projection"])
def test_layers_that_share_a_state_or_a_projection_are_refused_both(kind: str) -> None:
    found = sharing(kind).updates()
    assert not found.layers
    assert {other.name for other in found.unmatched} >= {"a_w", "b_w"}
    reasons = {other.reason for other in found.unmatched if other.name in ("a_w", "b_w")}
    assert reasons <= {Reason.SHARED_STATE, Reason.PRODUCT_INSIDE}


def test_a_weight_that_is_written_twice_is_refused_at_its_anchor() -> None:
    layer = Layer()
    inputs = {**SHARED, **layer.inputs()}

    def body(t: Tensors) -> None:
        new = {f"a_{name}": value for name, value in layer.step(own(layer, t)).items()}
        write(t, new)
        write(t, {"a_w": new["a_w"] * 0.999})

    built = build(body, inputs)
    built.operator(ANCHOR)[-1].update_arg(0, built.node("a_w"))  # tracing chains the two
    refused = built.refused()
    assert (refused.name, refused.reason) == ("a_w", Reason.WRITTEN_TWICE)
    assert refused.node.startswith("copy_")


# -- refused: nothing like it -----------------------------------------------------------------------------------------


def plain_adam(t: Tensors, name: str, gradient: Tensor) -> Tensors:
    m = 0.9 * t[f"{name}_m"] + 0.1 * gradient
    v = 0.99 * t[f"{name}_v"] + 0.01 * gradient * gradient
    return {f"{name}_m": m, f"{name}_v": v, f"{name}_w": t[f"{name}_w"] - t["lr"] * m / (v.sqrt() + 1e-8)}


@pytest.mark.parametrize("seed", range(3))
def test_plain_adam_beside_a_layer_is_left_and_its_moments_are_no_parameters(seed: int) -> None:
    layer = Layer()
    inputs = {**SHARED, **layer.inputs()}
    for name, size in (("head", (30, 12)), ("embed", (30, 12)), ("norm", (12,))):
        inputs.update({f"{name}_{key}": torch.rand(size) for key in "wmv"})
    inputs["dy"], inputs["at"] = torch.randn(14, 30), torch.randint(0, 30, (14,))

    def body(t: Tensors) -> None:
        new = {f"a_{name}": value for name, value in layer.step(own(layer, t)).items()}
        new.update(plain_adam(t, "head", t["dy"].t() @ t["a_x0"]))
        scattered = torch.zeros(30, 12).index_put([t["at"]], t["a_x0"] * t["embed_w"].sum(), accumulate=True)
        new.update(plain_adam(t, "embed", scattered))
        new.update(plain_adam(t, "norm", t["a_x0"].sum(0)))
        write(t, new)

    built = build(body, inputs, shuffle=seed)
    for found in (built.updates(), find_updates(built.graph, built.name_of)):  # who is a parameter known, and not
        assert [layer.name for layer in found.layers] == ["a_w"]
        assert sorted((other.name, other.reason) for other in found.unmatched) == [
            ("embed_w", Reason.NOT_PROJECTED),
            ("head_w", Reason.NOT_PROJECTED),
        ]


def test_a_tied_weight_whose_gradient_is_a_product_and_a_scatter_is_matched_with_the_scatter_as_obstacle() -> None:
    def scatter(gradient: Tensor, t: Tensors) -> Tensor:
        return gradient + torch.zeros(20, 12).index_put([t["at"]], t["x0"], accumulate=True)

    found = galore(Layer(after=scatter), extra={"at": torch.randint(0, 20, (14,))}).layer()
    assert found.factors.obstacle is not None
    assert "index_put" in found.factors.obstacle.name


def test_plain_sgd_of_two_layers_with_one_input_is_no_sandwich() -> None:
    """dYᵀ X contracts X, and what dY follows from contracted X with a matrix of the weight's shape."""

    def body(t: Tensors) -> None:
        first, second = t["x"] @ t["v"].t(), t["x"] @ t["w"].t()
        dy = torch.sign(first * second)
        write(t, {"v": t["v"] - (dy * second).t() @ t["x"], "w": t["w"] - (dy * first).t() @ t["x"]})

    found = build(body, {"x": torch.randn(7, 12), "v": torch.randn(20, 12), "w": torch.randn(20, 12)}).updates()
    assert not found.layers
    assert {other.reason for other in found.unmatched} == {Reason.NOT_PROJECTED}


def test_a_low_rank_adapter_is_no_sandwich() -> None:
    """W + B A: the up-projection of one is the forward of the other."""

    def body(t: Tensors) -> None:
        hidden = t["x"] @ t["a"].t()
        dy = torch.sign(hidden @ t["b"].t())
        write(t, {"b": t["b"] - dy.t() @ hidden, "a": t["a"] - (dy @ t["b"]).t() @ t["x"]})

    found = build(body, {"x": torch.randn(7, 12), "a": torch.randn(4, 12), "b": torch.randn(20, 4)}).updates()
    assert not found.layers


def test_a_graph_without_anchors_has_no_updates() -> None:
    found = build(lambda t: t["x"] @ t["x"].t(), {"x": torch.randn(3, 4)}).updates()
    assert found.layers == found.unmatched == []


def test_the_record_counts_layers_and_tells_reasons() -> None:
    inputs = {f"head_{key}": torch.rand(30, 12) for key in "wmv"} | {"dy": torch.randn(14, 30)}
    layer = Layer()

    def body(t: Tensors) -> None:
        new = {f"a_{name}": value for name, value in layer.step(own(layer, t)).items()}
        new.update(plain_adam(t, "head", t["dy"].t() @ t["a_x0"]))
        write(t, new)

    built = build(body, {**SHARED, **layer.inputs(), **inputs})
    manager = built.after("update")
    (record,) = manager.records
    assert len(record.matches) == 1
    assert record.ops == {}
    ((name, reason),) = record.skipped
    assert name == "head_w"
    assert reason.startswith("updated at full rank")
