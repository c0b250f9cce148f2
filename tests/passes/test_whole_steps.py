"""Whole training steps through Inductor's own passes: which layers are found, and that the passes change nothing."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernels_support import evaluated_kernels
from support import Interpreted, Toy, assert_same_step, decoded, step_of, tokens, toy, training_step
from torch import Tensor, fx, nn
from torch._dynamo.utils import ReinplaceCounters

import qgalore_compile as qg
from qgalore_compile.kernels import ops
from qgalore_compile.passes.context import Context
from qgalore_compile.passes.manager import PassManager
from qgalore_compile.passes.nodes import is_gemm, shape
from qgalore_compile.training.llama import Llama, LlamaConfig

ROUNDING = ["refresh", "reassociate"]
REST = ["fuse", "fuse_products", "opaque", "order"]


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Context]]:
    """The context of every graph that the passes ran on."""
    seen: list[Context] = []
    run = PassManager.__call__

    def call(self: PassManager, graph: fx.Graph) -> None:
        run(self, graph)
        seen.append(self.context)

    monkeypatch.setattr(PassManager, "__call__", call)
    return seen


def interpreted(step: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Interpreted]:
    backend = Interpreted(**options)
    return torch.compile(step, backend=backend, fullgraph=True), backend


def full_rank(graph: fx.Graph) -> int:
    """Products shaped like a weight of the block."""
    return sum(1 for node in graph.nodes if is_gemm(node) and sorted(map(str, shape(node))) == ["12", "20"])


@pytest.mark.parametrize(
    ("accumulate", "settings"),
    [(1, {"max_grad_norm": 1.0}), (2, {"dtype": torch.bfloat16, "refresh": "randomized", "int8": False})],
    ids=["clipped", "bf16, accumulated"],
)
def test_both_linears_are_matched_and_only_their_updates_have_full_rank(
    accumulate: int, settings: dict[str, Any], contexts: list[Context]
) -> None:
    model, opt = toy(**settings)
    step, backend = interpreted(training_step(model, opt), disable=REST)
    step(*(tokens(seed=index) for index in range(accumulate)))
    (context,) = contexts
    assert context.updates is not None
    assert [layer.shape for layer in context.layers] == [(20, 12), (12, 20)]
    assert [layer.side for layer in context.layers] == ["right", "left"]
    assert [len(layer.factors.terms) for layer in context.layers] == [accumulate] * 2
    assert {other.shape for other in context.updates.unmatched} <= {(17, 12)}  # embedding and head
    assert [note.reassociated for note in context.notes.values()] == [True] * 2
    taken = "the factors of the gradient" if accumulate == 1 else f"{accumulate} gathered products"
    assert [note.refresh_takes for note in context.notes.values()] == [taken] * 2
    assert full_rank(backend.graphs[0].graph) == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_seven_steps_agree_with_those_of_the_graph_that_no_rounding_pass_has_seen(accumulate: int) -> None:
    model, opt = toy(int8=False, update_proj_gap=3, moments="32bit")
    step = training_step(model, opt)
    passed, _ = interpreted(step, disable=REST)
    plain, _ = interpreted(lambda *batches: step(*batches), disable=[*ROUNDING, *REST])
    for index in range(7):
        batches = [tokens(seed=10 * index + at) for at in range(accumulate)]
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
        before = decoded(model, opt)
        loss = passed(*batches)
        found, schedule = decoded(model, opt), opt.schedule()
        model.load_state_dict(weights)
        opt.load_state_dict(state)
        torch.testing.assert_close(plain(*batches), loss)
        assert_same_step(before, found, decoded(model, opt), tolerance=5e-3)
        assert repr(schedule) == repr(opt.schedule())
    assert [record.refreshes for record in opt.schedule()] == [3, 2]  # at 0, 3, 6; stand-in at 0, then at 1, 4


def test_the_optimizers_step_alone_is_found_and_its_gradients_are_the_obstacle(contexts: list[Context]) -> None:
    model, opt = toy()
    model(tokens()).backward()
    step, _ = interpreted(opt.step, disable=REST)
    step()
    (context,) = contexts
    assert [layer.shape for layer in context.layers] == [(20, 12), (12, 20)]
    for layer in context.layers:
        assert layer.factors.obstacle is not None
        assert layer.factors.obstacle.op == "placeholder"
    assert all("compile the backward" in (note.not_reassociated or "") for note in context.notes.values())


IN_PLACE = {ops.run_program, ops.run_gemm}


@pytest.mark.parametrize(
    ("accumulate", "settings"),
    [
        (1, {}),
        (2, {"max_grad_norm": 1.0, "refresh": "randomized"}),
        (1, {"nonfinite": "skip_parameter"}),
        (1, {"rounding": "nearest"}),
        (1, {"moments_on_refresh": "rotate", "refresh": "power"}),
        (1, {"moments_on_refresh": "reset", "moments": "32bit", "int8": False}),
    ],
    ids=["default", "clipped, accumulated", "skip_parameter", "nearest", "moments rotated", "moments reset"],
)
def test_states_and_weights_are_written_in_place_without_a_clone(accumulate: int, settings: dict[str, Any]) -> None:
    model, opt = toy(**settings)
    step, backend = interpreted(training_step(model, opt), strict=True)
    overload = "moments" if "moments_on_refresh" in settings else "default"
    refresh = getattr(torch.ops.qgalore.refresh_, overload)
    in_place = {*IN_PLACE, refresh}
    ReinplaceCounters.clear()
    with evaluated_kernels():
        step(*(tokens(seed=index) for index in range(accumulate)))
    assert ReinplaceCounters.get_total_missed() == 0
    graph = backend.graphs[0].graph
    calls = [node for node in graph.nodes if node.target in in_place]
    assert Counter(node.target for node in calls) == dict.fromkeys(in_place, 2)
    clones = graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert not any(source.op == "placeholder" for clone in clones for source in clone.all_input_nodes)
    for call in calls:
        assert not set(call.all_input_nodes) & set(clones)


def test_no_weight_is_copied_for_a_backward_that_reads_it() -> None:
    """An update that comes at once comes behind the input gradients, which the weight is read for."""
    model = Llama(LlamaConfig(16, 24, num_heads=2, num_layers=2, vocab_size=17))
    qg.quantize_(model, group_size=8)
    groups = qg.param_groups(model, rank=4, update_proj_gap=5, quant_group_size=8)
    step, _ = interpreted(step_of(model, qg.QGaLoreAdamW(groups, lr=0.1, nonfinite="skip_parameter")))
    ReinplaceCounters.clear()
    with evaluated_kernels():
        step(tokens())
    assert ReinplaceCounters.get_total_missed() == 0


class SomebodysGaLore(torch.optim.Optimizer):
    """SGD with momentum in a fixed random subspace, as anyone may write it."""

    def __init__(self, params: Any, rank: int = 4) -> None:
        super().__init__(params, {"rank": rank})
        for p in self.param_groups[0]["params"]:
            m, n = p.shape
            self.state[p]["basis"] = torch.randn(n, rank) if m >= n else torch.randn(rank, m)
            self.state[p]["momentum"] = torch.zeros((m, rank) if m >= n else (rank, n))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            basis, momentum = self.state[p]["basis"], self.state[p]["momentum"]
            right = p.shape[0] >= p.shape[1]
            momentum.mul_(0.9).add_(p.grad @ basis if right else basis @ p.grad)
            p.sub_(0.01 * (momentum @ basis.t() if right else basis.t() @ momentum))

    step.hooked = True  # type: ignore[attr-defined]


def test_somebody_elses_optimizer_is_found_though_inductor_adds_its_momentum_in_the_product(
    contexts: list[Context],
) -> None:
    torch.manual_seed(0)
    model = Toy()
    opt = SomebodysGaLore([linear.weight for linear in model.blocks if isinstance(linear, nn.Linear)])

    def step(batch: Tensor) -> Tensor:
        loss = model(batch)
        loss.backward()
        opt.step()
        for parameter in model.parameters():
            parameter.grad = None
        return loss.detach()

    twin, own = copy.deepcopy((model, opt.state_dict()))
    fast, backend = interpreted(step)
    for index in range(3):
        fast(tokens(seed=index))
    (context,) = contexts
    assert [layer.shape for layer in context.layers] == [(20, 12), (12, 20)]
    assert [note.reassociated for note in context.notes.values()] == [True] * 2
    assert full_rank(backend.graphs[0].graph) == 0  # the updates are functions of their own
    moved = [parameter.detach().clone() for parameter in model.parameters()]
    model.load_state_dict(twin.state_dict())
    opt.load_state_dict(own)
    for index in range(3):
        step(tokens(seed=index))
    for parameter, other in zip(model.parameters(), moved, strict=True):
        torch.testing.assert_close(parameter.detach(), other, rtol=1e-4, atol=1e-5)
