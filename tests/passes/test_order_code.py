"""The order that the pass made is the order of the program that Inductor generates."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import qgalore_compile as qg
from qgalore_compile.passes import PassManager
from qgalore_compile.passes.liveness import INVOKE
from qgalore_compile.passes.nodes import FUNCTIONALIZED, is_gemm, previous_version

aten = torch.ops.aten

T, N, R = 8, 16, 4


def calls_of_graph(graph: fx.Graph) -> list[str]:
    """Products and calls of functions in order, each with the graph's inputs that it takes."""

    def inputs(sources: tuple[fx.Node, ...]) -> list[str]:
        bases = []
        for base in sources:
            while base.target is aten.permute.default:
                base = base.args[0]
            bases.append(previous_version(base) or base)  # what the refresh op left in a projector
        return [base.name for base in bases if base.op == "placeholder"]

    found = []
    for node in graph.nodes:
        if is_gemm(node):
            found.append(["mm", *inputs(node.args)])
        elif node.target is INVOKE:
            found.append([node.args[1], *inputs(node.args[2:])])
        elif node.target is FUNCTIONALIZED:
            found.append([node.args[0]._schema.name.removeprefix("qgalore::").removesuffix("_")])
    return [" ".join(words) for words in found]


def calls_of_code(code: str) -> list[str]:
    """The same, from the program that Inductor generated."""
    body = code[code.index("def call(self, args):") : code.index("runner = Runner")]
    found = []
    arguments: dict[str, list[str]] = {}
    for line in body.splitlines():
        inputs = re.findall(r"\barg\d+_1\b", line)
        if product := re.match(r"\s+extern_kernels\.mm\(", line):
            found.append(" ".join(["mm", *inputs]))
        elif product := re.match(r"\s+(qgalore_\w+)_args = ", line):
            arguments[product[1]] = inputs
        elif product := re.match(r"\s+buf\d+ = (qgalore_\w+)\(", line):
            found.append(" ".join([product[1], *arguments[product[1]]]))
        elif product := re.search(r"qgalore_calls\.(refresh|run_program|run_gemm)", line):
            found.append(product[1])
    return found


@pytest.mark.compiles
@inductor_config.patch(fx_graph_cache=False)  # the run's cache has no code to show
def test_inductor_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real step: two layers, autograd's backward, this project's optimizer with `nonfinite="skip_parameter"`."""
    graphs: list[list[str]] = []
    run_passes = PassManager.__call__

    def keeping(manager: PassManager, graph: fx.Graph) -> None:
        run_passes(manager, graph)
        assert len(manager.context.layers) == 2
        graphs.append(calls_of_graph(graph))

    monkeypatch.setattr(PassManager, "__call__", keeping)
    everything = {"targets": lambda name, linear: True}
    model = torch.nn.Sequential(torch.nn.Linear(N, N, bias=False), torch.nn.Tanh(), torch.nn.Linear(N, N, bias=False))
    groups = qg.param_groups(model, rank=R, quant=False, **everything)
    opt = qg.QGaLoreAdamW(groups, moments="32bit", nonfinite="skip_parameter")

    def step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    _, (code,) = run_and_get_code(torch.compile(step, backend="qgalore", fullgraph=True), torch.randn(T, N))
    (expected,) = graphs
    kinds = " ".join(re.sub(r"qgalore_|_\d+", "", call.split()[0]) for call in expected)
    # each layer's update right behind its refresh: with "skip_parameter" it waits for nothing else
    assert kinds == "mm mm mm mm mm refresh run_program run_gemm mm mm refresh run_program run_gemm"
    assert calls_of_code(code) == expected
