"""project_, update_, decode  ->  the operations that they stand for, which leave the graph of a trace through them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from graphs import after, assert_bit_equal, results, traced
from support import assert_same_step, compiled, decoded, tokens, toy, training_step
from torch import Tensor, fx, nn

import qgalore_compile as qg
from qgalore_compile import composites, formats
from qgalore_compile.backend import dry_run
from qgalore_compile.backend.entry import qgalore
from qgalore_compile.backend.tracing import step_backend
from qgalore_compile.formats.operators import decode
from qgalore_compile.optim.operators import PROJECT, SHARED, UPDATE, text_of
from qgalore_compile.passes.kernel_calls import kernel_calls
from qgalore_compile.rng import MOMENT_STREAM

aten = torch.ops.aten


def composite_calls(graph: fx.Graph) -> int:
    found = ((node, composites.COMPOSITES.get(node.target)) for node in graph.nodes)
    return sum(composite is not None and composite.applies(*node.args) for node, composite in found)


def kept(*inputs: Tensor, function: Any) -> fx.GraphModule:
    """The graph of a function, composite operators in it."""
    with composites.kept(True):
        return traced(function, *inputs)


def decoding(*parts: Tensor) -> Tensor:
    return decode(parts, (6, 16), formats.Format.parse("int8/8"))


def stored(rows: int = 6) -> list[Tensor]:
    torch.manual_seed(0)
    return formats.encode(torch.randn(rows, 16), formats.Format.parse("int8/8"))


def test_an_operator_becomes_what_its_function_is_traced_to() -> None:
    given = stored()
    module, plain = kept(*given, function=decoding), traced(decoding, *given)
    assert composite_calls(module.graph) == 1
    expected = results(module, given)
    record = after(module, "decompose").records[-1]
    assert_bit_equal(results(module, given), expected)
    assert composite_calls(module.graph) == 0
    assert len(record.matches) == 1
    found, wanted = (Counter(node.target for node in each.graph.nodes) for each in (module, plain))
    assert found[aten.mul.Tensor] == wanted[aten.mul.Tensor] == 1


def test_where_nothing_keeps_them_the_function_itself_is_traced() -> None:
    assert composite_calls(traced(decoding, *stored()).graph) == 0


def test_a_format_that_is_no_plain_arithmetic_stays_an_operator() -> None:
    form = formats.Format.parse("nf4/64")
    given = formats.encode(torch.randn(4, 64), form)
    module = kept(*given, function=lambda *parts: decode(parts, (4, 64), form))
    record = after(module, "decompose").records[-1]
    assert not record.matches
    assert [node.target for node in module.graph.nodes].count(torch.ops.qgalore.decode.default) == 1


def test_a_tensor_that_is_two_arguments_of_one_call_is_not_of_the_next() -> None:
    def two(codes: Tensor, scale: Tensor, offset: Tensor) -> list[Tensor]:
        return [decoding(codes, scale, scale), decoding(codes, scale, offset)]

    module = kept(*stored(), function=two)
    expected = results(module, stored())
    assert len(after(module, "decompose").records[-1].matches) == 2
    assert_bit_equal(results(module, stored()), expected)


# -- operators that write ----------------------------------------------------------------------------------------------


class Step:
    """Operators of parameters of these shapes, one after the other, as functions of a flat list of tensors."""

    def __init__(
        self, *shapes: tuple[int, int], rule: str = "galore", dtype: torch.dtype = torch.bfloat16, **keys: Any
    ) -> None:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        self.opt = qg.QGaLoreAdamW(
            [{"params": weights, "rank": 4, "rule": rule, "quant_group_size": 8, **keys}], lr=0.1
        )
        (self.group,) = self.opt.param_groups
        with composites.kept(True):
            self.told = text_of(self.group)
        self.numbers = [*self.group.numbers, self.group["lr"]]
        self.names = [[name for name in self.opt.state[weight] if name not in SHARED] for weight in weights]
        self.given = [*self.numbers, torch.tensor(True)]
        for weight, names in zip(weights, self.names, strict=True):
            self.given += [weight.detach(), torch.randn(weight.shape).to(dtype)]
            self.given += [self.opt.state[weight][name] for name in names]

    def run(self, project: Any, update: Any, given: Sequence[Tensor], first: int = 0) -> None:
        """Call these overloads, of parameters numbered from ``first``."""
        rest = list(given)
        numbers, ok = rest[:13], rest[13]
        rest = rest[14:]
        for number, names in enumerate(self.names, first):
            weight, gradient, *state = rest[: 2 + len(names)]
            rest = rest[2 + len(names) :]
            how = (self.told, number, ",".join(names))
            low, _ = project(gradient, state, numbers[:12], *how)
            read = gradient if self.group.rule is not None and self.group.rule.reads_gradient else None
            update(weight, state, numbers, read, low, None, None, ok, *how)

    def expected(self, first: int = 0) -> list[Tensor]:
        """All tensors behind the phases themselves."""
        given = [each.clone() for each in self.given]
        self.run(PROJECT.seen, UPDATE.seen, given, first)
        return given

    def hidden(self, first: int = 0) -> fx.GraphModule:
        """The graph, in which operators write unseen."""
        return kept(*self.given, function=lambda *given: self.run(PROJECT.unseen, UPDATE.unseen, given, first))


def assert_steps(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("rule", ["galore", "fira", "apollo", "muon"])
def test_what_operators_write_is_written_at_the_end_and_read_by_the_next(rule: str) -> None:
    step = Step((12, 16), rule=rule, dtype=torch.float32)
    module = step.hidden()
    after(module, "decompose")
    assert composite_calls(module.graph) == 0
    copies = module.graph.find_nodes(op="call_function", target=aten.copy_.default)
    assert len({node.args[0] for node in copies}) == len(copies) >= 4
    assert all(node.args[0].op == "placeholder" for node in copies)
    assert {node.next.target for node in copies} <= {aten.copy_.default, "output"}
    assert_steps(results(module, step.given), step.expected())


def test_alike_calls_are_traced_once_and_have_their_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step((12, 16), (12, 16), (16, 12))
    module = step.hidden(first=5)
    seen = []
    composite = composites.COMPOSITES[UPDATE.unseen]

    def counted(weight: Tensor, *rest: Any) -> None:
        seen.append(tuple(weight.shape))
        composite.function(weight, *rest)

    monkeypatch.setitem(composites.COMPOSITES, UPDATE.unseen, composite._replace(function=counted))
    after(module, "decompose")
    assert seen == [(12, 16), (16, 12)]
    drawn = module.graph.find_nodes(op="call_function", target=torch.ops.qgalore.random_bits.default)
    assert [node.args[3] for node in drawn] == [5, 6, 7]
    assert_steps(results(module, step.given), step.expected(first=5))


def test_a_number_stands_below_the_bits_of_a_stream() -> None:
    module = Step((12, 16), moments="e4m3/8").hidden(first=9)
    after(module, "decompose")
    drawn = module.graph.find_nodes(op="call_function", target=torch.ops.qgalore.random_bits.default)
    assert {node.args[3] for node in drawn} == {9, 9 | MOMENT_STREAM}


def test_copies_are_tensors_of_their_own_and_views_views() -> None:
    module = Step((12, 16), (12, 16)).hidden()
    after(module, "decompose")
    storage = [node.meta["val"].untyped_storage()._cdata for node in module.graph.nodes
               if node.target in (aten.sqrt.default, aten.mul.Tensor)]  # fmt: skip
    assert len(storage) == len(set(storage)) > 2
    for node in module.graph.find_nodes(op="call_function", target=aten.unsqueeze.default):
        source = node.args[0]
        assert node.meta["val"].untyped_storage()._cdata == source.meta["val"].untyped_storage()._cdata


def test_what_a_call_reads_stays_what_it_was_though_an_earlier_one_has_written_it() -> None:
    """A gradient that is another parameter's weight: the value, before its update."""
    step = Step((12, 16), (12, 16), dtype=torch.float32)
    first, second = 14, 16 + len(step.names[0])
    step.given[second + 1] = step.given[first].clone()
    expected = step.expected()
    module = step.hidden()
    weight, gradient = (list(module.graph.find_nodes(op="placeholder"))[at] for at in (first, second + 1))
    gradient.replace_all_uses_with(weight)
    after(module, "decompose")
    assert_steps(results(module, step.given), expected)


