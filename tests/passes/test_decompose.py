"""adam, descended, decode  ->  the operations that they stand for, which leave the graph of a trace through them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from graphs import after, assert_bit_equal, results, traced
from support import assert_same_step, compiled, decoded, tokens, toy, training_step
from torch import Tensor, fx

from qgalore_compile import composites, formats
from qgalore_compile.backend import dry_run
from qgalore_compile.backend.entry import Options, qgalore
from qgalore_compile.backend.tracing import step_backend
from qgalore_compile.formats.operators import decode
from qgalore_compile.passes.kernel_calls import kernel_calls
from qgalore_compile.weights.descent import descended

aten = torch.ops.aten


def composite_calls(graph: fx.Graph) -> int:
    found = ((node, composites.COMPOSITES.get(node.target)) for node in graph.nodes)
    return sum(composite is not None and composite.applies(*node.args) for node, composite in found)


def kept(*inputs: Tensor, function: Any) -> fx.GraphModule:
    """The graph of a function, composite operators in it."""
    with composites.kept(True):
        return traced(function, *inputs)


def int8_step(weight: list[Tensor], update: Tensor, lr: Tensor, noise: Tensor, ok: Tensor) -> list[Tensor]:
    return descended(weight, update, lr, lr, noise, ok, formats.Format.parse("int8/8"))


def step_inputs(rows: int = 6) -> list[Tensor]:
    torch.manual_seed(0)
    weight = formats.encode(torch.randn(rows, 16), formats.Format.parse("int8/8"))
    noise = torch.randint(0, 1 << 16, (rows, 16), dtype=torch.int32)
    return [*weight, torch.randn(rows, 16), torch.tensor(0.1), noise, torch.tensor(True)]


def one(*given: Tensor) -> list[Tensor]:
    return int8_step(list(given[:3]), *given[3:])


def test_an_operator_becomes_what_its_function_is_traced_to() -> None:
    given = step_inputs()
    module, plain = kept(*given, function=one), traced(one, *given)
    assert composite_calls(module.graph) == 1
    expected = results(module, given)
    record = after(module, "decompose").records[-1]
    assert_bit_equal(results(module, given), expected)
    assert composite_calls(module.graph) == 0
    assert len(record.matches) == 1
    found, wanted = (Counter(node.target for node in each.graph.nodes) for each in (module, plain))
    assert found[aten.round.default] == wanted[aten.round.default]
    assert found[aten.amin.default] == wanted[aten.amin.default] == 1


def test_where_nothing_keeps_them_the_function_itself_is_traced() -> None:
    assert composite_calls(traced(one, *step_inputs()).graph) == 0


def test_alike_calls_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def three(*given: Tensor) -> list[Tensor]:
        first, second, third = given[:7], given[7:14], given[14:]
        return [*one(*first), *one(*second), *one(*third)]

    given = [*step_inputs(), *step_inputs(), *step_inputs(rows=4)]
    module = kept(*given, function=three)
    expected = results(module, given)
    seen = []
    operator = torch.ops.qgalore.descended.default
    function = composites.COMPOSITES[operator].function

    def counted(*args: Any) -> Any:
        seen.append(args[0][0].shape)
        return function(*args)

    monkeypatch.setitem(composites.COMPOSITES, operator, composites.Composite(counted))
    after(module, "decompose")
    assert_bit_equal(results(module, given), expected)
    assert [tuple(shape) for shape in seen] == [(6, 16), (4, 16)]


def test_a_tensor_that_is_two_arguments_of_one_call_is_not_of_the_next() -> None:
    def two(*given: Tensor) -> list[Tensor]:
        *weight, update, lr, noise, ok = given[:7]
        form = formats.Format.parse("int8/8")
        return [
            *descended(weight, update, lr, lr, noise, ok, form),
            *descended(weight, update, lr, given[7], noise, ok, form),
        ]

    given = [*step_inputs(), torch.tensor(0.5)]
    module = kept(*given, function=two)
    expected = results(module, given)
    assert len(after(module, "decompose").records[-1].matches) == 2
    assert_bit_equal(results(module, given), expected)


def test_copies_are_tensors_of_their_own_and_views_views() -> None:
    def two(*given: Tensor) -> list[Tensor]:
        return [*one(*given), *one(*given[:4], given[4] * 2, *given[5:])]

    module = kept(*step_inputs(), function=two)
    after(module, "decompose")
    storage = [node.meta["val"].untyped_storage()._cdata for node in module.graph.nodes
               if node.target is aten.round.default or node.target is aten.floor.default]  # fmt: skip
    assert len(storage) == len(set(storage)) > 1
    for node in module.graph.find_nodes(op="call_function", target=aten.unsqueeze.default):
        source = node.args[0]
        assert node.meta["val"].untyped_storage()._cdata == source.meta["val"].untyped_storage()._cdata


def test_a_format_that_is_no_plain_arithmetic_stays_an_operator() -> None:
    form = formats.Format.parse("nf4/64")
    stored = formats.encode(torch.randn(4, 64), form)
    module = kept(*stored, function=lambda *parts: decode(parts, (4, 64), form))
    record = after(module, "decompose").records[-1]
    assert not record.matches
    assert [node.target for node in module.graph.nodes].count(torch.ops.qgalore.decode.default) == 1


# -- whole steps -------------------------------------------------------------------------------------------------------


def final(composite: bool, **settings: Any) -> tuple[Counter[str], Counter[str]]:
    """(programs, operators) of a step's final graph, traced with composite operators or through them."""
    torch._dynamo.reset()
    found: list[fx.Graph] = []

    def finish(gm: fx.GraphModule) -> Any:
        found.append(gm.graph)
        return gm.forward

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        assert bool(composite_calls(gm.graph)) == composite
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
        pytest.param({"rule": "fira", "int8": False}, id="fira"),
        pytest.param({"rule": "muon", "rank": None, "moments": "4bit"}, id="muon"),
    ],
)
def test_a_step_becomes_the_graph_that_it_would_have_been(settings: dict[str, Any]) -> None:
    kept_programs, kept_operators = final(True, **settings)
    programs, operators = final(False, **settings)
    assert programs
    assert kept_programs == programs
    assert kept_operators == operators


def test_without_the_pass_operators_run_as_they_are() -> None:
    """No kernel is generated then, and ``strict`` says so; results are right."""
    model, opt = toy()
    expected_model, expected = toy()
    step, backend = compiled(training_step(model, opt), disable="decompose")
    step(tokens())
    training_step(expected_model, expected)(tokens())
    assert composite_calls(backend.graphs[0].graph)
    assert_same_step(decoded(*toy()), decoded(model, opt), decoded(expected_model, expected), tolerance=1e-3)
    with pytest.raises(ValueError, match="takes out the pass 'decompose'"):
        Options.parse({"strict": True, "disable": "decompose"})
