"""A gradient read as a sum of products: what is looked through, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import traced
from passes_support import BATCHED, GRADIENTS
from torch import Tensor, fx

from qgalore_compile.passes import products
from qgalore_compile.passes.nodes import shape

aten = torch.ops.aten

T, M, N = 7, 10, 6


def factors(spelling: str = "mm", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    leading = (3, T) if spelling in BATCHED else (T,)
    return torch.randn(*leading, M).to(dtype), torch.randn(*leading, N).to(dtype)


def parsed(function: Callable[..., Tensor], *inputs: Tensor, **how: Any) -> tuple[fx.GraphModule, products.Sum]:
    """The graph of a gradient, and what is read off its result."""
    module = traced(function, *inputs, **how)
    (output,) = module.graph.find_nodes(op="output")
    return module, products.parse(output.args[0])


def again(module: fx.GraphModule, found: products.Sum, *inputs: Tensor) -> Tensor:
    """Σ cᵢ · Lᵢ Rᵢ, from the matrices that the terms make."""
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        made = [(*term.matrices(graph), products.scale_of(graph, term.scales, torch.device("cpu")))
                for term in found.terms]  # fmt: skip
    output.args = (made,)
    graph.lint()
    module.recompile()
    total = torch.zeros(())
    for left, right, scale in module(*inputs):
        assert left.shape[1] == right.shape[0]
        total = total + (1.0 if scale is None else scale) * (left.float() @ right.float())
    return total


def assert_read(function: Callable[..., Tensor], *inputs: Tensor, terms: int, tolerance: float = 1e-5) -> products.Sum:
    """The whole gradient is read as this many terms, which add up to it."""
    module, found = parsed(function, *inputs)
    assert found.obstacle is None
    assert len(found.terms) == terms
    torch.testing.assert_close(
        again(module, found, *inputs), function(*inputs).float(), rtol=tolerance, atol=tolerance * 10
    )
    return found


def assert_refused(function: Callable[..., Tensor], *inputs: Tensor) -> fx.Node:
    """The gradient is not read; the node that is in the way."""
    _, found = parsed(function, *inputs)
    assert found.obstacle is not None
    return found.obstacle


# -- one product ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", GRADIENTS)
def test_every_spelling_of_the_product_is_one_term(spelling: str) -> None:
    assert_read(GRADIENTS[spelling], *factors(spelling), terms=1)


@pytest.mark.parametrize("spelling", GRADIENTS)
def test_the_transposed_gradient_of_every_spelling_is_one_term(spelling: str) -> None:
    assert_read(lambda dy, x: GRADIENTS[spelling](dy, x).t(), *factors(spelling), terms=1)


def test_the_factors_are_the_operands_of_the_product_themselves() -> None:
    module, found = parsed(lambda dy, x: dy.t() @ x, *factors())
    left, right = found.terms[0].matrices(module.graph)
    assert (left, right) == found.terms[0].gemm.args


def test_a_transposed_product_makes_no_second_transpose_of_a_transpose() -> None:
    module, found = parsed(lambda dy, x: (x.t() @ dy).t(), *factors())
    _, right = found.terms[0].matrices(module.graph)
    assert right.name == "x_1"


@pytest.mark.parametrize("spelling", ["mm", "bmm", "einsum"])
def test_the_contracted_length_counts_every_token(spelling: str) -> None:
    _, found = parsed(GRADIENTS[spelling], *factors(spelling))
    assert found.terms[0].contracted == (T if spelling == "mm" else 3 * T)


@pytest.mark.parametrize("spelling", [name for name in GRADIENTS if name not in ("bmm", "bmm transposed")])
def test_a_symbolic_token_count_is_read_like_a_known_one(spelling: str) -> None:
    inputs = factors(spelling)
    module, found = parsed(GRADIENTS[spelling], *inputs, symbolic=[0, 1])
    assert found.obstacle is None
    (term,) = found.terms
    assert isinstance(term.contracted, torch.SymInt)
    torch.testing.assert_close(again(module, found, *inputs), GRADIENTS[spelling](*inputs))


def test_a_symbolic_batch_of_a_batched_product_is_read_too() -> None:
    inputs = factors("bmm")
    module, found = parsed(GRADIENTS["bmm"], *inputs, symbolic=[0, 1])
    assert found.obstacle is None
    torch.testing.assert_close(again(module, found, *inputs), GRADIENTS["bmm"](*inputs))


# -- what is linear is looked through ---------------------------------------------------------------------------------

LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "times a number": lambda g, c: g * 0.25,
    "a number times it": lambda g, c: -3 * g,
    "over a number": lambda g, c: g / 3,
    "times a 0-d tensor": lambda g, c: g * c,
    "a 0-d tensor times it": lambda g, c: c * g,
    "over a 0-d tensor": lambda g, c: g / c,
    "negated": lambda g, c: -g,
    "scaled twice": lambda g, c: (g * c) / 8 * 0.5,
    "cast": lambda g, c: g.to(torch.float64).to(torch.float32),
    "cloned": lambda g, c: g.clone(),
    "contiguous": lambda g, c: g.t().contiguous().t(),
    "unsqueezed and squeezed": lambda g, c: g.unsqueeze(0).squeeze(0),
    "unsqueezed within": lambda g, c: g.unsqueeze(1).transpose(0, 2).squeeze(1).t(),
    "transposed twice": lambda g, c: g.transpose(-1, -2).t(),
    "permuted around a one": lambda g, c: g.unsqueeze(2).permute(1, 2, 0).reshape(N, M).t(),
    "viewed as itself": lambda g, c: g.reshape(1, M, N).reshape(M, 1, N).reshape(M, N),
    "copied into a buffer": lambda g, c: aten.copy.default(torch.zeros(M, N), g),
    "copied into a wider buffer": lambda g, c: aten.copy.default(torch.zeros(M, N, dtype=torch.float64), g),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("spelling", ["mm", "bmm", "transposed"])
def test_linear_operations_are_looked_through(name: str, spelling: str) -> None:
    def gradient(dy: Tensor, x: Tensor, c: Tensor) -> Tensor:
        return LINEAR[name](GRADIENTS[spelling](dy, x), c)

    assert_read(gradient, *factors(spelling), torch.tensor(1.7), terms=1)


def test_bf16_products_that_are_cast_up_keep_their_factors_in_bf16() -> None:
    inputs = factors(dtype=torch.bfloat16)
    module, found = parsed(lambda dy, x: (dy.t() @ x).to(torch.float32), *inputs)
    left, right = found.terms[0].matrices(module.graph)
    assert left.meta["val"].dtype == right.meta["val"].dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [1, 0.5, -2])
@pytest.mark.parametrize("beta", [1, 0.25])
def test_addmm_adds_with_its_alpha_and_beta(alpha: float, beta: float) -> None:
    def gradient(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.addmm(a.t() @ b, c.t(), d, alpha=alpha, beta=beta) * 3

    found = assert_read(gradient, *factors(), *factors(), terms=2)
    assert [term.scales for term in found.terms] == [
        tuple(scale for scale in (3, beta) if scale != 1),
        tuple(scale for scale in (3, alpha) if scale != 1),
    ]


@pytest.mark.parametrize("alpha", [1, 0.5])
def test_sums_and_differences_distribute(alpha: float) -> None:
    def gradient(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        plus = torch.add(a.t() @ b, c.t() @ d, alpha=alpha)
        return torch.sub(plus, (2 * d).t() @ c if M == N else (c * 2).t() @ d, alpha=3 * alpha)

    assert_read(gradient, *factors(), *factors(), terms=3)


def test_terms_of_unlike_spelling_and_orientation_add_up() -> None:
    def gradient(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
        return ((b.t() @ a) / 4 + GRADIENTS["bmm"](c, d).t()).t() + 0.5 * GRADIENTS["einsum"](e, f)

    assert_read(gradient, *factors(), *factors("bmm"), *factors("bmm"), terms=3)


def test_many_micro_batches_are_as_many_terms() -> None:
    inputs = [each for _ in range(12) for each in factors()]

    def gradient(*tensors: Tensor) -> Tensor:
        total = tensors[0].t() @ tensors[1]
        for dy, x in zip(tensors[2::2], tensors[3::2], strict=True):
            total = total + dy.t() @ x
        return total / 12

    assert_read(gradient, *inputs, terms=12)


def test_every_node_between_the_gradient_and_its_products_is_listed() -> None:
    module, found = parsed(lambda a, b, c, d: ((a.t() @ b) * 0.5 + c.t() @ d).t(), *factors(), *factors())
    forming = {node for node in module.graph.nodes if node.op == "call_function"} - {
        operand for term in found.terms for operand in (term.left, term.right)
    }
    assert set(found.nodes) == forming


# -- what is not ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "an elementwise function": ("tanh", lambda g, o: torch.tanh(g)),
    "a clamp": ("clamp", lambda g, o: g.clamp(max=1.0)),
    "a product with a matrix of its own shape": ("mul", lambda g, o: g * o),
    "a row of factors": ("mul", lambda g, o: g * o[0]),
    "a factor of shape (1, 1)": ("mul", lambda g, o: g * o[:1, :1]),
    "a number over it": ("reciprocal", lambda g, o: 1.0 / g),
    "a division with rounding": ("div", lambda g, o: torch.div(g, 2, rounding_mode="floor")),
    "a number added": ("add", lambda g, o: g + 1.0),
    "a matrix that is given": ("o", lambda g, o: g + o),
    "a row that is broadcast": ("add", lambda g, o: g + (o @ o.t())[:1, :N]),
    "a slice": ("slice", lambda g, o: torch.cat([g, g])[:M]),
    "a view that moves elements": ("view", lambda g, o: g.reshape(N, M).t()),
    "itself twice": ("mm", lambda g, o: g + g.t().t()),
    "a detour through integers": ("convert", lambda g, o: g.to(torch.int32).to(torch.float32)),
    "a buffer of integers": ("copy", lambda g, o: aten.copy.default(torch.zeros(M, N, dtype=torch.int64), g).float()),
    "a division by zero": ("div", lambda g, o: g / 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_linear_operation_is_named(name: str) -> None:
    expected, operation = REFUSED[name]
    assert expected in assert_refused(lambda dy, x, o: operation(dy.t() @ x, o), *factors(), torch.randn(M, N)).name


def test_a_product_of_integers_is_none_for_the_projector_would_be_rounded() -> None:
    inputs = [torch.randint(0, 9, (T, size)) for size in (M, N)]
    assert "mm" in assert_refused(lambda dy, x: (dy.t() @ x).to(torch.float32), *inputs).name


def test_an_embeddings_gradient_is_named() -> None:
    def gradient(dy: Tensor, at: Tensor) -> Tensor:
        return torch.zeros(M, N).index_put([at], dy, accumulate=True)

    assert "index_put" in assert_refused(gradient, torch.randn(T, N), torch.randint(0, M, (T,))).name


def test_a_gradient_that_is_given_is_its_own_obstacle() -> None:
    assert assert_refused(lambda g: g.t(), torch.randn(M, N)).op == "placeholder"


def test_a_batched_product_is_none_where_its_batch_is_not_summed() -> None:
    dy, x = factors("bmm")
    for gradient, obstacle in (
        (lambda dy, x: torch.bmm(dy.transpose(1, 2), x)[0], "select"),
        (lambda dy, x: torch.bmm(dy.transpose(1, 2), x).sum(1), "sum"),
        (lambda dy, x: torch.bmm(dy.transpose(1, 2), x).sum(0, keepdim=True).squeeze(0), "sum"),
        (lambda dy, x: torch.bmm(dy.transpose(1, 2), x).mean(0), "mean"),
    ):
        assert obstacle in assert_refused(gradient, dy, x).name


def test_a_sum_in_another_dtype_is_named() -> None:
    dy, x = factors("bmm")
    found = assert_refused(lambda dy, x: torch.bmm(dy.transpose(1, 2), x).sum(0, dtype=torch.float64), dy, x)
    assert found.name.startswith("sum")


def test_a_bias_under_an_addmm_is_no_term() -> None:
    _, found = parsed(lambda dy, x, b: torch.addmm(b, dy.t(), x), *factors(), torch.randn(N))
    assert found.obstacle is not None
    assert shape(found.obstacle) == (N,)


@pytest.mark.parametrize("size", [(M, 1), (1, N)])
def test_a_vector_is_no_matrix(size: tuple[int, int]) -> None:
    dy, x = torch.randn(T, size[0]), torch.randn(T, size[1])
    assert assert_refused(lambda dy, x: dy.t() @ x, dy, x) is not None
