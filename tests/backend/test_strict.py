"""`strict` and the report see everything that is not as asked: which place, why, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Interpreted, assert_unchanged, small, snapshot, step_of, toy, training_step
from support import data as rows
from support import tokens as batch
from torch import Tensor, nn

import qgalore_compile as qg
from qgalore_compile.backend import compilation, strict
from qgalore_compile.backend.compilation import Compilation
from qgalore_compile.backend.entry import OptionError, Options, UnfusedError
from qgalore_compile.passes.fuse import fuse

Step = Callable[..., Any]


def strictly(step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(step, backend=Interpreted(strict=True, **options))


def own(
    between: Callable[[Tensor], Tensor], kept: Callable[[Tensor], Tensor] = lambda momentum: momentum
) -> Callable[[], Tensor]:
    """An optimizer of one's own, with any arithmetic between the projections, of what is kept or not."""
    w, m = nn.Parameter(torch.randn(24, 16) * 0.1), torch.zeros(24, 4)
    basis, x = torch.linalg.qr(torch.randn(16, 4))[0].contiguous(), torch.randn(10, 16)

    def step() -> Tensor:
        loss = (x @ w.t()).square().mean()
        loss.backward()
        with torch.no_grad():
            m.copy_(kept(0.9 * m + 0.1 * (w.grad @ basis)))
            w.copy_(w - 0.01 * (between(m) @ basis.t()))
            w.grad = None
        return loss.detach()

    return step


class TwoOf(nn.Module):
    """Two layers of which the loss may use the first alone."""

    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.used, self.other, self.both = nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False), both

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.used(x)) if self.both else self.used(x)


def two(*, both: bool) -> tuple[TwoOf, qg.QGaLoreAdamW]:
    model = TwoOf(both=both)
    return model, qg.QGaLoreAdamW(
        qg.param_groups(model, rank=2, targets=["used", "other"], quant=False), moments="32bit"
    )


# -- updates ----------------------------------------------------------------------------------------------------------


def test_an_operation_that_no_kernel_knows_is_refused_by_strict_and_told_by_the_report() -> None:
    with pytest.raises(
        UnfusedError, match=r"(?s)w: no generated kernel takes its update: .*\(at atan: aten.atan.default\); w"
    ):
        strictly(own(torch.atan))()
    report = qg.explain(own(torch.atan))
    (layer,) = report.layers
    assert layer.not_fused.startswith("an operation that generated kernels do not know")
    assert "NOT FUSED: w 24×16: the update: an operation that generated kernels do not know" in str(report)


def test_one_that_the_state_is_made_by_is_refused_too() -> None:
    with pytest.raises(UnfusedError, match=r"(?s)w: no generated kernel takes its update: .*\(at atan: "):
        strictly(own(torch.tanh, torch.atan))()


def test_sums_over_columns_between_the_projections_are_inductors_and_told() -> None:
    def normed(m: Tensor) -> Tensor:
        return m / m.square().sum(0, keepdim=True)

    assert strictly(own(normed))().isfinite()
    (layer,) = qg.explain(own(normed)).layers
    assert layer.update_function.startswith("generated, 2 kernels, and between them Inductor's ")
    assert "sum" in layer.update_function


def test_a_layer_whose_operations_are_known_passes() -> None:
    assert strictly(own(torch.tanh))().isfinite()
    assert "NOT FUSED" not in str(qg.explain(own(torch.tanh)))


def test_a_large_update_at_full_rank_without_a_kernel_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuse.__globals__, "SMALL", 8)
    head, state = nn.Linear(8, 4, bias=False).double(), torch.zeros(4, 8, dtype=torch.float64)

    def step(x: Tensor) -> None:
        head(x.double()).square().mean().backward()
        with torch.no_grad():
            state.copy_(0.9 * state + head.weight.grad)
            head.weight.copy_(head.weight - 0.1 * state)
        head.weight.grad = None

    start = head.weight.detach().clone()
    with pytest.raises(UnfusedError, match=r"(?s)head\.weight: no generated kernel .* in its update at full rank"):
        strictly(step)(rows())
    assert torch.equal(head.weight, start)
    assert "NOT FUSED: head.weight 4×8: the update at full rank" in str(qg.explain(step, rows()))


