"""Weights in bfloat16 and float16 are rounded by the same draws in a compiled step as in eager: projected or at full
rank, of any shape, large or small, in kernels that are evaluated, compiled or interpreted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernels_support import evaluated_kernels
from support import Interpreted, assert_within_contract, snapshot
from torch import Tensor, fx, nn

import qgalore_compile as qg
from qgalore_compile import formats, rng
from qgalore_compile.backend.dry_run import dry, without_cache
from qgalore_compile.backend.entry import qgalore
from qgalore_compile.formats.rounding import round_to
from qgalore_compile.kernels import ops

SHAPES = {"norm": (48,), "one": (), "stacked": (3, 5, 7), "conv": (8, 6, 3, 3), "embedding": (260, 257)}


class Net(nn.Module):
    """Parameters alone: their gradients are given."""

    def __init__(self, dtype: torch.dtype, plain: Sequence[str]) -> None:
        super().__init__()
        for name in plain:
            setattr(self, name, nn.Parameter(torch.randn(SHAPES[name]).to(dtype)))
        self.right = nn.Parameter(torch.randn(48, 21).to(dtype))
        self.left = nn.Parameter(torch.randn(24, 40).to(dtype))


def build(
    dtype: torch.dtype, moments: str, rounding: str = "stochastic", names: Sequence[str] = tuple(SHAPES)
) -> tuple[Net, qg.QGaLoreAdamW]:
    torch.manual_seed(0)
    net = Net(dtype, names)
    plain = {"params": [getattr(net, name) for name in names], "rounding": rounding}
    projected = {"params": [net.right, net.left], "rank": 4, "update_proj_gap": 50, "quant_group_size": 8}
    return net, qg.QGaLoreAdamW(
        [plain, {**projected, "rounding": rounding}], lr=1e-2, weight_decay=0.1, moments=moments
    )


def gradients(net: Net, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def check(make: Callable[[], tuple[Net, qg.QGaLoreAdamW]], compile_: Callable[..., Any], steps: int = 2) -> None:
    """Some steps, each from equal state, and the weights move."""
    (net, opt), (twin, eager) = make(), make()
    fast = compile_(opt.step)
    for seed in range(steps):
        gradients(net, seed)
        gradients(twin, seed)
        before = snapshot(twin, eager)
        fast()
        eager.step()
        found, expected = snapshot(net, opt), snapshot(twin, eager)
        # nothing takes the norm here, and eager's own sum of 70,000 squares is off by 3e-6
        norms = [each.pop("global/grad_norm") for each in (found, expected)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
        assert_within_contract(found, expected)
        assert all(not torch.equal(before[name], expected[name]) for name, _ in net.named_parameters())
        net.load_state_dict(twin.state_dict())
        opt.load_state_dict(eager.state_dict())


@pytest.mark.parametrize("moments", ["8bit", "32bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_of_evaluated_kernels_is_eagers(dtype: torch.dtype, moments: str) -> None:
    backend = Interpreted()
    with evaluated_kernels():
        check(lambda: build(dtype, moments), lambda step: torch.compile(step, backend=backend, fullgraph=True))
    # every weight of any dimension is a call, however small, and draws inside of it
    graph = backend.graphs[0].graph
    counted = Counter(node.target for node in graph.nodes)
    assert (counted[ops.run_program], counted[ops.run_gemm]) == (len(SHAPES) - 1 + 2, 2)
    assert counted[torch.ops.qgalore.random_bits.default] == 1


def test_small_weights_to_nearest_stay_with_inductor() -> None:
    backend = Interpreted()
    with evaluated_kernels():
        check(
            lambda: build(torch.bfloat16, "8bit", "nearest"),
            lambda step: torch.compile(step, backend=backend, fullgraph=True), steps=1,
        )  # fmt: skip
    programs = [node for node in backend.graphs[0].graph.nodes if node.target is ops.run_program]
    assert len(programs) == 3  # the embedding, and what comes before two projected weights


def test_a_step_without_generated_kernels_is_eagers() -> None:
    """What stays with Inductor is the same operators."""
    backend = Interpreted(disable=["fuse"])
    with evaluated_kernels():
        check(lambda: build(torch.bfloat16, "8bit"), lambda step: torch.compile(step, backend=backend, fullgraph=True))
    assert not backend.graphs[0].graph.find_nodes(op="call_function", target=ops.run_program)


def test_a_step_of_compiled_kernels_is_eagers() -> None:
    """One graph and four kernels."""
    check(
        lambda: build(torch.bfloat16, "8bit", names=("norm", "conv")),
        lambda step: torch.compile(step, backend="qgalore", fullgraph=True, options={}),
    )


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_of_triton_kernels_is_eagers(dtype: torch.dtype, calls: Any) -> None:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with without_cache():
            return qgalore(gm, example_inputs, inner_compile=dry(calls.runner))  # type: ignore[arg-type]

    check(lambda: build(dtype, "8bit"), lambda step: torch.compile(step, backend=backend, fullgraph=True), steps=1)
    assert calls.counted.count("region") >= len(SHAPES) - 1  # "one" has no dimension: Inductor's


def test_equal_norms_share_a_kernel_and_draw_bits_of_their_own() -> None:
    pair = nn.ParameterList([nn.Parameter(torch.full((64,), 1 / 3).bfloat16()) for _ in range(2)])
    opt = qg.QGaLoreAdamW(pair.parameters(), lr=1e-3)
    backend = Interpreted()

    def step() -> None:
        opt.step()

    with evaluated_kernels():
        for p in pair:
            p.grad = torch.ones_like(p)
        torch.compile(step, backend=backend, fullgraph=True)()
    nodes = [node for node in backend.graphs[0].graph.nodes if node.target is ops.run_program]
    texts: set[Any] = {node.args[0] if node.args else node.kwargs["program"] for node in nodes}
    assert (len(nodes), len(texts)) == (2, 1)
    assert not torch.equal(*pair)


def test_random_bits_of_a_shape_with_other_rows_are_drawn_outside_and_are_the_same() -> None:
    """A draw by rows, over moments in blocks of the flattened tensor."""
    weight, codes = torch.randn(260, 257).bfloat16(), torch.zeros(260, 257, dtype=torch.uint8)
    absmax = torch.zeros(-(-weight.numel() // 256))

    def step(w: Tensor, codes: Tensor, absmax: Tensor, g: Tensor) -> None:
        moment = 0.9 * formats.dequantize_dynamic8(codes, absmax, True) + 0.1 * g
        for target, new in zip((codes, absmax), formats.quantize_dynamic8(moment, signed=True)[:2], strict=True):
            target.copy_(new)
        noise = rng.random_bits(w.shape, seed=1, step=2, param=3)
        w.copy_(round_to(w.float() - 0.1 * moment, torch.bfloat16, noise))

    found = [each.clone() for each in (weight, codes, absmax)]
    expected = [each.clone() for each in found]
    gradient = torch.randn(260, 257)
    with evaluated_kernels():
        torch.compile(step, backend=Interpreted(), fullgraph=True)(*found, gradient)
    step(*expected, gradient)
    names = ("weight", "codes", "absmax")
    assert_within_contract(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))
