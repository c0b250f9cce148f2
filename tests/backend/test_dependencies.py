"""Dependencies added in place are those that Inductor's own way of adding them leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch._inductor.dependencies import Dep, ReadWrites, StarDep, WeakDep
from torch._inductor.scheduler import BaseSchedulerNode
from torch.utils._ordered_set import OrderedSet

from qgalore_compile.backend import dependencies

AVAILABLE = ("there", "there_too")
ADDED: list[Dep] = [
    StarDep("a"), WeakDep("b", "m"), StarDep("there_too"), StarDep("a"), WeakDep("b", "m", is_fake=True), StarDep("c"),
]  # fmt: skip


def node(read_writes: ReadWrites) -> Any:
    """A node of a scheduler that has some buffers already."""
    made = BaseSchedulerNode.__new__(BaseSchedulerNode)
    made.scheduler = SimpleNamespace(available_buffer_names=OrderedSet(AVAILABLE))  # type: ignore[assignment]
    made.set_read_writes(read_writes)
    return made


def reads() -> ReadWrites:
    """Of an operation in Inductor's IR."""
    return ReadWrites(OrderedSet([StarDep("there"), StarDep("z")]), OrderedSet([StarDep("w")]), OrderedSet())


def known(of: Any) -> tuple[list[Dep], list[Dep], list[Dep]]:
    return list(of.read_writes.reads), list(of.read_writes.writes), list(of.unmet_dependencies)


def test_a_node_ends_with_the_same_in_the_same_order() -> None:
    expected, found = node(reads()), node(reads())
    for each in ADDED:
        expected.add_fake_dep(each)
    with dependencies.in_place():
        for each in ADDED:
            found.add_fake_dep(each)
    assert known(found) == known(expected)
    assert len(known(found)[0]) == 2 + len(ADDED) - 1  # one was given twice
    assert [each.name for each in known(found)[2]] == ["z", "a", "b", "b", "c"]


def test_what_the_operation_holds_stays_as_it_is() -> None:
    held = reads()
    with dependencies.in_place():
        for _ in range(2):  # what one node adds is not another's
            made = node(held)
            for each in ADDED:
                made.add_fake_dep(each)
    assert known(made)[0] != list(held.reads)
    assert list(held.reads) == [StarDep("there"), StarDep("z")]


def test_adding_goes_on_where_others_have_set_what_a_node_reads() -> None:
    found, expected = node(reads()), node(reads())
    for made, add in ((found, dependencies._add), (expected, BaseSchedulerNode.add_fake_dep)):
        add(made, ADDED[0])
        made.set_read_writes(made.read_writes.rename({"a": "renamed"}))
        for each in ADDED[1:]:
            add(made, each)
    assert known(found) == known(expected)
    assert any(each.name == "renamed" for each in known(found)[0])


def test_inductor_adds_in_its_own_way_afterwards() -> None:
    original = BaseSchedulerNode.add_fake_dep
    with dependencies.in_place():
        assert BaseSchedulerNode.add_fake_dep is not original
    assert BaseSchedulerNode.add_fake_dep is original
