"""What the passes did to a step, told layer by layer: `explain` before it runs, `report` of one that has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import Interpreted, snapshot, step_of, tokens, toy, training_step
from torch import Tensor

import qgalore_compile as qg
from qgalore_compile.backend import compilation
from qgalore_compile.backend.entry import UnfusedError
from qgalore_compile.passes import PASSES


def linear() -> tuple[torch.nn.Linear, qg.QGaLoreAdamW]:
    """One projected layer, unquantised: where nothing is said about the others."""
    model = torch.nn.Linear(12, 20, bias=False)
    groups = [{"params": [model.weight], "param_names": ["weight"], "rank": 4, "quant": False}]
    return model, qg.QGaLoreAdamW(groups, moments="32bit")


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, 12)


@pytest.fixture(scope="module")
def explained() -> qg.Report:
    model, opt = toy()
    return qg.explain(training_step(model, opt), tokens())


# -- what a report holds ----------------------------------------------------------------------------------------------


def test_every_projected_layer_has_its_shape_side_rank_and_what_became_of_its_gradient(explained: qg.Report) -> None:
    matched = [layer for layer in explained.layers if layer["matched"]]
    assert [(layer["name"], layer["shape"], layer["side"], layer["rank"]) for layer in matched] == [
        ("model.blocks.0.weight", [20, 12], "right", 4),
        ("model.blocks.1.weight", [12, 20], "left", 4),
    ]
    for layer in matched:
        assert layer["reassociated"]
        assert layer["inequality"] == "operations 9,216 < 19,200; bytes 6,272 < 7,040"
        assert layer["refresh_takes"] == "the factors of the gradient"
        assert layer["refresh_cost"].startswith("randomized: about 2816*T + 115200 operations through the factors")
        assert layer["update_function"] == "generated, 2 kernels"
        assert layer["ops"] > 50


def test_other_matrices_have_the_reason_and_states_are_not_listed(explained: qg.Report) -> None:
    others = {layer["name"]: layer for layer in explained.layers if not layer["matched"]}
    assert set(others) == {"model.embed.weight", "model.head.weight"}
    assert all(layer["reason"].startswith("updated at full rank") for layer in others.values())
    assert not any(layer["projected"] for layer in others.values())


def test_every_pass_is_listed_in_order_with_its_matches_operators_and_time(explained: qg.Report) -> None:
    assert [each["name"] for each in explained.passes] == [each.name for each in PASSES]
    by_name = {each["name"]: each for each in explained.passes}
    assert len(by_name["reassociate"]["matches"]) == 2
    assert by_name["dead_allocations"]["ops"]["aten.empty.memory_format"] < 0
    assert by_name["fuse"]["nodes_after"] < by_name["fuse"]["nodes_before"]
    assert all(each["milliseconds"] >= 0 for each in explained.passes)


def test_the_graph_of_one_layer_stands_there_before_and_after(explained: qg.Report) -> None:
    (compilation_,) = explained.compilations
    before, after = compilation_.graph["before"], compilation_.graph["after"]
    assert "f32[20, 12] = mm(" in before  # the gradient
    assert "refresh_(" in before
    assert not any(f"f32[{sides}] = mm(" in after for sides in ("20, 12", "12, 20"))
    assert "= decode(" in before  # unpacking is one line
    assert before.count("= copy_(") == after.count("= copy_(") > 3  # what is written, codes too
    assert "run_program(" in after
    assert "run_gemm(" in after
    assert "= random_bits %" in after  # the programs of the kernels, below


def test_live_bytes_before_and_after_ordering_say_what_is_largest(explained: qg.Report) -> None:
    live = explained.compilations[0].program["live_bytes"]
    assert 0 < live["after"]["peak"] <= live["before"]["peak"]
    largest = live["after"]["holds"][0]
    assert set(largest) == {"node", "shape", "dtype", "bytes"}


def test_the_text_says_all_of_it_in_lines_that_fit(explained: qg.Report) -> None:
    text = str(explained)
    first = text.splitlines()[0]
    assert first == "step: 1 graph, 0 recompile(s); 2 of 2 projected layers matched, 2 without a full-rank gradient"
    for expected in (
        "model.blocks.0.weight",
        "20×12",
        "9,216",
        "not projected: model.embed.weight",
        "reassociate",
        "Live bytes after ordering",
        "before the passes",
        "after them",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 140
    assert "\x1b" not in text


def test_json_holds_the_same(explained: qg.Report) -> None:
    loaded = json.loads(explained.to_json())
    assert loaded["graph_breaks"] == []
    assert loaded["recompiles"] == 0
    (only,) = loaded["compilations"]
    assert [layer["name"] for layer in only["layers"]] == [layer["name"] for layer in explained.layers]


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explain_runs_nothing_and_changes_nothing() -> None:
    model, opt = toy()
    calls: list[int] = []
    step = training_step(model, opt)
    before = snapshot(model, opt)
    generator = torch.get_rng_state()

    def counting(batch: Tensor) -> Tensor:
        calls.append(1)
        return step(batch)

    qg.explain(counting, tokens())
    after = snapshot(model, opt)
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert calls == []


def test_explain_leaves_the_steps_own_compiled_code_alone() -> None:
    backend = Interpreted()
    step = torch.compile(step_of(*linear()), backend=backend, fullgraph=True)
    step(rows())
    qg.explain(step, rows())
    step(rows())
    assert backend.count == 1
    assert len(qg.report(step).compilations) == 1


def test_explain_takes_the_backends_options() -> None:
    report = qg.explain(step_of(*linear()), rows(), options={"reassociate": "never"})
    (layer,) = report.layers
    assert layer["matched"]
    assert not layer["reassociated"]
    assert layer["not_reassociated"] == 'reassociate="never" keeps the gradient'
    assert "the gradient, in every step" in layer["refresh_takes"]
    assert 'reassociate="never" keeps the gradient' in str(report)


def test_a_reader_of_the_gradient_is_named() -> None:
    model, opt = toy()

    def step(batch: Tensor) -> tuple[Tensor, Tensor]:
        loss = model(batch)
        loss.backward()
        gradient = model.blocks[0].weight.grad
        assert gradient is not None
        norm = gradient.abs().max()
        opt.step()
        opt.zero_grad()
        return loss.detach(), norm

    report = qg.explain(step, tokens())
    first, second = (layer for layer in report.layers if layer["matched"])
    assert not first["reassociated"]
    assert first["not_reassociated"].startswith("the gradient has another reader: abs")
    assert second["reassociated"]


def test_a_gradient_that_outlives_the_step_is_told_to_be_cleared() -> None:
    (layer,) = qg.explain(step_of(*linear(), clear=False), rows()).layers
    assert layer["matched"]
    assert "call zero_grad in the step" in layer["not_reassociated"]


def test_a_graph_break_is_told_with_its_reason() -> None:
    step = step_of(*linear())

    def printing(batch: Tensor) -> Tensor:
        loss = step(batch)
        torch._dynamo.graph_break()
        return loss

    report = qg.explain(printing, rows())
    assert report.layers == []
    assert len(report.graph_breaks) == 1
    assert "graph break: " in str(report)


def test_the_optimizers_step_alone_is_explained_too() -> None:
    model, opt = linear()
    model(rows()).square().mean().backward()
    (layer,) = qg.explain(opt.step).layers
    assert layer["matched"]
    assert "compile the backward in the same step" in layer["not_reassociated"]


# -- report -----------------------------------------------------------------------------------------------------------


def test_report_of_a_step_that_has_run_and_of_its_recompilations() -> None:
    step = torch.compile(step_of(*linear()), backend=Interpreted(), fullgraph=True)
    step(rows(5))
    assert qg.report(step).recompiles == 0
    step(rows(3))
    report = qg.report(step)
    assert report.recompiles == 1
    assert report.graph_breaks == ()
    assert "symbolic sizes: batches[0] (s" in str(report)
    (symbolic,) = report.layers
    assert symbolic["inequality"].startswith("operations 256*T < 480*T + 1920 for every T; bytes")


def test_report_of_a_step_with_a_graph_break_holds_both_graphs() -> None:
    model, opt = linear()

    def step(batch: Tensor) -> Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        result = loss.detach()
        torch._dynamo.graph_break()
        opt.step()
        opt.zero_grad()
        return result

    compiled = torch.compile(step, backend=Interpreted())
    compiled(rows())
    report = qg.report(compiled)
    assert len(report.compilations) == 2
    assert len(report.graph_breaks) == 1
    assert "graph_break" in report.graph_breaks[0]
    (layer,) = report.layers  # the update is in the second graph
    assert layer["matched"]
    assert not layer["reassociated"]


def test_report_of_a_step_that_was_not_compiled_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"call the compiled step once before report\(\), or use explain"):
        qg.report(lambda batch: batch)


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_cache_without_a_record_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qgalore_compile.passes import PassManager

    monkeypatch.setattr(compilation, "_folder", lambda: tmp_path)
    record = compilation.Compilation(function="step")
    compilation.finish(record, PassManager([]), "nothing-here")
    assert record.from_cache
    assert not record.recorded
    assert "holds no record of its passes" in str(qg.Report((record,), (), 0))


@pytest.mark.parametrize("text", ["", "{", '{"version": 0}', "[]"])
def test_a_damaged_or_foreign_record_counts_as_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    from qgalore_compile.passes import PassManager

    monkeypatch.setattr(compilation, "_folder", lambda: tmp_path)
    (tmp_path / "key.json").write_text(text)
    record = compilation.Compilation()
    compilation.finish(record, PassManager([]), "key")
    assert not record.recorded


# -- strict -----------------------------------------------------------------------------------------------------------


def test_strict_refuses_a_layer_whose_gradient_must_exist_and_names_the_reader() -> None:
    model, opt = toy()
    step = training_step(model, opt, clear=False)
    before = snapshot(model, opt)
    compiled = torch.compile(step, backend=Interpreted(strict=True), fullgraph=True)
    with pytest.raises(UnfusedError, match=r"model\.blocks\.0\.weight: the gradient has another reader"):
        compiled(tokens())
    after = snapshot(model, opt)
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def test_strict_accepts_a_gradient_that_the_user_asked_to_keep() -> None:
    step = torch.compile(step_of(*linear()), backend=Interpreted(strict=True, reassociate="never"), fullgraph=True)
    assert step(rows()).isfinite()
