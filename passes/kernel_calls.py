"""One view of a call of a generated kernel, whichever of the two forms it has in a graph.

auto_functionalized_v2(run_program, program="…", read=[%r, …], …)       and run_gemm, …: it changes tensors
gemm("…", [%x, %codes, …])                                              a product that is read
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from qgalore_compile.kernels import ops
from qgalore_compile.passes.nodes import Mutation, arguments, value


@dataclass(frozen=True)
class KernelCall:
    """A call, before a device's own passes have turned it into something else.

    Attributes:
        node: the call.
        mutation: of a call that changes tensors; None for a product that is read.
    """

    node: fx.Node
    mutation: Mutation | None

    @classmethod
    def of(cls, node: fx.Node) -> KernelCall | None:
        """The view of a node; None where it calls no generated kernel."""
        mutation = Mutation.of(node, ops.run_program, ops.run_gemm, ops.run_rows, ops.run_loss)
        return cls(node, mutation) if mutation or node.target is ops.gemm else None

    @property
    def text(self) -> str:
        """Of the program."""
        return self.mutation.program if self.mutation else str(self.node.args[0])

    @property
    def reads(self) -> list[fx.Node]:
        """Tensors that the kernel reads and does not change; of a product those of the operands come first."""
        return self.mutation.reads if self.mutation else list(arguments(self.node)[1])

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        held: torch.device = value(self.mutation.written[0] if self.mutation else self.node).device
        return held


def kernel_calls(graph: fx.Graph) -> Iterator[KernelCall]:
    """Every call of a generated kernel, in the order of the graph; the graph may be changed meanwhile."""
    for node in list(graph.nodes):
        call = KernelCall.of(node)
        if call is not None:
            yield call
