"""What a step reads on the host: found in Dynamo's graph and in the emitted program, and refused in words.

Tensors of the device "meta" stand for a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qgalore_compile._ops import define
from qgalore_compile.backend import compilation
from qgalore_compile.backend.host_reads import HostReadError, Plan, in_program, planned

WEIGHT, TOKENS = torch.zeros(4, 3, device="meta"), torch.zeros(2, 4, device="meta")

_unsafe = define(
    "unsafe_of_a_test(Tensor x) -> Tensor",
    lambda x: x.clone(),
    lambda x: torch.empty_like(x),
    torch.Tag.cudagraph_unsafe,
)


def plan_of(step: Callable[..., Any], *inputs: Any) -> Plan:
    found: list[Plan] = []

    def backend(gm: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        names = compilation.input_names(gm)
        found.append(planned(gm, given, names, lambda tensor: tensor.device.type == "cpu"))
        return gm.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        torch.compile(step, backend=backend, fullgraph=True)(*inputs)
    (plan,) = found
    return plan


def test_scalars_of_the_host_that_kernels_read_are_numbers() -> None:
    lr, limit = torch.tensor(0.1), torch.tensor(2.0)
    plan = plan_of(lambda x, lr, limit: x - lr * limit * x, TOKENS, lr, limit)
    assert plan == Plan(schedules=(), numbers=(0, 1), given=(0, 1, 2))  # in the order in which the step reads them


def test_constants_that_a_step_makes_on_the_host_are_no_numbers_and_are_let_through() -> None:
    assert plan_of(lambda x: x + torch.zeros(()) + torch.arange(4).sum(), TOKENS).numbers == ()


def test_tensors_of_a_module_stay_where_they_are_and_others_may_be_elsewhere() -> None:
    model = nn.Linear(4, 3, device="meta")
    plan = plan_of(lambda x, table: model(x).detach() @ table, TOKENS, torch.zeros(3, 3, device="meta"))
    assert len(plan.given) == 2


@pytest.mark.parametrize(
    ("step", "inputs", "message"),
    [
        (lambda x, y: x + y.to("meta"), (TOKENS, torch.ones(4)), r"y is a tensor on the CPU, torch.float32 \(4,\)"),
        (lambda x, n: (n.add_(1), x * n)[1], (TOKENS, torch.tensor(1.0)), r"n is a tensor on the CPU.* writes there"),
        (lambda x: x + torch.rand(()), (TOKENS,), r"rand.* is computed on the CPU"),
        (lambda x: x * x.sum().item(), (TOKENS,), r"has a value or a size that only the data tell"),
        (lambda x, n: x * n.item(), (TOKENS, torch.tensor(1.0)), r"has a value or a size that only the data tell"),
        (lambda x: x.cpu() + 1, (TOKENS,), r"brings data of the GPU to the host"),
        (lambda x: _unsafe(x), (TOKENS,), r"unsafe.* is marked as no part of a CUDA graph"),
    ],
    ids=["a vector", "a counter", "random", "item", "item of a number", "cpu", "unsafe operator"],
)  # fmt: skip
def test_what_else_decides_on_the_host_is_refused_with_its_name(
    step: Callable[..., Any], inputs: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        plan_of(step, *inputs)


def test_the_error_is_a_sentence_with_the_line_of_code() -> None:
    gm = fx.symbolic_trace(lambda x: x.cpu())
    (node,) = gm.graph.find_nodes(op="call_method", target="cpu")
    node.meta["stack_trace"] = 'File "mine.py", line 3, in step\n    y = x.cpu()'
    with pytest.raises(HostReadError, match=r"^cpu, `y = x.cpu\(\)`, brings data of the GPU to the host$"):
        planned(gm, [TOKENS], {}, lambda tensor: False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("        triton_poi_0.run(arg3_1.item(), buf0, 4, stream=stream0)", "a kernel takes arg3_1 from the host"),
        ("        buf7 = empty_strided_cpu((4, ), (1, ), torch.float32)", "it computes buf7 on the CPU"),
        ("        cpp_fused_add_0(arg0_1, buf1)", "it runs cpp_fused_add_0 on the CPU"),
        ("empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu", None),
        ("        torch.ops.qgalore.refresh_.default(buf1, [arg0_1], arg1_1, arg2_1)", None),
    ],
)
def test_an_emitted_program_tells_what_it_does_on_the_host(text: str, found: str | None) -> None:
    said = in_program(text)
    assert said is None if found is None else said is not None and said.startswith(found)
