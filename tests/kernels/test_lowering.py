"""Adding a device: a row in the registry, and passes and operators use it; what no row takes is refused in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernels_support import EVALUATOR, Evaluated, evaluated, evaluated_kernels, filled, load, program
from passes_support import Built, Layer, galore
from support import assert_within_contract
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map_only

from qgalore_compile.kernels import lowering, ops
from qgalore_compile.kernels.ir.program import Space
from qgalore_compile.kernels.lowering import CPP, TRITON
from qgalore_compile.kernels.read.region import Refusal
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.passes.kernel_calls import kernel_calls

OTHER = torch.device("privateuseone:0")
"""A kind of device that PyTorch knows by name, and that nothing here is written for."""


ADDED = replace(EVALUATOR, name="added", devices=("privateuseone",))


def moved(built: Built, device: torch.device) -> Built:
    """The graph as it would be with all tensors on a device; tracing's are fake, and need none."""

    def move(fake: FakeTensor) -> FakeTensor:
        there = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="meta")
        return FakeTensor(fake.fake_mode, there, device)

    for node in built.graph.nodes:
        node.meta["val"] = tree_map_only(FakeTensor, move, node.meta.get("val"))
        node.kwargs = {**node.kwargs, **({"device": device} if "device" in node.kwargs else {})}
    built.module.recompile()
    return built


LAYERS = Layer("a", weight="int8", projector="int4"), Layer("b", (12, 20))


def steps() -> tuple[Built, Built]:
    """A step, and the same one again."""
    torch.manual_seed(0)
    plain = galore(*LAYERS)
    torch.manual_seed(0)
    return plain, galore(*LAYERS)


@pytest.fixture
def added() -> Iterator[None]:
    """The other device is known."""
    with lowering.registered(ADDED):
        yield


@pytest.mark.usefixtures("added")
def test_a_device_is_added_by_a_row_and_a_step_is_fused_for_it_and_runs() -> None:
    plain, built = steps()
    manager = moved(built, OTHER).after("update", "reassociate", "fuse", "fuse_products")
    assert len(manager.records[2].matches) == 2
    calls = list(kernel_calls(built.graph))
    assert {call.device for call in calls} == {OTHER}
    with evaluated_kernels():  # where there are tensors to run it on
        assert_within_contract(moved(built, torch.device("cpu")).run(), plain.run())


@pytest.mark.usefixtures("added")
def test_what_a_graph_launches_there_is_begun_by_its_lowering() -> None:
    _, built = steps()
    manager = moved(built, OTHER).after("update", "reassociate", "fuse", compiles=True)
    texts = {str(kernel.program) for kernel in manager.kernels if isinstance(kernel, Evaluated)}
    assert texts == {call.text for call in kernel_calls(built.graph) if not call.text.startswith("gemm ")}


def test_without_a_row_every_region_is_refused_by_name_before_the_step() -> None:
    _, built = steps()
    manager = moved(built, OTHER).after("update", "reassociate", "fuse", "fuse_products")
    reasons = [reason for record in manager.records[2:] for _, reason in record.skipped]
    assert set(reasons) == {"no generated kernels for 'privateuseone', only for 'cpu', 'cuda'"}
    assert [note.not_fused for note in manager.context.notes.values()] == reasons[:2]
    assert list(kernel_calls(built.graph)) == []


def test_a_region_that_a_lowering_does_not_take_stays_with_its_reason() -> None:
    _, built = steps()
    with lowering.registered(replace(CPP, accepts=lambda program, read, device: Refusal.TILE)):
        manager = built.after("update", "reassociate", "fuse", "fuse_products")
    assert list(kernel_calls(built.graph)) == []
    assert all(reason.startswith(Refusal.TILE.value) for record in manager.records[2:] for _, reason in record.skipped)
    assert {note.update_function for note in manager.context.notes.values()} == {None}


def test_an_operator_on_tensors_of_an_unknown_device_names_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = program(Space(2, 8, 8), "x f32 element in", "y f32 element out")
    made.store("y", load(made, "x"))
    monkeypatch.setattr(lowering, "_registered", [TRITON, ADDED])
    with pytest.raises(NotImplementedError, match="run on cuda and privateuseone, these tensors are on 'cpu'"):
        ops.run_program(str(made), [torch.zeros(2, 8)], [torch.ones(2, 8)], [])


def test_of_two_lowerings_for_a_device_the_later_one_counts_and_only_while_it_is_registered() -> None:
    made = program(Space(2, 8, 8), "x f32 element in", "y f32 element out")
    made.store("y", made.emit("exp", (load(made, "x"),)))
    tensors = filled(made)
    expected = evaluated(made, tensors)["y"]
    before = lowering.names()
    with lowering.registered(EVALUATOR):
        assert lowering.of(torch.device("cpu")) is not CPP
        assert lowering.names() == ("evaluator", *before)
        ops.run_program(str(made), [tensors["y"]], [tensors["x"]], [])
    assert torch.equal(tensors["y"], expected)
    assert lowering.of(torch.device("cpu")) is CPP
    assert lowering.names() == before


def test_graphs_that_are_made_for_a_gpu_are_its_lowerings_and_tensors_stay_their_devices() -> None:
    cpu = torch.device("cpu")
    assert lowering.of_graph(cpu) is CPP
    assert not lowering.runs("triton_calls", cpu)
    assert lowering.runs("triton_calls", torch.device("cuda"))
    with triton_kernels.made_for(triton_kernels.Target.named("sm_90")):
        assert lowering.of_graph(cpu) is TRITON
        assert lowering.of(cpu) is CPP
        assert lowering.runs("triton_calls", cpu)
        assert not lowering.runs("embedding_gradient", cpu)


def test_a_graph_is_cached_under_the_lowerings_that_it_was_made_with() -> None:
    from qgalore_compile.passes import PassManager

    before = PassManager([]).uuid()
    with lowering.registered(EVALUATOR):
        assert PassManager([]).uuid() != before
    assert PassManager([]).uuid() == before
