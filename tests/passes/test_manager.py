"""The pass manager: order, records, lint, and the name under which Inductor may cache."""

from __future__ import annotations

import logging
import operator
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels_support import evaluated_kernels
from passes_support import Layer, galore
from support import assert_within_contract
from torch import fx

from qgalore_compile import passes
from qgalore_compile.kernels import lowering
from qgalore_compile.passes import PASSES, Context, Pass, PassManager, PassRecord
from qgalore_compile.passes.manager import PassOrderError
from qgalore_compile.passes.nodes import erase_dead


def graph_of_two_additions() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.ops.aten.add.Tensor, (x, 1))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (first, 2)))
    fx.GraphModule(torch.nn.Module(), graph)
    return graph


def additions_to_multiplications(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        if node.args[1] == 1:
            record.skip(node, "adds one")
        else:
            node.target = torch.ops.aten.mul.Tensor
            record.match(node)


def test_a_record_tells_matches_skips_operators_and_time() -> None:
    manager = PassManager([Pass("multiply", "rounding", additions_to_multiplications)], lint=True)
    manager(graph_of_two_additions())
    (record,) = manager.records
    assert (record.name, record.tier) == ("multiply", "rounding")
    assert record.matches == ["add_tensor_1"]
    assert record.skipped == [("add_tensor", "adds one")]
    assert record.ops == {"aten.add.Tensor": -1, "aten.mul.Tensor": 1}
    assert record.nodes_before == record.nodes_after == 4
    assert record.milliseconds > 0
    assert "multiply (rounding): 1 matched, 1 skipped, 4 -> 4 nodes, aten.add.Tensor -1, aten.mul.Tensor +1" in str(
        record
    )


def test_passes_run_in_the_order_of_the_list() -> None:
    ran: list[str] = []
    names = ["first", "second", "third"]
    passes = [Pass(name, "exact", lambda graph, record, context: ran.append(record.name)) for name in names]
    PassManager(passes)(graph_of_two_additions())
    assert ran == names


def test_records_are_those_of_the_last_graph() -> None:
    manager = PassManager([Pass("multiply", "rounding", additions_to_multiplications)])
    manager(graph_of_two_additions())
    manager(graph_of_two_additions())
    assert len(manager.records) == 1


def test_the_graph_after_each_pass_is_in_torchs_structured_trace() -> None:
    kept: list[dict[str, Any]] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(vars(record))

    handler = Keeping()
    log = logging.getLogger("torch.__trace")
    log.addHandler(handler)
    try:
        PassManager([Pass("multiply", "rounding", additions_to_multiplications)])(graph_of_two_additions())
    finally:
        log.removeHandler(handler)
    ((name, text),) = [(each["metadata"]["artifact"]["name"], each["payload"]) for each in kept if each["payload"]]
    assert name == "qgalore_after_multiply"
    assert text.startswith("# multiply (rounding): 1 matched")
    assert "torch.ops.aten.mul.Tensor(add_tensor, 2)" in text


def test_lint_finds_what_a_pass_broke() -> None:
    def use_before_definition(graph: fx.Graph, record: PassRecord, context: Context) -> None:
        first, second = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        first.args = (second, 1)

    with pytest.raises(RuntimeError, match="used before it has been defined"):
        PassManager([Pass("broken", "exact", use_before_definition)], lint=True)(graph_of_two_additions())


def test_uuid_depends_on_the_passes_chosen_and_on_nothing_else_of_the_run() -> None:
    one = Pass("one", "exact", lambda graph, record, context: None)
    two = Pass("two", "exact", lambda graph, record, context: None)
    assert PassManager([one, two]).uuid() == PassManager([one, two], lint=True).uuid()
    assert PassManager([one]).uuid() == PassManager([one], input_names={0: "weight"}).uuid()
    assert len({PassManager(passes).uuid() for passes in ([], [one], [two], [one, two], [two, one])}) == 5
    assert len({PassManager([one], reassociate=mode).uuid() for mode in ("memory", "cost", "never")}) == 3
    assert PassManager([one], gemm="bf16").uuid() != PassManager([one]).uuid()


def test_uuid_depends_on_the_sources_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from qgalore_compile.passes import manager

    before = PassManager([]).uuid()
    assert torch.__version__ in before
    monkeypatch.setattr(manager, "_source_hash", lambda: "another")
    assert PassManager([]).uuid() != before


def test_the_source_hash_covers_passes_kernels_and_the_package() -> None:
    import hashlib
    from pathlib import Path

    from torch._inductor.custom_graph_pass import get_hash_for_files

    from qgalore_compile.passes import manager

    root = Path(__file__).parents[2]
    files = sorted(
        str(path)
        for folder in ("qgalore_compile", "passes", "kernels")
        for kind in ("*.py", "*.inc")
        for path in (root / folder).rglob(kind)
    )
    if manager.__file__ != str(root / "passes" / "manager.py"):
        pytest.skip("the package is not installed from this tree")
    assert manager._source_hash() == get_hash_for_files(tuple(files)).hex()
    assert len(bytes.fromhex(manager._source_hash())) == hashlib.sha256().digest_size


def test_the_list_has_distinct_names_and_known_tiers() -> None:
    assert len({each.name for each in PASSES}) == len(PASSES)
    assert all(each.tier in ("exact", "rounding") for each in PASSES)
    assert not any(each.run is operator.add for each in PASSES)


# -- needs and leaves -------------------------------------------------------------------------------------------------


def nothing(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    pass


def test_what_a_pass_needs_another_leaves_and_the_other_way_round() -> None:
    assert {need for each in PASSES for need in each.needs} == {left for each in PASSES for left in each.leaves}


def test_every_word_of_the_list_is_explained_in_its_docstring() -> None:
    assert passes.__doc__ is not None
    for word in {left for each in PASSES for left in each.leaves}:
        assert f"\n{word}  " in passes.__doc__


@pytest.mark.parametrize(("name", "need"), [(each.name, need) for each in PASSES for need in each.needs])
def test_a_pass_in_front_of_what_leaves_what_it_needs_is_refused(name: str, need: str) -> None:
    moved = next(each for each in PASSES if each.name == name)
    others = [each for each in PASSES if each is not moved]
    place = next(index for index, each in enumerate(others) if need in each.leaves)
    with pytest.raises(PassOrderError, match=re.escape(f"pass {name!r} needs {need!r}, which {others[place].name!r}")):
        PassManager([*others[:place], replace(moved, needs=(need,)), *others[place:]])


def test_a_pass_that_needs_what_it_leaves_is_refused() -> None:
    with pytest.raises(PassOrderError, match="which it leaves itself"):
        PassManager([Pass("one", "exact", nothing, ("order",), ("order",))])


def test_passes_may_be_left_out() -> None:
    for left_out in PASSES:
        PassManager([each for each in PASSES if each is not left_out])


def test_the_passes_of_a_lowering_are_in_the_list() -> None:
    declared = {name for each in (lowering.CPP, lowering.TRITON) for name in each.passes}
    assert declared == {"embedding_gradient", "chunked_loss", "row_blocks", "decode_first", "triton_calls"}
    assert declared <= {each.name for each in PASSES}


def test_a_pass_is_one_function_and_one_row() -> None:
    """As CONTRIBUTING says: ``x * 1`` becomes ``x``."""

    def drop_ones(graph: fx.Graph, record: PassRecord, context: Context) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
            if node.args[1] == 1:
                record.match(node)
                context.replace(graph, node, node.args[0])
                erase_dead(graph, node)

    row = Pass("drop_ones", "exact", drop_ones, needs=("updates",), leaves=("product types",))
    place = next(index for index, each in enumerate(PASSES) if each.name == "gemm_dtype")
    listed = [*PASSES[:place], row, *PASSES[place:]]
    layer = Layer(rule="sgd")
    torch.manual_seed(0)
    plain = galore(layer)
    torch.manual_seed(0)
    built = galore(layer, also=lambda tensors: tensors["a_x0"] * 1)
    expected = {**plain.run(), "0": plain.inputs[plain.names.index("a_x0")]}
    manager = PassManager(listed, lint=True)
    with evaluated_kernels():
        manager(built.graph)
        found = built.run()
    (record,) = (record for record in manager.records if record.name == "drop_ones")
    assert len(record.matches) == 1
    assert record.ops == {"aten.mul.Tensor": -1}
    assert_within_contract(found, expected)
    with pytest.raises(PassOrderError):
        PassManager([*PASSES, row])
