"""Functional ATen graphs for tests of passes: traced from plain functions, interpreted, compared."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from qgalore_compile.passes import PASSES, PassManager

aten = torch.ops.aten


def traced(
    function: Callable[..., Any], *inputs: Tensor, symbolic: Sequence[int] = (), names: Sequence[str] = ()
) -> fx.GraphModule:
    """The graph of ``function``, decomposed as Inductor does it.

    Args:
        function: without in-place operations but ``aten.copy_.default(argument, value)`` at its end.
        inputs: of the shapes, strides and dtypes to trace with.
        symbolic: positions of inputs whose first dimension is symbolic; equal sizes get one symbol.
        names: of the placeholders; the arguments' by default.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(index: int, given: Tensor) -> Tensor:
        sizes = [DimDynamic.STATIC] * given.dim()
        if index in symbolic:
            sizes[0] = DimDynamic.DYNAMIC
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(given, source=ConstantSource(f"input_{index}"), symbolic_context=context)

    fakes = [fake(index, given) for index, given in enumerate(inputs)]
    with mode:  # numbers that an operator wants as tensors become fake ones too
        module = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
    module.graph.eliminate_dead_code()
    for placeholder, name in zip(module.graph.find_nodes(op="placeholder"), names, strict=False):
        placeholder.name = placeholder.target = name
    return module


def after(module: fx.GraphModule, *names: str, **options: Any) -> PassManager:
    """Run the passes of these names, all if none is given, on the graph; the manager with their records."""
    manager = PassManager([each for each in PASSES if not names or each.name in names], lint=True, **options)
    manager(module.graph)
    return manager


def results(module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the graph returns, and then all inputs as it leaves them; ``inputs`` themselves stay as they are."""
    cloned = [given.clone() for given in inputs]  # keeps strides
    returned = torch.utils._pytree.tree_leaves(fx.Interpreter(module).run(*cloned))
    return [*(each for each in returned if each is not None), *cloned]


def assert_bit_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal bit for bit, strides included."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def targets(graph: fx.Graph) -> list[object]:
    """The operators that the graph calls, in order."""
    return [node.target for node in graph.nodes if node.op == "call_function"]


def position(graph: fx.Graph, node: fx.Node | str) -> int:
    """Where a node stands in its graph."""
    return next(index for index, each in enumerate(graph.nodes) if node in (each, each.name))


class Recorder(TorchDispatchMode):
    """Records what runs under it as a graph, on real tensors: faster than ``make_fx``, for thousands of graphs.

    Attributes:
        graph: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._mode = FakeTensorMode()
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        table = select_decomp_table()
        self._table = {op: table[op] for op in (aten.t.default, aten.transpose.int, aten._to_copy.default)}

    def input(self, name: str, given: Tensor) -> None:
        """Make a tensor an input of the graph."""
        self._own(given, self.graph.placeholder(name))

    def node(self, tensor: Tensor) -> fx.Node:
        """What stands for a tensor."""
        return self._nodes[id(tensor)][1]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run and record an operator; a higher-order one does not come here by itself."""
        with _disable_current_modes():
            result = target(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self.node, (args, kwargs))
        call = self.graph.call_function(target, args, kwargs)
        if isinstance(result, Tensor):
            self._own(result, call)
        else:
            call.meta["val"] = tree_map_only(Tensor, self._fake, result)
            for index, each in enumerate(result):
                if isinstance(each, Tensor):
                    self._own(each, self.graph.call_function(operator.getitem, (call, index)))
        return result

    def _own(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["val"] = self._fake(tensor)
        self._nodes[id(tensor)] = tensor, node

    def _fake(self, real: Tensor) -> Tensor:
        meta = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
        return FakeTensor(self._mode, meta, real.device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim" or (func is aten.to.dtype and args[0].dtype == args[1]):
            return func(*args, **kwargs)
        if func in self._table:
            with self:
                result = self._table[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.call(func, *args, **kwargs)


def recorded(function: Callable[..., Any], inputs: dict[str, Tensor]) -> fx.GraphModule:
    """The graph of ``function(recorder, inputs)``, which returns a list of tensors and runs on copies of ``inputs``."""
    recorder = Recorder()
    copies = {name: given.clone() for name, given in inputs.items()}
    for name, given in copies.items():
        recorder.input(name.replace(".", "_"), given)
    with torch.no_grad(), recorder:
        returned = function(recorder, copies)
    recorder.graph.output([recorder.node(each) for each in returned])
    recorder.graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), recorder.graph)
