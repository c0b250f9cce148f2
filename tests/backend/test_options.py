"""Options of the backend, what passes and Inductor's configuration become of them, and what is refused at the start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import (
    assert_within_contract,
    compiled,
    data,
    small,
    snapshot,
    step_of,
    tokens,
    toy,
    training_step,
)
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import qgalore_compile as qg
from qgalore_compile.backend import entry, reroll
from qgalore_compile.backend.entry import OptionError, Options, launches_of, qgalore
from qgalore_compile.kernels.cpp import launch as cpu
from qgalore_compile.passes import PASSES


def test_an_unknown_option_is_a_value_error_that_lists_the_known_ones() -> None:
    model, opt = toy()
    step = torch.compile(training_step(model, opt), backend="qgalore", fullgraph=True, options={"fast": True})
    with pytest.raises(
        ValueError,
        match=r"unknown option 'fast'; known options: strict, .*, gemm, outline, cudagraphs, reroll",
    ):
        step(tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"disable": ["nosuch"]},
            "no pass is called 'nosuch'; passes: decompose, unpad, update, late_gradient, refresh, reassociate",
        ),
        ({"exact": 1}, "'exact' must be True or"),
        ({"outline": "yes"}, "'outline' must be True, False or None, got 'yes'"),
        ({"cudagraphs": "yes"}, "'cudagraphs' must be True, False or None, got 'yes'"),
        ({"strict": None}, "'strict' must be True or False, got None"),
        ({"strict": "yes"}, "'strict' must be True or False, got 'yes'"),
        ({"reassociate": "speed"}, "'reassociate' must be one of 'memory', 'cost', 'never', got 'speed'"),
        ({"gemm": "fp8"}, "'gemm' must be one of 'same', 'bf16', got 'fp8'"),
        ({"gemm": "bf16", "exact": True}, "'exact' keeps every result bit for bit, which 'gemm': 'bf16' does not"),
    ],
)
def test_an_option_with_a_wrong_value_says_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.parse(options)


def test_disable_and_exact_choose_the_passes() -> None:
    assert [each.name for each in Options.parse({}).passes().passes] == [each.name for each in PASSES]
    assert all(each.tier == "exact" for each in Options.parse({"exact": True}).passes().passes)
    assert (
        Options.parse({"disable": "dead_allocations"}).passes().passes
        == Options.parse({"disable": ["dead_allocations"]}).passes().passes
    )
    assert "dead_allocations" not in {
        each.name for each in Options.parse({"disable": "dead_allocations"}).passes().passes
    }


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, reroll.WORTH),
        ({"reroll": None}, reroll.WORTH),
        ({"reroll": True}, reroll.LEAST),
        ({"reroll": False}, 0),
        ({"exact": True}, 0),
        ({"exact": True, "reroll": True}, reroll.LEAST),
    ],
)
def test_reroll_says_from_how_many_equal_layers_on_fewer_are_traced(options: dict[str, Any], least: int) -> None:
    assert Options.parse(options).passes().rerolls == least


def test_no_dead_full_size_allocation_is_left_and_disabling_the_pass_leaves_it() -> None:
    def dead(graph: fx.Graph) -> int:
        empties = graph.find_nodes(op="call_function", target=torch.ops.aten.empty.memory_format)
        return sum(1 for node in empties if not node.users)

    counts = []
    for options in ({}, {"disable": ["dead_allocations"]}):
        model, opt = toy()
        step, backend = compiled(training_step(model, opt), **options)
        step(tokens(), tokens())
        counts.append(dead(backend.graphs[0].graph))
        torch._dynamo.reset()
    assert counts[0] == 0
    assert counts[1] > 0


def test_random_bits_and_the_refresh_are_one_node_a_parameter() -> None:
    model, opt = toy()
    step, backend = compiled(training_step(model, opt), disable=["fuse"])
    step(tokens())
    ops = [str(node.target) for node in backend.graphs[0].graph.nodes if node.op == "call_function"]
    assert ops.count("qgalore.random_bits.default") == 2
    assert ops.count("qgalore.refresh_.default") == 2


def test_compiling_leaves_inductors_configuration_and_the_users_own_pass_alone() -> None:
    seen: list[int] = []

    def users_pass(graph: fx.Graph) -> None:
        seen.append(len(graph.nodes))

    model, opt = toy()
    with inductor_config.patch(post_grad_custom_post_pass=users_pass):
        before = inductor_config.save_config_portable()
        step, _ = compiled(training_step(model, opt))
        step(tokens())
        assert inductor_config.save_config_portable() == before
        assert inductor_config.post_grad_custom_post_pass is users_pass
    assert len(seen) == 1


def test_mode_is_handed_on_to_inductor() -> None:
    modes: list[bool] = []

    def spy(gm: fx.GraphModule, example_inputs: Any, **context: Any) -> Any:
        modes.append(inductor_config.max_autotune)
        return gm.forward

    gm = fx.symbolic_trace(lambda x: (x + 1,))
    run = qgalore(gm, [torch.ones(2)], mode="max-autotune", inner_compile=spy)
    run(torch.ones(2))
    assert modes == [True]


@pytest.mark.parametrize(
    ("mode", "setting", "message"),
    [
        (None, {}, "option 'cudagraphs' is for steps on an NVIDIA GPU, and this one is on cpu; leave it out"),
        ("reduce-overhead", {}, "mode='reduce-overhead' asks for Inductor's own CUDA graphs, which would cut it"),
        ("max-autotune", {}, "mode='max-autotune' asks for Inductor's own CUDA graphs"),
        (None, {"triton.cudagraphs": True}, "the setting triton.cudagraphs of Inductor asks for Inductor's own"),
        (None, {"cpp_wrapper": True}, "leave the setting cpp_wrapper of Inductor out, or the option"),
    ],
)
def test_cudagraphs_are_refused_in_words_where_they_cannot_be(
    mode: str | None, setting: dict[str, Any], message: str
) -> None:
    gm = fx.symbolic_trace(lambda x: (x + 1,))
    with inductor_config.patch(setting), pytest.raises(OptionError, match=message):
        qgalore(gm, [torch.ones(2)], options={"cudagraphs": True}, mode=mode, inner_compile=lambda *_, **__: None)


def test_kernels_of_ours_are_launched_like_inductor_s_own_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.ones(2)
    there = FakeTensor(FakeTensorMode(), torch.empty(2, device="meta"), torch.device("cuda", 0))
    assert launches_of([1, there, here]) == {"static_launch_user_defined_triton_kernels": True}
    assert launches_of([1, here]) == {}
    with inductor_config.patch(launches_of([there])):  # the name is one of Inductor's
        assert inductor_config.static_launch_user_defined_triton_kernels
    monkeypatch.setattr(entry, "inductor_config", SimpleNamespace())
    assert launches_of([there]) == {}  # a torch that has no such setting


def test_a_graph_on_a_cpu_is_compiled_without_static_launches() -> None:
    seen: list[bool] = []

    def spy(gm: fx.GraphModule, example_inputs: Any, **context: Any) -> Any:
        seen.append(inductor_config.static_launch_user_defined_triton_kernels)
        return gm.forward

    gm = fx.symbolic_trace(lambda x: (x + 1,))
    qgalore(gm, [torch.ones(2)], inner_compile=spy)
    assert seen == [inductor_config.static_launch_user_defined_triton_kernels]


def test_without_a_compiler_the_step_is_refused_before_anything_of_it_runs_and_explain_needs_none() -> None:
    model, opt = small(int8=True)
    before = snapshot(model, opt)
    step = torch.compile(step_of(model, opt), backend="qgalore", fullgraph=True)
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(cpu.NoCompilerError, match=r"found no C\+\+ compiler: looked for 'no-such-compiler'"):
            step(data())
        assert len(qg.explain(step, data()).layers) == 2
    assert_within_contract(snapshot(model, opt), before)


@pytest.mark.compiles
def test_a_kernel_that_does_not_compile_is_an_error_before_anything_of_the_step_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "print_cpp", lambda program: "this is no C++")
    weight, momentum = nn.Parameter(torch.zeros(256, 256)), torch.zeros(256, 256)

    def step(x: Tensor) -> None:
        (x @ weight).sum().backward()
        with torch.no_grad():
            momentum.mul_(0.9).add_(weight.grad)
            weight.sub_(0.1 * momentum)
        weight.grad = None

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"error: .*this"):
        torch.compile(step, backend="qgalore", fullgraph=True)(torch.ones(2, 256))
    assert not momentum.any()
