"""A float32 sum over the vocabulary, rounded -> a sum over the batch's tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from graphs import after, results, targets, traced
from support import Interpreted, assert_same_step, decoded, step_of
from torch import Tensor

import qgalore_compile as qg
from qgalore_compile.kernels.rows import sum_rows
from qgalore_compile.passes.liveness import liveness

aten = torch.ops.aten
V, D, BATCH = 50, 6, (4, 9)
PUT = aten._unsafe_masked_index_put_accumulate.default


def gradient(dy: Tensor, given: Tensor) -> Tensor:
    """As Inductor decomposes it; the last token is padding."""
    return aten.embedding_dense_backward(dy, given, V, V - 1, False)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    given = torch.randint(0, V, BATCH)
    given[0, :3], given[1, :2] = V - 1, 7
    return [torch.randn(*BATCH, D).to(dtype), given]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_token_gets_the_float32_sum_of_its_rows_rounded_once(dtype: torch.dtype) -> None:
    dy, given = inputs(dtype)
    module = traced(gradient, dy, given, symbolic=[0, 1])
    assert after(module, "embedding_gradient").records[-1].matches == ["_unsafe_masked_index_put_accumulate"]
    expected = torch.zeros(V, D)
    for row, token in zip(dy.view(-1, D), given.view(-1).tolist(), strict=True):
        if token != V - 1:
            expected[token] += row.float()
    (found, *_) = results(module, [dy, given])
    assert torch.equal(found, expected.to(dtype))
    assert PUT not in targets(module.graph)


def test_it_equals_eager_bit_for_bit_where_no_token_occurs_twice_and_is_nearer_to_the_sum_where_one_does() -> None:
    dy = torch.randn(32, D).bfloat16()
    for given, equal in ((torch.randperm(V - 1)[:32], True), (torch.zeros(32, dtype=torch.long), False)):
        module = traced(gradient, dy, given)
        after(module, "embedding_gradient")
        (found, *_) = results(module, [dy, given])
        eager = gradient(dy, given)
        exact = torch.zeros(V, D, dtype=torch.float64).index_add_(0, given, dy.double())
        assert torch.equal(found, eager) == equal
        assert (found - exact).norm() <= (eager - exact).norm()


def test_the_float32_buffer_is_gone() -> None:
    large = 4000
    module = traced(
        lambda dy, given: aten.embedding_dense_backward(dy, given, large, -1, False), *inputs(torch.bfloat16)
    )
    before = liveness(module.graph).peak
    after(module, "embedding_gradient", "dead_allocations")
    assert before > (4 + 2) * large * D
    assert 2 * large * D <= liveness(module.graph).peak < 3 * large * D


def test_a_float32_models_gradient_and_a_sum_with_another_reader_stay() -> None:
    def read_twice(dy: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        total = aten._unsafe_masked_index_put_accumulate(torch.zeros(V, D), given.unsqueeze(-1) >= 0, [given], dy)
        return total.bfloat16(), total.sum()

    def onto_ones(dy: Tensor, given: Tensor) -> Tensor:
        ones = torch.ones(V, D)
        return aten._unsafe_masked_index_put_accumulate(ones, given.unsqueeze(-1) >= 0, [given], dy).bfloat16()

    for function in (gradient, read_twice, onto_ones):
        module = traced(function, *inputs(torch.float32))
        assert after(module, "embedding_gradient").records[-1].matches == []
        assert PUT in targets(module.graph)


def test_negative_indices_count_from_the_end_and_nothing_is_a_sum_too() -> None:
    values, everything = torch.ones(2, 3), torch.ones(2, 1, dtype=torch.bool)
    found = sum_rows(values, everything, [torch.tensor([-1, 3])], 4, torch.float32)
    assert found.tolist() == [[0.0] * 3] * 3 + [[2.0] * 3]
    assert not sum_rows(values, ~everything, [torch.tensor([0, 1])], 4, torch.bfloat16).any()
    nothing = sum_rows(values[:0], everything[:0], [torch.zeros(0, dtype=torch.long)], 4, torch.bfloat16)
    assert torch.equal(nothing, torch.zeros(4, 3, dtype=torch.bfloat16))


def test_a_bfloat16_step_equals_the_eager_one() -> None:
    """Every token once: then eager rounds as the op does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, 3)).bfloat16()
    opt = qg.QGaLoreAdamW([{"params": list(model.parameters())}], lr=1e-2, moments="32bit")
    batch, step, backend = torch.randperm(V)[:20].view(4, 5), step_of(model, opt), Interpreted(disable=("row_blocks",))
    before, (weights, state) = decoded(model, opt), copy.deepcopy((model.state_dict(), opt.state_dict()))
    torch.compile(step, backend=backend, fullgraph=True)(batch)
    found = decoded(model, opt)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    step(batch)
    assert targets(backend.graphs[0].graph).count(sum_rows) == 1
    assert_same_step(before, found, decoded(model, opt), tolerance=0.05)
