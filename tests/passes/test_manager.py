"""The pass manager: order, records, lint, and the name under which Inductor may cache."""

from __future__ import annotations

import logging
import operator
from typing import Any

import pytest
import torch
from torch import fx

from qgalore_compile.passes import PASSES, Context, Pass, PassManager, PassRecord


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