def test_a_large_update_at_full_rank_with_a_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuse.__globals__, "SMALL", 8)
    report = qg.explain(training_step(*toy()), batch(), options={"strict": True})
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["model.head.weight"].update_function == "generated, 1 kernel"


def test_a_product_with_an_int8_weight_that_stays_decoded_is_refused_by_name() -> None:
    step, _ = product_with_factors()
    with pytest.raises(
        UnfusedError, match=r"(?s)model\.0\.weight: a product with this quantised weight .*a sum with factors"
    ):
        strictly(step)(rows())
    assert "NOT FUSED: model.0.weight: a product with it" in str(qg.explain(step, rows()))


# -- parameters that were to be projected -----------------------------------------------------------------------------


def test_a_projected_parameter_without_a_gradient_is_refused_and_nothing_changes() -> None:
    model, opt = two(both=False)
    before = snapshot(model, opt)
    with pytest.raises(
        UnfusedError, match=r"(?s)other\.weight: its gradient is None in this step.*group \(number 0\) asks for"
    ):
        strictly(step_of(model, opt))(rows())
    assert_unchanged(before, snapshot(model, opt))


def test_the_report_tells_of_a_projected_parameter_without_a_gradient() -> None:
    report = qg.explain(step_of(*two(both=False)), rows())
    used, other = report.layers
    assert (used.matched, other.matched, other.projected) == (True, False, True)
    assert "NOT MATCHED: other.weight 8×6: its gradient is None in this step" in str(report)
    assert "1 of 2 projected layers matched" in str(report).splitlines()[0]


def test_a_frozen_layer_of_a_group_is_as_asked_and_a_frozen_group_is_not() -> None:
    model, opt = two(both=True)
    model.used.weight.requires_grad_(False)
    assert strictly(step_of(model, opt))(rows()).isfinite()
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 3))
    opt = qg.QGaLoreAdamW(qg.param_groups(model, rank=2, targets=["0"], quant=False), moments="32bit")
    model[0].weight.requires_grad_(False)
    with pytest.raises(UnfusedError, match=r"(?s)0\.weight: frozen .*so is all of its group: unfreeze something of it"):
        strictly(step_of(model, opt))(rows())


def test_every_layer_is_as_asked_in_an_ordinary_step() -> None:
    assert strictly(step_of(*two(both=True)))(rows()).isfinite()


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"disable": "update"}, {"disable": ["order", "fuse"]}, {"exact": True}])
def test_options_that_forbid_what_strict_asks_for_are_refused_before_anything_is_compiled(options: Any) -> None:
    with pytest.raises(OptionError, match="choose one") as raised:
        Options.parse({"strict": True, **options})
    assert isinstance(raised.value, UnfusedError)
    Options.parse(options)


def test_a_graph_break_is_refused_with_its_place_before_anything_changes() -> None:
    model, opt = two(both=True)

    def step(x: Tensor) -> None:
        loss = model(x).square().mean()
        loss.backward()
        print("loss")
        opt.step()
        opt.zero_grad()

    before = snapshot(model, opt)
    with pytest.raises(
        UnfusedError, match=r"(?s)step: a graph break cuts the step .*test_strict\.py:\d+; move what breaks it"
    ):
        strictly(step)(rows())
    assert_unchanged(before, snapshot(model, opt))


def test_a_frame_that_follows_a_break_is_refused_though_it_ends_with_the_step() -> None:
    (problem,) = strict.problems(Compilation(recorded=True, function="resumed", resumes="step"))
    assert problem.startswith("step: this graph is only what follows a graph break")


def test_code_from_a_cache_without_a_record_is_refused() -> None:
    (problem,) = strict.problems(Compilation(from_cache=True))
    assert "holds no record of its passes" in problem
    assert "clear the cache" in problem


# -- symbolic sizes ---------------------------------------------------------------------------------------------------


