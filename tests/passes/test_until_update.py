"""What a write-back reads of its gradient lives until then as factors, or as the gradient where that is smaller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernels_support import evaluated_kernels
from passes_support import RULES, SHARED, Built, Layer, Tensors, build, own, prefixed, write
from support import assert_within_contract

from qgalore_compile.passes.context import LayerNote
from qgalore_compile.passes.nodes import is_gemm, shape

PASSES = ("update", "late_gradient", "refresh", "reassociate", "fuse")


@pytest.fixture(autouse=True)
def evaluated() -> Iterator[None]:
    with evaluated_kernels():
        yield


def two(*, limit: bool, symbolic: tuple[str, ...] = (), **settings: Any) -> Built:
    """Two layers that write their gradients; with a limit, times a number that follows from both."""
    layers = [Layer(name=name, **settings) for name in "ab"]
    inputs = {**SHARED, **layers[0].inputs(), **layers[1].inputs()}

    def body(t: Tensors) -> None:
        gradients = [layer.full_gradient(own(layer, t)) for layer in layers]
        lows = [layer.project(each, t[f"{layer.name}_p"]) for layer, each in zip(layers, gradients, strict=True)]
        factor = 1 / (1 + lows[0].square().sum() + lows[1].square().sum()) if limit else 1.0
        for layer, gradient, low in zip(layers, gradients, lows, strict=True):
            n, found = RULES["adam"](low, own(layer, t))
            update = layer.back(n, t[f"{layer.name}_p"]) + 0.1 * gradient
            write(t, prefixed(layer, {"w": t[f"{layer.name}_w"] - factor * update, **found}))

    torch.manual_seed(0)
    return build(body, inputs, symbolic=symbolic)


def notes(**settings: Any) -> tuple[list[LayerNote], list[tuple[int, ...]]]:
    """What is told of both layers, and the shapes of whole gradients that are formed; the step is right."""
    plain, built = two(**settings), two(**settings)
    manager = built.after(*PASSES)
    assert_within_contract(built.run(), plain.run())
    found = [shape(node) for node in built.graph.nodes if is_gemm(node) and sorted(shape(node)) == [12, 20]]
    return list(manager.context.notes.values()), found


def test_of_one_micro_batch_whose_update_comes_at_once_factors_are_kept_whatever_their_size() -> None:
    found, whole = notes(limit=False, tokens=40)
    assert whole == []
    assert [note.keeps for note in found] == [
        "its factors (5.1 kB of 1 micro-batch) until its update, which comes at once, not the gradient (960 bytes)"
    ] * 2


@pytest.mark.parametrize(("tokens", "factors"), [(2, True), (40, False)])
def test_of_several_what_is_smaller(tokens: int, factors: bool) -> None:
    found, whole = notes(limit=False, tokens=tokens, accumulate=2)
    assert len(whole) == (0 if factors else 4)  # each micro-batch's own product, two layers
    assert [note.reassociated for note in found] == [factors] * 2
    if not factors:
        assert [note.not_reassociated for note in found] == [
            'reassociate="memory" keeps the gradient (960 bytes) until its update, which comes at once, not its '
            "factors (10.2 kB of 2 micro-batches)"
        ] * 2


@pytest.mark.parametrize(("tokens", "factors"), [(2, True), (40, False)])
def test_so_is_it_where_a_number_over_all_layers_comes_first_which_is_told(tokens: int, factors: bool) -> None:
    found, whole = notes(limit=True, tokens=tokens)
    assert len(whole) == (0 if factors else 2)
    for note in found:
        told = note.keeps if factors else note.not_reassociated
        assert told is not None
        assert "is known, which follows from other layers' gradients" in told
        assert told.endswith('with nonfinite="skip_parameter" and without max_grad_norm the update comes at once')


def test_of_a_symbolic_number_of_tokens_the_size_seen_in_tracing_counts() -> None:
    manager = two(limit=False, tokens=7, symbolic=("a_dy0", "a_x0", "b_dy0", "b_x0")).after(*PASSES)
    assert all(note.keeps and "(896 bytes of 1" in note.keeps for note in manager.context.notes.values())
