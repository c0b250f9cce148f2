"""refresh_(R, P, schedule, [G])  ->  refresh_(R, P, schedule, [dY, X]), or what micro-batches gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes_support import BATCHED, GRADIENTS, Built, Layer, Tensors, assert_near, galore
from torch import Tensor, fx

from qgalore_compile.passes.nodes import FUNCTIONALIZED, shape
from qgalore_compile.passes.products import parse
from qgalore_compile.subspace.finder import full_gradient

GATHER = torch.ops.qgalore.gather_gradient.default
SHAPES = {"right": (20, 12), "left": (12, 20)}


def call(built: Built) -> fx.Node:
    """The refresh op of the graph."""
    (node,) = built.operator(FUNCTIONALIZED)
    return node


def handed(built: Built) -> list[fx.Node]:
    return list(call(built).kwargs["factors"])  # type: ignore[arg-type,call-overload]


def computed(built: Built, nodes: list[Any]) -> list[Tensor]:
    """The values of nodes, when the graph runs on its inputs."""
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(built.module).run(*(given.clone() for given in built.inputs))
    return [values[node].clone() for node in nodes]


def noted(built: Built, *passes: str, **options: Any) -> dict[str, Any]:
    manager = built.after("update", *passes, **options)
    (note,) = manager.context.notes.values()
    return note.told()


# -- one product: its factors -----------------------------------------------------------------------------------------

SCALED: dict[str, Callable[[Tensor, Tensors], Tensor]] = {
    "as it is": lambda g, t: g,
    "scaled": lambda g, t: -(g * 0.25) / t["scale"],
    "transposed and back": lambda g, t: g.t().contiguous().t(),
}


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("down", ["plain", "transposed"])
@pytest.mark.parametrize("name", SCALED)
def test_the_factors_that_are_handed_over_make_the_gradient_in_the_weights_orientation(
    where: str, down: str, name: str
) -> None:
    for spelling in GRADIENTS if name == "as it is" and down == "plain" else ("transposed", "bmm"):
        layer = Layer(shape=SHAPES[where], gradient=spelling, down=down, refresh="svd", after=SCALED[name])
        built = galore(layer, extra={"scale": torch.tensor(0.3)})
        (gradient,) = computed(built, handed(built))
        manager = built.after("update", "refresh", "reassociate")
        assert [len(record.matches) for record in manager.records] == [1, 1, 1]
        grad_output, inputs = handed(built)
        assert shape(grad_output) == (42 if spelling in BATCHED else 14, layer.shape[0])
        assert shape(inputs) == (42 if spelling in BATCHED else 14, layer.shape[1])
        scales = call(built).kwargs["scales"]
        factors = computed(built, [grad_output, inputs, *scales])  # type: ignore[misc]
        assert len(factors) == (3 if name == "scaled" else 2)
        product = full_gradient(factors[:2]) * (factors[2] if len(factors) == 3 else 1.0)
        torch.testing.assert_close(product, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("where", SHAPES)
def test_a_step_with_and_without_a_refresh_is_the_same_within_rounding(
    where: str, accumulate: int, method: str, due: bool
) -> None:
    layer = Layer(
        shape=SHAPES[where], rank=4, tokens=14, refresh=method, due=due, accumulate=accumulate, rule="sgd",
        after=lambda gradient, t: gradient * 0.5,
    )  # fmt: skip
    built = galore(layer)
    expected = built.run()
    built.after("update", "refresh", "reassociate")
    assert_near(built.run(), expected, 1e-4)
    changed = not torch.equal(expected["a_p"], built.inputs[built.names.index("a_p")])
    assert changed is due


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_int4_projector_is_refreshed_to_the_same_codes(where: str, accumulate: int) -> None:
    built = galore(Layer(shape=SHAPES[where], refresh="svd", projector="int4", accumulate=accumulate, rule="sgd"))
    expected = built.run()
    built.after("update", "refresh", "reassociate")
    found = built.run()
    assert torch.equal(found["a_p_codes"], expected["a_p_codes"])
    assert_near(found, expected, 1e-4)


@pytest.mark.parametrize("tokens", [3, 40])
def test_below_the_rank_the_subspace_follows_from_the_factors(tokens: int) -> None:
    """All of G is in the subspace, however the rest of it is completed."""
    built = galore(Layer(rank=6, tokens=tokens, refresh="svd", rule="sgd"))
    expected = built.run()
    built.after("update", "refresh", "reassociate")
    found = built.run()
    (p, w), (q, v) = ((values["a_p"], values["a_w"]) for values in (expected, found))
    known = min(tokens, 6)
    torch.testing.assert_close(p[:known].t() @ p[:known], q[:known].t() @ q[:known], rtol=0, atol=1e-4)
    if tokens >= 6:
        torch.testing.assert_close(v, w, rtol=0, atol=1e-4)


def test_bf16_factors_refresh_as_their_gradient_does() -> None:
    built = galore(Layer(refresh="svd", dtype=torch.bfloat16, rule="sgd", after=lambda g, t: g * 0.3))
    expected = built.run()
    built.after("update", "refresh", "reassociate")
    assert_near(built.run(), expected, 3e-2)


def test_a_scale_that_half_precision_would_lose_is_applied_in_float32() -> None:
    layer = Layer(refresh="svd", dtype=torch.float16, rule="sgd", after=lambda g, t: g * 2.0**-14)
    built = galore(layer)
    for place, name in enumerate(built.names):
        if name in ("a_dy0", "a_m"):
            built.inputs[place] = built.inputs[place] * 2.0**-10  # its elements times the scale are no halves
    built.after("update", "refresh", "reassociate")
    dy, x = (built.inputs[built.names.index(name)].float() for name in ("a_dy0", "a_x0"))
    rows = torch.linalg.svd(dy.t() @ x)[2][:4]
    p = built.run()["a_p"]
    torch.testing.assert_close(p.t() @ p, rows.t() @ rows, rtol=0, atol=5e-3)


# -- several products: gathered ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("addition", ["add", "addmm"])
def test_every_micro_batch_has_a_gather_op_of_its_own_factors(accumulate: int, addition: str) -> None:
    built = galore(Layer(refresh="svd", accumulate=accumulate, addition=addition))
    facts = noted(built, "refresh", "reassociate")
    gathers = built.operator(GATHER)
    assert len(gathers) == accumulate
    assert facts["refresh_takes"] == f"{accumulate} gathered products"
    assert handed(built) == [gathers[-1]]
    for index, node in enumerate(gathers):
        carried, schedule, grad_output, inputs, scale = node.args
        assert carried is (gathers[index - 1] if index else None)
        assert schedule is built.node("a_schedule")
        assert (grad_output, inputs) == (built.node(f"a_dy{index}"), built.node(f"a_x{index}"))
        assert scale is None
        assert node.kwargs == {}


def test_gathered_scales_are_those_of_their_products() -> None:
    def scaled(gradient: Tensor, t: Tensors) -> Tensor:
        return gradient * t["scale"] / 2

    built = galore(Layer(refresh="svd", accumulate=2, after=scaled), extra={"scale": torch.tensor(3.0)})
    built.after("update", "refresh", "reassociate")
    scales = computed(built, [node.args[4] for node in built.operator(GATHER)])
    assert [float(scale) for scale in scales] == [1.5, 1.5]


def test_a_symbolic_token_count_is_gathered_too() -> None:
    names = ["a_dy0", "a_x0", "a_dy1", "a_x1"]
    built = galore(Layer(refresh="svd", accumulate=2, rule="sgd"), symbolic=names)
    expected = built.run()
    facts = noted(built, "refresh", "reassociate")
    assert facts["refresh_takes"] == "2 gathered products"
    assert_near(built.run(), expected, 1e-4)


# -- left as it is ----------------------------------------------------------------------------------------------------


def kept(built: Built, **options: Any) -> dict[str, Any]:
    """The pass leaves the op's gradient; what is told about it."""
    before = handed(built)
    manager = built.after("update", "refresh", "reassociate", **options)
    ((name, reason),) = manager.records[1].skipped
    (note,) = manager.context.notes.values()
    assert handed(built) == before
    assert not built.operator(GATHER)
    assert note.refresh_takes == "the gradient, in every step"
    assert note.reassociated is False
    return {**note.told(), "reason": reason, "node": name}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_never_keeps_the_gradient_for_the_op_as_well(accumulate: int) -> None:
    facts = kept(galore(Layer(refresh="svd", accumulate=accumulate)), reassociate="never")
    assert facts["reason"] == 'reassociate="never" keeps the gradient'