def test_a_gradient_that_is_the_weight_itself_is_read_as_it_was() -> None:
    step = Step((12, 16), rule="fira", dtype=torch.float32)
    step.given[15] = step.given[14].clone()
    expected = step.expected()
    module = step.hidden()
    weight, gradient = list(module.graph.find_nodes(op="placeholder"))[14:16]
    gradient.replace_all_uses_with(weight)
    after(module, "decompose")
    assert_steps(results(module, step.given), expected)


# -- whole steps -------------------------------------------------------------------------------------------------------


def final(composite: bool, **settings: Any) -> tuple[Counter[str], Counter[str]]:
    """(programs, operators) of a step's final graph, traced with composite operators or through them."""
    torch._dynamo.reset()
    found: list[fx.Graph] = []

    def finish(gm: fx.GraphModule) -> Any:
        found.append(gm.graph)
        return gm.forward

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        assert bool(gm.graph.find_nodes(op="call_function", target=UPDATE.seen)) == composite
        with dry_run.without_cache():
            return qgalore(gm, inputs, inner_compile=dry_run.dry(finish))

    model, opt = toy(**settings)
    torch.compile(training_step(model, opt), backend=step_backend(backend, composite), fullgraph=True)(tokens())
    programs = Counter(call.text for call in kernel_calls(found[0]))
    return programs, Counter(str(node.target) for node in found[0].nodes if node.op == "call_function")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"dtype": torch.bfloat16, "nonfinite": "skip_parameter"}, id="bfloat16"),
        pytest.param({"max_grad_norm": 1.0, "moments": "4bit", "weight_decay": 0.1}, id="4bit"),
        pytest.param({"rule": "fira", "int8": False}, id="fira", marks=pytest.mark.more),
        pytest.param({"rule": "muon", "rank": None, "moments": "4bit"}, id="muon"),
        pytest.param({"rule": "factored", "moments_on_refresh": "keep"}, id="factored"),
        pytest.param({"moments_on_refresh": "rotate"}, id="rotate", marks=pytest.mark.more),
    ],
)
def test_a_step_becomes_the_graph_that_it_would_have_been(settings: dict[str, Any]) -> None:
    kept_programs, kept_operators = final(True, **settings)
    programs, operators = final(False, **settings)
    assert programs
    assert kept_programs == programs
    assert kept_operators == operators


def test_without_the_pass_operators_are_traced_through() -> None:
    """All is fused as with it."""
    model, opt = toy()
    expected_model, expected = toy()
    step, backend = compiled(training_step(model, opt), disable="decompose", strict=True)
    step(tokens())
    training_step(expected_model, expected)(tokens())
    assert not composite_calls(backend.graphs[0].graph)
    assert_same_step(decoded(*toy()), decoded(model, opt), decoded(expected_model, expected), tolerance=1e-3)
