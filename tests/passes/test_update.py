"""R = G Pᵀ → region → U = N P → region → copy_: found however it is spelled, or refused with the node in the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes_support import GRADIENTS, RULES, SHARED, Layer, Tensors, build, galore, own, write

from qgalore_compile.passes.nodes import is_anchor, previous_version
from qgalore_compile.passes.regions import LayerUpdate
from qgalore_compile.rng import random_bits

aten = torch.ops.aten

BATCHED_PRODUCTS = ("bmm", "bmm transposed", "einsum", "batch of one")
SHAPES = {"right": (20, 12), "left": (12, 20), "square": (12, 12)}


def names(nodes: Any) -> list[str]:
    return sorted(node.name for node in nodes)


def described(found: LayerUpdate) -> tuple[Any, ...]:
    return found.name, found.shape, found.side, found.rank


# -- found ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize(("projector", "weight"), [("float", "float"), ("int4", "int8")])
def test_every_rule_side_and_format_is_one_layer(rule: str, where: str, projector: str, weight: str) -> None:
    layer = Layer(shape=SHAPES[where], rule=rule, projector=projector, weight=weight)
    found = galore(layer).layer()
    stored = ["a_w"] if weight == "float" else ["a_w_codes", "a_w_scale", "a_w_offset"]
    assert described(found) == (stored[0], layer.shape, "left" if where == "left" else "right", 4)
    assert names(found.parameter) == sorted(stored)
    assert names(found.projector) == (["a_p"] if projector == "float" else ["a_p_codes", "a_p_offset", "a_p_scale"])
    moments = ["a_m", "a_v"] if rule.startswith("adam") else ["a_m"]
    assert names(anchor.args[0] for anchor in found.anchors) == sorted([*stored, *moments])
    assert names(found.states) == moments
    assert len(found.factors.terms) == 1
    assert found.factors.obstacle is None
    assert found.refresh is None
    assert found.low is found.down


@pytest.mark.parametrize(("where", "side"), [("right", "left"), ("left", "right"), ("square", "left")])
def test_the_side_is_read_off_the_products_and_not_off_the_shape(where: str, side: str) -> None:
    assert galore(Layer(shape=SHAPES[where], side=side)).layer().side == side


@pytest.mark.parametrize("where", SHAPES)
def test_a_down_projection_of_the_transposed_gradient_is_found(where: str) -> None:
    assert described(galore(Layer(shape=SHAPES[where], down="transposed")).layer())[1] == SHAPES[where]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("down", ["plain", "transposed"])
def test_factors_are_read_off_every_spelling_of_the_gradient(gradient: str, down: str) -> None:
    found = galore(Layer(gradient=gradient, down=down, dtype=torch.bfloat16)).layer()
    assert [term.batched for term in found.factors.terms] == [gradient in BATCHED_PRODUCTS]


@pytest.mark.parametrize("addition", ["add", "addmm"])
@pytest.mark.parametrize("accumulate", [2, 4, 11])
def test_accumulated_micro_batches_are_the_factors(accumulate: int, addition: str) -> None:
    found = galore(Layer(accumulate=accumulate, addition=addition, down="transposed")).layer()
    assert len(found.factors.terms) == accumulate
    assert found.factors.obstacle is None


@pytest.mark.parametrize("form", ["float", "int4"])
def test_the_refresh_op_stands_between_and_its_results_are_the_same_storages(form: str) -> None:
    built = galore(Layer(refresh="svd", projector=form))
    found = built.layer()
    assert found.refresh is not None
    assert previous_version(found.low) is found.down
    assert names(found.states) == ["a_m", "a_v"]
    assert names(found.projector) == (["a_p"] if form == "float" else ["a_p_codes", "a_p_offset", "a_p_scale"])
    assert not {"a_schedule", *names(found.projector)} & set(names(anchor.args[0] for anchor in found.anchors))


def test_a_refresh_of_a_bf16_projection_is_found_behind_its_cast() -> None:
    found = galore(Layer(refresh="svd", dtype=torch.bfloat16)).layer()
    assert found.refresh is not None
    assert found.low.meta["val"].dtype == torch.float32


@pytest.mark.parametrize("seed", range(5))
def test_names_and_the_order_of_inputs_do_not_matter(seed: int) -> None:
    layers = Layer("a", weight="int8"), Layer("b", (12, 20), rule="lion"), Layer("c", (8, 8), projector="int4")
    built = galore(*layers, shuffle=seed, named=False)
    found = built.updates()
    assert not found.unmatched
    assert sorted(described(layer)[1:] for layer in found.layers) == [
        ((8, 8), "right", 4), ((12, 20), "left", 4), ((20, 12), "right", 4)
    ]  # fmt: skip
    for layer in found.layers:
        owners = {built.name_of[node.name][0] for node in (*layer.parameter, *layer.projector, *layer.states)}
        assert len(owners) == 1


def test_twenty_layers_are_twenty_updates_in_the_order_of_their_write_backs() -> None:
    found = galore(*(Layer(f"l{index}", (6, 5), rank=2) for index in range(20))).updates()
    assert [layer.name for layer in found.layers] == [f"l{index}_w" for index in range(20)]
    assert not found.unmatched


@pytest.mark.parametrize("gradient", ["view", "mm", "einsum"])
def test_a_symbolic_token_count_changes_nothing(gradient: str) -> None:
    built = galore(Layer(gradient=gradient, accumulate=2, refresh="svd"), symbolic=["a_dy0", "a_x0", "a_dy1", "a_x1"])
    found = built.layer()
    assert described(found) == ("a_w", (20, 12), "right", 4)
    assert all(isinstance(term.contracted, torch.SymInt) for term in found.factors.terms)


def test_a_gradient_that_is_given_is_matched_and_is_the_obstacle() -> None:
    """``opt.step`` compiled alone."""
    layer = Layer()
    inputs = {**SHARED, **layer.inputs(), "a_g": torch.randn(layer.shape)}
    layer.after = lambda gradient, t: t["a_g"]

    def body(t: Tensors) -> None:
        write(t, {f"a_{name}": value for name, value in layer.step(own(layer, t)).items()})

    found = build(body, inputs).layer()
    assert found.factors.obstacle is not None
    assert found.factors.obstacle.name == "a_g"


def test_a_gradient_that_is_added_to_a_given_one_is_matched_and_the_given_one_is_the_obstacle() -> None:
    found = galore(Layer(after=lambda gradient, t: gradient + t["old"]), extra={"old": torch.randn(20, 12)}).layer()
    assert found.factors.obstacle is not None
    assert found.factors.obstacle.name == "old"


def test_a_momentum_that_inductor_adds_in_the_down_projection_is_found() -> None:
    """``add(mm, x)`` is ``addmm`` by the time passes run."""

    def body(t: Tensors) -> None:
        m = torch.addmm(0.9 * t["m"], t["dy"].t() @ t["x"], t["p"].t())
        write(t, {"m": m, "w": torch.addmm(t["w"], m, t["p"], alpha=-0.1)})

    inputs = {"dy": torch.randn(7, 20), "x": torch.randn(7, 12), "p": torch.randn(4, 12), "m": torch.randn(20, 4)}
    found = build(body, {**inputs, "w": torch.randn(20, 12)}).layer()
    assert described(found) == ("w", (20, 12), "right", 4)
    assert found.down.target is found.up.target is aten.addmm.default
    assert names(anchor.args[0] for anchor in found.anchors) == ["m", "w"]


def test_conv1d_and_experts_layouts_are_found() -> None:
    """GPT-2's Conv1D holds (in, out); an expert's tokens are gathered rows, symbolic in number."""

    def body(t: Tensors) -> None:
        gradient = t["x"].t() @ t["dy"]
        m = 0.9 * t["m"] + t["p"].t() @ gradient
        chosen = t["e_dy"][t["rows"]].t() @ t["e_x"][t["rows"]]
        n = 0.9 * t["e_m"] + chosen @ t["e_p"].t()
        write(t, {"m": m, "w": t["w"] - t["p"] @ m, "e_m": n, "e_w": t["e_w"] - n @ t["e_p"]})

    inputs = {"x": torch.randn(7, 12), "dy": torch.randn(7, 20), "p": torch.randn(12, 4), "m": torch.randn(4, 20),
              "w": torch.randn(12, 20), "e_x": torch.randn(9, 8), "e_dy": torch.randn(9, 16),
              "rows": torch.randint(0, 9, (5,)), "e_p": torch.randn(3, 8), "e_m": torch.randn(16, 3),
              "e_w": torch.randn(16, 8)}  # fmt: skip
    found = build(body, inputs, symbolic=["rows"]).updates()
    assert [described(layer) for layer in found.layers] == [("w", (12, 20), "left", 4), ("e_w", (16, 8), "right", 3)]
    assert not found.unmatched
    assert isinstance(found.layers[1].factors.terms[0].contracted, torch.SymInt)


# -- what belongs to it -----------------------------------------------------------------------------------------------


def test_the_region_is_closed_and_parts_at_the_up_projection() -> None:
    built = galore(Layer(weight="int8", projector="int4", refresh="svd"), Layer("b", (12, 20)))
    for layer in built.updates().layers:
        region = set(layer.region)
        assert layer.up in region
        assert layer.down not in region
        assert layer.region == [node for node in built.graph.nodes if node in region]
        assert all(user in region or is_anchor(user) for node in region for user in node.users)
        assert {*layer.between, layer.up, *layer.write_back} == region
        assert not set(layer.between) & set(layer.write_back)
        assert not any(source in layer.write_back for node in layer.between for source in node.all_input_nodes)
        assert all(node.meta["val"].shape != layer.shape for node in layer.between)


def test_settings_and_statistics_that_layers_share_stay_outside() -> None:
    layers = Layer(), Layer("b")

    def body(t: Tensors) -> None:
        rate = torch.neg(t["lr"])
        for layer in layers:
            new = layer.step({**own(layer, t), "lr": rate})
            write(t, {f"{layer.name}_{name}": value for name, value in new.items()})

    built = build(body, {**SHARED, **layers[0].inputs(), **layers[1].inputs()})
    regions = [set(layer.region) for layer in built.updates().layers]
    assert len(regions) == 2
    assert not regions[0] & regions[1]
    assert built.operator(aten.neg.default)[0] not in regions[0] | regions[1]


def test_a_step_count_of_the_layers_own_belongs_to_it() -> None:
    layer = Layer(rule="sgd")
    inputs = {**SHARED, **layer.inputs(), "a_t": torch.tensor(0.0)}

    def body(t: Tensors) -> None:
        count = t["a_t"] + 1
        low = layer.project(layer.full_gradient(own(layer, t)), t["a_p"])
        m = 0.9 * t["a_m"] + low / count
        write(t, {"a_m": m, "a_t": torch.where(m.sum() > 0, count, t["a_t"]), "a_w": t["a_w"] - m @ t["a_p"]})

    found = build(body, inputs).layer()
    assert names(anchor.args[0] for anchor in found.anchors) == ["a_m", "a_t", "a_w"]


def test_a_norm_of_all_projections_is_no_part_of_any() -> None:
    """Clipping by a global norm: a 0-d tensor is not walked through."""
    layers = [Layer("a"), Layer("b", (12, 20))]
    inputs = dict(SHARED)
    for layer in layers:
        inputs.update(layer.inputs())

    def body(t: Tensors) -> None:
        lows = [layer.project(layer.full_gradient(o := own(layer, t)), o["p"]) for layer in layers]
        norm = torch.stack([low.norm() for low in lows]).norm()
        clip, new = (1.0 / (norm + 1e-6)).clamp(max=1.0), {}
        for layer, low in zip(layers, lows, strict=True):
            update, states = RULES["adam"](low * clip, own(layer, t))
            full = update @ t[f"{layer.name}_p"] if layer.right else t[f"{layer.name}_p"] @ update
            new[f"{layer.name}_w"] = t[f"{layer.name}_w"] - t["lr"] * full
            new.update({f"{layer.name}_{name}": value for name, value in states.items()})
        write(t, new)

    found = build(body, inputs).updates()
    assert [layer.name for layer in found.layers] == ["a_w", "b_w"]
    assert not found.unmatched


def test_an_average_of_the_weight_is_written_with_it() -> None:
    layer = Layer()
    inputs = {**SHARED, **layer.inputs(), "average": torch.randn(20, 12)}

    def body(t: Tensors) -> None:
        new = {f"a_{name}": value for name, value in layer.step(own(layer, t)).items()}
        write(t, {**new, "average": 0.99 * t["average"] + 0.01 * new["a_w"]})

    found = build(body, inputs).layer()
    assert names(found.parameter) == ["a_w", "average"]


def test_random_bits_are_the_layers_own() -> None:
    layer = Layer()

    def body(t: Tensors) -> None:
        new = layer.step(own(layer, t))
        new["w"] = new["w"] + random_bits((20, 12), seed=0, step=t["step"], param=3) * 1e-9
        write(t, {f"a_{name}": value for name, value in new.items()})

    found = build(body, {**SHARED, **layer.inputs()}).layer()
    assert [node.target for node in found.region].count(torch.ops.qgalore.random_bits.default) == 1
