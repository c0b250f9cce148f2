"""Programs for a GPU that is not there: what `fake_cuda` lets Inductor emit, and that it leaves nothing behind."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fake_cuda import Program, emitted, fake_cuda, llama_step
from torch import Tensor, fx
from torch._dynamo.utils import ReinplaceCounters
from torch._higher_order_ops.triton_kernel_wrap import (
    get_mutated_tensors,
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._inductor import config as inductor_config
from torch._inductor import utils
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _triton

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="its device guard and hooks are real")

aten = torch.ops.aten
BLOCK = 256


@triton.jit
def add_scaled(p, g, count, numel, block: tl.constexpr):
    """p += g · count, in place."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < numel
    sum_ = tl.load(p + at, inside) + tl.load(g + at, inside) * tl.load(count)
    tl.store(p + at, sum_, inside)


KERNEL = triton.autotune(configs=[triton.Config({}, num_warps=8, num_stages=3)], key=[])(add_scaled)


class Launches:
    """A pass: each `copy_(p, p + g)` takes its value from a launch of the kernel, whose count is picked from an iota.

    Attributes:
        kernel: with or without autotuning.
        stride: distance of the picked elements, four bytes each.
    """

    def __init__(self, kernel: Any, stride: int) -> None:
        self.kernel, self.stride = kernel, stride

    def __call__(self, graph: fx.Graph) -> None:
        anchors = graph.find_nodes(op="call_function", target=aten.copy_.default)
        with graph.inserting_before(anchors[0]):
            # what aten.arange is after decomposition; Inductor lowers no aten.arange
            options = {"dtype": torch.int32, "device": torch.device("cuda", 0), "requires_grad": False}
            length = self.stride * len(anchors)
            counts = _call(graph, torch.ops.prims.iota.default, length, start=0, step=1, **options)
        for index, anchor in enumerate(anchors):
            p, total = anchor.args
            (g,) = (each for each in total.all_input_nodes if each is not p)
            with graph.inserting_before(anchor):
                count = _call(graph, aten.select.int, counts, 0, self.stride * index)
                anchor.replace_input_with(total, self._launch(graph, p, g, count))
            graph.erase_node(total)

    def _launch(self, graph: fx.Graph, p: fx.Node, g: fx.Node, count: fx.Node) -> fx.Node:
        numel = p.meta["val"].numel()
        launch = graph.call_function(
            triton_kernel_wrapper_functional,
            kwargs={
                "kernel_idx": kernel_side_table.add_kernel(self.kernel),
                "constant_args_idx": kernel_side_table.add_constant_args({"numel": numel, "block": BLOCK}),
                "grid": [(triton.cdiv(numel, BLOCK), 1, 1)],
                "tma_descriptor_metadata": {},
                "kwargs": {"p": p, "g": g, "count": count},
                "tensors_to_clone": ["p"],
            },
        )
        launch.meta["val"] = {"p": p.meta["val"]}
        new = graph.call_function(operator.getitem, (launch, "p"))
        new.meta["val"] = p.meta["val"]
        return new


