"""slice(mm(pad(a), pad(b))) -> mm(a, b), of the products that later passes look for, and of no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import after, assert_bit_equal, results, targets, traced
from passes_support import GRADIENTS, Layer, assert_near, galore
from quantised_products import GROUP, stored_int8
from torch import Tensor
from torch._inductor.fx_passes.pad_mm import pad_addmm, pad_mm

from qgalore_compile import formats
from qgalore_compile.passes import PassManager
from qgalore_compile.passes.nodes import is_gemm, shape

aten = torch.ops.aten
T, M, N = 7, 10, 13
Product = Callable[[Tensor, Tensor], Tensor]


def padded(a: Tensor, b: Tensor, multiple: int = 8) -> Tensor:
    """a b as Inductor writes it where every side is to be a multiple."""
    m, k, n = (-size % multiple for size in (*a.shape, b.shape[1]))
    return pad_mm(a, b, m, k, n)


def decoded(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return formats.dequantize_int8(codes, scale, offset, GROUP)


def after_unpad(function: Callable[..., object], *inputs: Tensor) -> tuple[torch.fx.GraphModule, PassManager]:
    """The graph of a function after the pass, with results as before it."""
    module = traced(function, *inputs)
    expected = results(module, inputs)
    manager = after(module, "unpad")
    for found, wanted in zip(results(module, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    return module, manager


@pytest.mark.parametrize("tokens", [T, 8])
def test_products_with_a_decoded_weight_lose_their_padding(tokens: int) -> None:
    def both(x: Tensor, dy: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
        return padded(x, decoded(*stored).t()), padded(dy, decoded(*stored))

    module, manager = after_unpad(both, torch.randn(tokens, N), torch.randn(tokens, M), *stored_int8(M, N))
    assert [shape(node) for node in module.graph.nodes if is_gemm(node)] == [(tokens, M), (tokens, N)]
    assert aten.constant_pad_nd.default not in targets(module.graph)
    assert len(manager.records[0].matches) == 2


@pytest.mark.parametrize("added", [(M,), (1, M), (T, M), (1,)], ids=str)
def test_an_addmm_loses_the_padding_of_what_it_adds_too(added: tuple[int, ...]) -> None:
    def linear(bias: Tensor, x: Tensor, *stored: Tensor) -> Tensor:
        weight = decoded(*stored).t()
        m, k, n = (-size % 8 for size in (*x.shape, M))
        product: Tensor = pad_addmm(bias, x, weight, m, k, n, beta=1.0, alpha=1.0)
        return product

    module, _ = after_unpad(linear, torch.randn(added), torch.randn(T, N), *stored_int8(M, N))
    (product,) = (node for node in module.graph.nodes if is_gemm(node))
    assert shape(product) == (T, M)
    assert shape(product.args[0]) == added


@pytest.mark.parametrize("projector", ["float", "int4"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("follow", [None, "rotate"])
def test_a_refreshed_layer_is_found_behind_padding(
    monkeypatch: pytest.MonkeyPatch, side: str, accumulate: int, projector: str, follow: str | None
) -> None:
    monkeypatch.setitem(GRADIENTS, "mm", lambda dy, x: padded(dy.t(), x))
    monkeypatch.setattr(Layer, "project", lambda layer, gradient, p: (
        padded(gradient, p.t()) if layer.right else padded(p.t(), gradient)
    ))  # fmt: skip
    layer = Layer(shape=(21, 13), side=side, refresh="svd", due=False, accumulate=accumulate, projector=projector,
                  follow=follow)  # fmt: skip
    built = galore(layer)
    expected = built.run()
    manager = built.after("unpad", "update", "refresh", "reassociate")
    assert_near(built.run(), expected, 1e-5)
    (found,) = manager.context.layers
    formed = [node for node in built.graph.nodes if is_gemm(node) and shape(node) == (21, 13)]
    assert formed == [found.up]  # no gradient
    assert not built.operator(aten.constant_pad_nd.default)


def kept(function: Callable[..., object], *inputs: Tensor) -> PassManager:
    """The manager of a pass that changes nothing."""
    module = traced(function, *inputs)
    before, expected = targets(module.graph), results(module, inputs)
    manager = after(module, "unpad")
    assert targets(module.graph) == before
    assert_bit_equal(results(module, inputs), expected)
    assert not manager.records[0].matches
    return manager


def test_a_product_of_the_rest_of_the_network_stays_padded() -> None:
    manager = kept(lambda a, b: padded(a, b), torch.randn(T, N), torch.randn(N, M))
    assert not manager.records[0].skipped


def test_padding_with_something_else_than_zeros_stays() -> None:
    def ones(x: Tensor, *stored: Tensor) -> Tensor:
        return aten.constant_pad_nd.default(x, [0, 3], 1.0) @ aten.constant_pad_nd.default(
            decoded(*stored).t(), [0, 0, 0, 3], 1.0
        )

    kept(ones, torch.randn(T, N), *stored_int8(M, N))


def test_padding_in_front_stays() -> None:
    def front(x: Tensor, *stored: Tensor) -> Tensor:
        weight = aten.constant_pad_nd.default(decoded(*stored).t(), [0, 0, 3, 0])
        return aten.constant_pad_nd.default(x, [3, 0]) @ weight

    kept(front, torch.randn(T, N), *stored_int8(M, N))


READS: dict[str, Callable[[Tensor], object]] = {
    "whole": lambda y: y,
    "from the second row": lambda y: y[1:],
    "other columns": lambda y: y[:, :9],
    "cut and whole": lambda y: (y[:T, :M], y.sum()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_padding_that_is_read_stays_and_the_record_says_so(read: Callable[[Tensor], object]) -> None:
    def product(x: Tensor, *stored: Tensor) -> object:
        weight = aten.constant_pad_nd.default(decoded(*stored).t(), [0, 6, 0, 3])
        return read(aten.constant_pad_nd.default(x, [0, 3, 0, 1]) @ weight)

    manager = kept(product, torch.randn(T, N), *stored_int8(M, N))
    assert [reason for _, reason in manager.records[0].skipped] == ["its padding is read"]


def test_a_batch_of_products_stays_and_the_record_says_so() -> None:
    def product(x: Tensor, *stored: Tensor) -> Tensor:
        weight = aten.constant_pad_nd.default(decoded(*stored).t(), [0, 0, 0, 3]).expand(2, N + 3, M)
        return torch.bmm(aten.constant_pad_nd.default(x, [0, 3]), weight)

    manager = kept(product, torch.randn(2, T, N), *stored_int8(M, N))
    assert [reason for _, reason in manager.records[0].skipped] == ["a batch of products"]
