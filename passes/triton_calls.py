"""Call a GPU's kernels as what they are: Triton kernels that Inductor knows.

    Before    auto_functionalized(run_program, "…", read=[%r, …], _all_bases=[%codes, …])
              %y = gemm("…", [%x, %codes, %scale, %offset])
    After     %call = triton_kernel_wrapper_functional(kernel, grid, {b0: %codes, …}, tensors_to_clone=[b0, …])
              %y = getitem(triton_kernel_wrapper_functional(kernel, grid, {left: %x, …, product: empty(…)}), "product")

Requires  calls that :mod:`qgalore_compile.passes.fuse` and :mod:`qgalore_compile.passes.fuse_products` made, with
          tensors on a GPU.  Where the strides of what a kernel reads are not known, it reads a copy.
Tier      exact.

Inductor then owns buffers, streams and launches: a call costs what its own kernels cost, a written tensor that nobody
reads any more is written in place, and CUDA graphs take it in.  Each text of a program becomes one kernel of the
emitted code, whatever number of layers calls it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qgalore_compile._torch import kernel_side_table
from qgalore_compile.kernels import lowering, ops
from qgalore_compile.kernels.ir.gemm import GemmProgram, parsed
from qgalore_compile.kernels.ir.loss import LossProgram
from qgalore_compile.kernels.ir.rows import RowsProgram
from qgalore_compile.kernels.triton import kernels as triton_kernels
from qgalore_compile.kernels.triton.kernels import Kernel
from qgalore_compile.kernels.triton.tiling import NoTilingError
from qgalore_compile.passes.context import Context, PassRecord
from qgalore_compile.passes.kernel_calls import KernelCall, kernel_calls
from qgalore_compile.passes.nodes import TRITON, Mutation, aten, make, prims, value


def triton_calls(graph: fx.Graph, record: PassRecord, context: Context) -> None:
    """Replace every call of a generated kernel on a GPU."""
    made = _Made(graph, context)
    calls = [call for call in kernel_calls(graph) if lowering.runs("triton_calls", call.device)]
    triton_kernels.choose_together((call.text, [value(each) for each in call.reads], call.device) for call in calls)
    for call in calls:
        try:
            node = made.functional(call, call.mutation) if call.mutation else made.product(call)
        except NoTilingError as error:  # the operator itself says so again, at the step
            record.skip(call.node, str(error))
            continue
        record.match(node)
        graph.erase_node(call.node)
    made.finish()


class _Made:
    """The calls of one graph."""

    def __init__(self, graph: fx.Graph, context: Context) -> None:
        self.graph, self.context = graph, context
        self.numbers: dict[torch.device, fx.Node] = {}
        self.most = 0
        self.moved: dict[tuple[fx.Node, torch.device], fx.Node] = {}
        self.tables: dict[torch.device, tuple[fx.Node, list[fx.Node]]] = {}

    def functional(self, old: KernelCall, mutation: Mutation) -> fx.Node:
        """Replace a call that changes tensors; the node is left without readers."""
        text, reads, device = old.text, old.reads, old.device
        program = ops.program_of(text)
        assert not isinstance(program, (RowsProgram, LossProgram))  # their passes make none for a GPU
        sizes: tuple[Any, Any] = (1, 1)
        with self.graph.inserting_before(old.node):
            if isinstance(program, GemmProgram):
                reads = self._strided(program, reads)
                kernel, sizes = self._product(program, text, reads, device)
            else:
                kernel = triton_kernels.region_of(text, triton_kernels.looking(triton_kernels.target_of(device)))
            tensors, values, names = triton_kernels.bind(program, mutation.written, reads, mutation["numbers"])
            call = self._call(kernel, tensors, values, names, sizes, text, device)
        for index, result in mutation.results():
            result.args = (call, names[index])
        self.context.replace(self.graph, old.node, call)
        return call

    def product(self, old: KernelCall) -> fx.Node:
        """Replace a product that is read; the node is left without readers."""
        text, device, fake = old.text, old.device, value(old.node)
        program = parsed(text)
        with self.graph.inserting_before(old.node):
            reads = self._strided(program, old.reads)
            kernel, sizes = self._product(program, text, reads, device)
            tensors, _, _ = triton_kernels.bind(program, (), reads, ())
            sized = [self._size(program, reads, dim, size) for dim, size in enumerate(sizes)]
            out = make(self.graph, aten.empty.memory_format, sized, dtype=fake.dtype, device=device, pin_memory=False)
            call = self._call(kernel, {**tensors, "product": out}, {}, ["product"], tuple(sized), text, device)
            result = self.graph.call_function(operator.getitem, (call, "product"))
        result.meta = {"val": fake}
        self.context.replace(self.graph, old.node, result, up=call, down=call)
        return call

    def finish(self) -> None:
        """Make the tables of parameters' numbers and of scalars as long as they must be."""
        self._fill_tables()
        for table in self.numbers.values():
            (counter,) = table.all_input_nodes
            length = 4 * (self.most + 1)
            counter.args = (length,)
            for node in (counter, table):
                node.meta["val"] = value(node).new_empty(length)

    def _product(
        self, program: GemmProgram, text: str, reads: list[fx.Node], device: torch.device
    ) -> tuple[Kernel, tuple[Any, Any]]:
        fakes = [value(each) for each in reads]
        return triton_kernels.of_call(
            program, text, fakes, triton_kernels.target_of(device), triton_kernels.precision()
        )

    def _strided(self, program: GemmProgram, reads: list[fx.Node]) -> list[fx.Node]:
        """What a product reads, plain operands with strides that are known."""
        reads = list(reads)
        at = 0
        for operand in (each for left, right, _ in program.products for each in (left, right)):
            if operand.prologue is None and triton_kernels.matrix(value(reads[at])) is None:
                layout = torch.contiguous_format
                reads[at] = make(self.graph, aten.clone.default, reads[at], memory_format=layout)
            at += operand.tensors()
        return reads

    def _size(self, program: GemmProgram, reads: list[fx.Node], dim: int, size: Any) -> Any:
        """A size of a product as a number or as a node."""
        if isinstance(size, int):
            return size
        plain = reads[0] if dim == 0 else reads[program.left.tensors()]
        operand = program.right if dim else program.left
        return make(self.graph, aten.sym_size.int, plain, int(dim != operand.transposed))

    def _call(
        self, kernel: Kernel, tensors: dict[str, Any], values: dict[str, int], written: list[str],
        sizes: tuple[Any, ...], text: str, device: torch.device,
    ) -> fx.Node:  # fmt: skip
        constants: dict[str, Any] = {}
        tensors = {name: tensor if name in written else self._on_device(tensor, device)
                   for name, tensor in tensors.items()}  # fmt: skip
        for name, number in values.items():
            if name in kernel.params:
                tensors[name] = self._number(number, device)
            else:
                constants[name] = number
        grid: Any = kernel.grid
        if grid is None:
            grid = self._instances(kernel, sizes)
            for name, size in zip("mn", sizes, strict=True):
                if name in kernel.signature:
                    (tensors if isinstance(size, fx.Node) else constants)[name] = size
        function = triton_kernels.called(kernel)
        call = self.graph.call_function(
            TRITON, (),
            {"kernel_idx": kernel_side_table.add_kernel(function),
             "constant_args_idx": kernel_side_table.add_constant_args(constants),
             "grid": [(grid, 1, 1)], "tma_descriptor_metadata": {}, "kwargs": tensors, "tensors_to_clone": written},
        )  # fmt: skip
        call.meta = {"val": {name: value(tensors[name]) for name in written}, "program": text}
        return call

    def _instances(self, kernel: Kernel, sizes: tuple[Any, ...]) -> Any:
        """The grid of a product of which a size is known only when the step runs: a node."""
        counts = []
        for size, step in zip(sizes, kernel.tile, strict=True):
            if isinstance(size, fx.Node):
                more = self._arithmetic(operator.add, size, step - 1)
                counts.append(self._arithmetic(operator.floordiv, more, step))
            else:
                counts.append(-(-size // step))
        return self._arithmetic(operator.mul, *counts)

    def _arithmetic(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        node.meta["val"] = function(*(value(each) if isinstance(each, fx.Node) else each for each in args))
        return node

    def _number(self, number: int, device: torch.device) -> fx.Node:
        """A parameter's number as a tensor that a kernel can point to.

        As an integer argument it would make a kernel of its own of every layer, since Inductor keeps kernels apart by
        the values of their integers.  All of a graph's stand in one tensor, 16 bytes apart: Inductor tells aligned
        pointers from others.
        """
        self.most = max(self.most, number)
        if device not in self.numbers:
            with self.graph.inserting_before(self._first()):
                # not aten.arange, which Inductor expects to have been decomposed by now
                counter = make(
                    self.graph, prims.iota.default, 4, start=0, step=1, dtype=torch.int32, device=device,
                    requires_grad=False,
                )  # fmt: skip
                self.numbers[device] = make(self.graph, aten.bitwise_right_shift.Tensor_Scalar, counter, 2)
        table = self.numbers[device]
        node = self.graph.call_function(aten.select.int, (table, 0, 4 * number))
        node.meta["val"] = value(table).new_empty(())
        return node

    def _on_device(self, tensor: fx.Node, device: torch.device) -> fx.Node:
        """A scalar that PyTorch's own operators would take from the CPU as it is: the learning rate, the betas, ….

        Added to a zero of the device's, for then a kernel of Inductor's takes it as an argument: a copy would wait for
        all that the device has still to do, and a step that waits every time never runs ahead (an update of 512 x 1376
        on an H100: 0.69 ms with the copy, 0.047 without).  Inputs of one type stand in one tensor, which one kernel
        writes, 16 bytes apart.
        """
        if value(tensor).device == device:
            return tensor
        if (tensor, device) not in self.moved:
            if tensor.op == "placeholder" and value(tensor).dtype == torch.float32:
                self.moved[tensor, device] = self._in_table(tensor, device)
            else:
                at = self._first() if tensor.op == "placeholder" else tensor.next
                with self.graph.inserting_before(at):
                    self.moved[tensor, device] = self._as_argument(tensor, device)
        return self.moved[tensor, device]

    def _as_argument(self, tensor: fx.Node, device: torch.device) -> fx.Node:
        zero = make(self.graph, aten.full.default, [], 0, dtype=value(tensor).dtype, device=device)
        return make(self.graph, aten.add.Tensor, zero, tensor)

    def _in_table(self, tensor: fx.Node, device: torch.device) -> fx.Node:
        """Where :meth:`_fill_tables` will put it."""
        if device not in self.tables:
            with self.graph.inserting_before(self._first()):
                empty = make(self.graph, aten.full.default, [4], 0, dtype=torch.float32, device=device)
            self.tables[device] = (empty, [])
        table, tensors = self.tables[device]
        tensors.append(tensor)
        with self.graph.inserting_after(table):
            node = self.graph.call_function(aten.select.int, (table, 0, 4 * (len(tensors) - 1)))
        node.meta["val"] = value(table).new_empty(())
        return node

    def _fill_tables(self) -> None:
        for device, (empty, tensors) in self.tables.items():
            length = 4 * len(tensors)
            readers = list(empty.users)
            with self.graph.inserting_before(empty.next):
                place = make(
                    self.graph, prims.iota.default, length, start=0, step=1, dtype=torch.int32, device=device,
                    requires_grad=False,
                )  # fmt: skip
                empty.args = ([length], 0)
                empty.meta["val"] = value(empty).new_empty(length)
                table = empty
                for index, tensor in enumerate(tensors):
                    here = make(self.graph, aten.eq.Scalar, place, 4 * index)
                    table = make(self.graph, aten.where.self, here, self._as_argument(tensor, device), table)
            for reader in readers:
                reader.replace_input_with(empty, table)

    def _first(self) -> fx.Node:
        found: fx.Node = next(node for node in self.graph.nodes if node.op != "placeholder")
        return found