def test_cost_keeps_it_where_the_factors_cost_more() -> None:
    layer = Layer(shape=(8, 6), rank=4, tokens=300, refresh="svd")
    assert kept(galore(layer), reassociate="cost")["reason"].startswith('reassociate="cost" keeps')


def test_a_second_reader_of_the_gradient_keeps_it_and_is_named() -> None:
    held: list[Tensor] = []

    def hold(gradient: Tensor, t: Tensors) -> Tensor:
        held.append(gradient)
        return gradient

    facts = kept(galore(Layer(refresh="svd", after=hold), also=lambda t: held.pop().sum()))
    assert facts["reason"].startswith("the gradient has another reader: sum")
    assert facts["not_reassociated"] == facts["reason"]


def test_a_gradient_that_is_no_product_stays() -> None:
    facts = kept(galore(Layer(refresh="svd", after=lambda g, t: torch.tanh(g))))
    assert "no sum of matrix products: tanh" in facts["reason"]


def test_without_the_pass_the_op_counts_as_a_reader() -> None:
    built = galore(Layer(refresh="svd"))
    facts = noted(built, "reassociate")
    assert "refresh_" in facts["not_reassociated"]
    assert len(handed(built)) == 1


def test_a_layer_without_a_refresh_op_is_none_of_its_business() -> None:
    manager = galore(Layer()).after("update", "refresh")
    assert manager.records[1].matches == manager.records[1].skipped == []


def test_an_op_that_is_given_another_gradient_than_is_projected_takes_that_ones_factors() -> None:
    built = galore(Layer(refresh="svd"), Layer("b"))
    other = built.operator(torch.ops.aten.mm.default)
    gradients = [node for node in other if shape(node) == (20, 12) and parse(node).obstacle is None]
    second = next(node for node in gradients if built.node("b_x0") in node.args)
    node = call(built)
    second_end = second
    first = handed(built)[0]
    first.append(second_end.args[0])  # type: ignore[arg-type]
    second_end.args[0].append(second_end)  # type: ignore[union-attr]
    node.kwargs = {**node.kwargs, "factors": [second_end]}
    built.graph.lint()
    expected = built.run()
    built.after("update", "refresh", "reassociate")
    assert_near(built.run(), expected, 1e-4)


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_what_a_refresh_costs_is_told(method: str) -> None:
    text = noted(galore(Layer(refresh=method, accumulate=2)), "refresh")["refresh_cost"]
    assert text.startswith(f"{method}: about ")
    assert "960*T" in text  # two products of 2 · 20 · 12 operations a token
    assert text.endswith("960 bytes for G in float32")