def run(how: str, step: Step, width: int, *, strict: bool = True) -> Step:
    """Three calls with batches of three sizes, which become a symbol in one of three ways."""
    compiled = torch.compile(step, backend=Interpreted(strict=strict), dynamic=True if how == "dynamic=True" else None)
    for count in (10, 12, 14):
        x = torch.randn(count, width)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    return compiled


WAYS = ["dynamic=True", "mark_dynamic", "another batch"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("int8", [True, pytest.param(False, marks=pytest.mark.more)])
def test_a_step_of_any_batch_size_passes_with_every_layer_as_in_one_of_a_fixed_size(how: str, int8: bool) -> None:
    report = qg.report(run(how, step_of(*small(int8=int8)), 8))
    assert report.compilations[-1].symbolic
    fixed = qg.explain(step_of(*small(int8=int8)), rows(), options={"strict": True})
    for name in ("name", "matched", "reassociated", "kernels", "update_function"):
        assert [layer.get(name) for layer in report.layers] == [layer.get(name) for layer in fixed.layers]


def product_with_factors() -> tuple[Step, int]:
    model, opt = small(int8=True)

    def step(x: Tensor) -> None:
        torch.addmm(x[:, :6], x, model[0].weight.t(), beta=2).square().mean().backward()
        opt.step()
        opt.zero_grad()

    return step, 8


def reader_of_a_gradient() -> tuple[Step, int]:
    model, opt = small(int8=False)

    def step(x: Tensor) -> Tensor:
        model(x).square().mean().backward()
        largest = model[0].weight.grad.abs().max()
        opt.step()
        opt.zero_grad()
        return largest  # type: ignore[no-any-return]

    return step, 8


@pytest.mark.parametrize("how", WAYS[:2])
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (product_with_factors, "a product with this quantised weight"),
        (reader_of_a_gradient, "the gradient has another reader"),
        (lambda: (step_of(*two(both=False)), 8), "its gradient is None in this step"),
    ],
    ids=["product", "reader", "no gradient"],
)
def test_what_is_refused_of_a_fixed_batch_is_refused_of_any(how: str, make: Any, problem: str) -> None:
    with pytest.raises(UnfusedError, match=problem):
        run(how, *make())


def test_the_graph_of_another_batch_is_held_to_the_same_before_anything_changes() -> None:
    model, opt = two(both=True)

    def step(x: Tensor) -> None:
        model.both = x.shape[0] < 12
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    compiled = strictly(step)
    compiled(torch.randn(10, 8))
    before = snapshot(model, opt)
    with pytest.raises(UnfusedError, match=r"other\.weight: its gradient is None in this step"):
        compiled(torch.randn(12, 8))
    assert_unchanged(before, snapshot(model, opt))


def test_a_symbol_for_a_rank_is_refused_in_words_and_reported() -> None:
    """State that neither a module nor an optimizer holds looks like data."""

    def step(x: Tensor) -> Tensor:
        return inner()  # its tensors are variables of its own

    inner = own(torch.tanh)
    with pytest.raises(UnfusedError, match=r"for its rank s\d+ is a symbol: dynamic=True .*mark_dynamic"):
        run("dynamic=True", step, 8)
    torch._dynamo.reset()
    report = qg.report(run("dynamic=True", step, 8, strict=False))
    (layer,) = report.layers
    assert layer.matched
    assert f'"rank": "{layer.rank}"' in report.to_json()


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_layers_entries_are_attributes_and_keys() -> None:
    for layer in qg.explain(training_step(*toy()), batch()).layers:
        for name in ("name", "shape", "side", "rank", "matched", "reason", "reassociated", "kernels"):
            assert getattr(layer, name) == layer[name]
        assert all(isinstance(size, int) for size in layer.shape)
    with pytest.raises(AttributeError, match="this record has no 'width', but name, shape"):
        _ = layer.width


def test_a_function_is_known_from_its_rest_behind_several_breaks() -> None:
    name = "torch_dynamo_resume_in_torch_dynamo_resume_in_step_at_7_at_9"
    code = own.__code__.replace(co_name=name)
    assert compilation._resumed(code) == "step"
    assert compilation._resumed(own.__code__) is None