def _call(graph: fx.Graph, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(op, args, kwargs)
    values, named = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
    mode = next(each.meta["val"].fake_mode for each in graph.nodes if isinstance(each.meta.get("val"), FakeTensor))
    with mode:
        node.meta["val"] = op(*values, **named)
    return node


def add_to_both(p: Tensor, g: Tensor, q: Tensor, h: Tensor) -> Tensor:
    p.copy_(p + g)
    q.copy_(q + h)
    return g + 1


def with_kernel(*, kernel: Any = KERNEL, stride: int = 4, sizes: tuple[int, int] = (1000, 1000)) -> Program:
    """The program of `add_to_both` with the kernel in place of its additions."""
    with fake_cuda(), inductor_config.patch(post_grad_custom_post_pass=Launches(kernel, stride)):
        with FakeTensorMode():
            tensors = [torch.zeros(sizes[index // 2], device="cuda") for index in range(4)]
        return emitted(add_to_both, *tensors)


def user_kernels(program: Program) -> list[str]:
    return [name for name in program.kernels() if name.startswith("add_scaled")]


def test_two_launches_share_one_kernel() -> None:
    program = with_kernel()
    assert user_kernels(program) == ["add_scaled_0"]
    assert program.text.count("def add_scaled(") == 1
    assert "'num_warps': 8, 'num_stages': 3" in program.kernels()["add_scaled_0"]
    # the picked elements are views: two offsets of one buffer
    (counts,) = {call[2].split(",")[0] for call in program.calls("add_scaled_0")}
    assert program.calls("add_scaled_0") == [
        ["arg0_1", "arg1_1", f"{counts}, (), (), 0)", "1000", "4", "1", "1"],
        ["arg2_1", "arg3_1", f"{counts}, (), (), 4)", "1000", "4", "1", "1"],
    ]
    assert "fp64" not in program.signatures()


def test_a_launch_works_in_the_storage_of_its_input() -> None:
    ReinplaceCounters.clear()
    program = with_kernel()
    assert ReinplaceCounters.get_total_missed() == 0
    assert not program.graph.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert len(program.allocations()) == 2, "the counts and g + 1"


OTHER_SIZES = {"sizes": (992, 2000)}  # both multiples of 16, for which Triton has a type of its own


@pytest.mark.parametrize("case", [{"stride": 1}, OTHER_SIZES], ids=["alignment", "an integer argument"])
def test_launches_that_differ_in_this_have_a_kernel_each(case: dict[str, Any]) -> None:
    assert user_kernels(with_kernel(**case)) == ["add_scaled_0", "add_scaled_1"]


def test_without_autotuning_integer_arguments_may_differ() -> None:
    assert user_kernels(with_kernel(kernel=add_scaled, **OTHER_SIZES)) == ["add_scaled_0"]


def test_what_a_kernel_writes_is_read_from_its_code() -> None:
    with fake_cuda(), FakeTensorMode():
        p, g = (torch.zeros(1000, device="cuda") for _ in range(2))
        count = torch.zeros((), dtype=torch.int32, device="cuda")
        kernel = kernel_side_table.add_kernel(KERNEL)
        constants = kernel_side_table.add_constant_args({"numel": 1000, "block": BLOCK})
        assert get_mutated_tensors(kernel, constants, {"p": p, "g": g, "count": count}, {}) == ["p"]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_kernels_are_printed_for_the_capability_that_is_asked_for(capability: tuple[int, int]) -> None:
    with fake_cuda(capability):
        assert torch.cuda.get_device_capability() == capability
        with FakeTensorMode():
            x = torch.zeros(64, device="cuda")
        program = emitted(lambda x: x.sin() + 1, x)
    (source,) = program.kernels().values()
    assert f"cc={10 * capability[0] + capability[1]}, major={capability[0]}," in source


def test_tensors_on_the_gpu_are_differentiated() -> None:
    with fake_cuda(), FakeTensorMode():
        w = torch.zeros(8, 8, device="cuda", requires_grad=True)
        (w @ w + w).sum().backward()
        assert w.grad is not None
        assert w.grad.device == torch.device("cuda", 0)


def test_nothing_is_left_behind() -> None:
    def seen() -> dict[str, Any]:
        interface = torch._dynamo.device_interface.CudaInterface
        return {
            "is_available": torch.cuda.is_available(),
            "device_count": torch.cuda.device_count(),
            "accelerator": torch.accelerator.current_accelerator(),
            "functions": {name: value for name, value in vars(torch.cuda).items() if callable(value)},
            "interface": dict(vars(interface)),
            "driver": triton.runtime.driver._active,
            "has_triton": _triton.has_triton(),
            "tma": _triton.has_triton_tma_device(),
            "b200": utils.using_b200(),
            "config": inductor_config.get_config_copy(),
            "multithreading": torch._C._is_multithreading_enabled(),
        }

    before = seen()
    with fake_cuda((10, 0)):
        assert torch.accelerator.current_accelerator() == torch.device("cuda")
        assert _triton.has_triton()
        assert _triton.has_triton_tma_device()
        assert utils.using_b200()
        with FakeTensorMode():
            x = torch.zeros(64, device="cuda")
        emitted(lambda x: x.sin() + 1, x)
    assert seen() == before
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["qgalore", "inductor"])
def test_a_whole_training_step_is_emitted(backend: str) -> None:
    options = {"strict": True} if backend == "qgalore" else {}
    with fake_cuda():
        step, inputs = llama_step(targets=["down_proj"], moments="32bit")  # in half the time that 8-bit moments take
        program = emitted(step, *inputs, backend=backend, **options)
    assert "fp64" not in program.signatures()
    assert len(program.kernels()) > 10
    assert all("@triton.jit" in source for source in program.kernels().values())
    assert program.graph.graph.find_nodes(op="call_function", target=aten.copy_.default)
    compile(program.text, "<emitted>", "exec")
