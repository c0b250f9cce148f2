"""A region of an FX graph becomes a :class:`BlockProgram`, or there is a reason why not.

Every tensor of the region is read as a function of coordinates of one space: a dimension of a tensor stands for some of
the *atoms* row, group, lane (place in a group) and column, in row-major order.  ``(192, 2, 256)`` is (row, group, lane)
of a space of 192 × 512 in groups of 256; ``(192, 512)`` is (row, group and lane); ``(192, 2, 1)`` varies over row and
group alone.  Views regroup atoms, broadcasting aligns them, a reduction removes the lane: what cannot be read so is no
region.  In a *flat* space, which has one row, a tensor of as many elements is read in row-major order whatever its
shape: blocks of a flattened tensor.

A row that the width does not divide is one column atom, until it is filled up to whole groups by repeating its last
element.  The fill is never stored, and changes neither a minimum nor a maximum, so programs do without.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import islice, product
from typing import Any

import torch
from torch import fx

from qgalore_compile import formats
from qgalore_compile.formats import FormatError
from qgalore_compile.kernels.ir import dynamic8, float_rounding
from qgalore_compile.kernels.ir.arithmetic import InProgram, Value
from qgalore_compile.kernels.ir.memory import MEMORY
from qgalore_compile.kernels.ir.program import BlockProgram, Buffer, ProgramError, Space
from qgalore_compile.kernels.read import coded
from qgalore_compile.kernels.read.atoms import Atoms, Read
from qgalore_compile.kernels.read.fx_values import arguments, aten, dtype, is_tensor, shape, value
from qgalore_compile.kernels.read.patterns import filled, is_slice, nibbles
from qgalore_compile.kernels.read.region import NARROW, Output, Refusal, RefusedError, Region, memory_of, type_of
from qgalore_compile.kernels.read.spelling import CAST, POINTWISE, REDUCTIONS, VIEWS

qgalore = torch.ops.qgalore
MOST_READINGS = 32
"""A vector of a square matrix may be one of rows or of columns: readings of all inputs that are tried."""


def from_graph(nodes: Sequence[fx.Node], outputs: Sequence[Output], spaces: Sequence[Space]) -> Region:
    """The program of a region.

    Args:
        nodes: the region, in the order of the graph.
        outputs: what it writes.
        spaces: spaces to try, in order (:func:`~qgalore_compile.kernels.read.region.candidates`).

    Raises:
        RefusedError: the region is no program over any of them; the reason is that of the space where reading went
            furthest.
    """
    place = {node: index for index, node in enumerate(nodes)}
    furthest: RefusedError | None = None
    for space in spaces:
        reader = _Reader(nodes, outputs, space)
        options = [reader.readings(node) for node in reader.inputs]
        unread = next((node for node, found in zip(reader.inputs, options, strict=True) if not found), None)
        if unread is not None:
            furthest = furthest or RefusedError(Refusal.SHAPE, unread)
        for readings in islice(product(*options), MOST_READINGS):
            outcome = _attempt(reader, readings)
            if isinstance(outcome, Region):
                return outcome
            if furthest is None or place.get(outcome.node, -1) > place.get(furthest.node, -1):
                furthest = outcome
    if furthest is None:
        raise RefusedError(Refusal.SHAPE, outputs[0].node)
    raise furthest


def _attempt(reader: _Reader, readings: Sequence[tuple[str, tuple[str, ...]]]) -> Region | RefusedError:
    try:
        return reader.read(readings)
    except RefusedError as refused:
        return refused


def _promoting(arg: Any) -> Any:
    """An operand as PyTorch's rules of promotion take it: a tensor without contents, or a number."""
    return value(arg) if isinstance(arg, fx.Node) else arg


class _Reader(Atoms):
    """Reads a region over one space."""

    def __init__(self, nodes: Sequence[fx.Node], outputs: Sequence[Output], space: Space) -> None:
        super().__init__(outputs, space)
        inside, seen = set(nodes), set[fx.Node]()
        self.packed, self.apart = coded.packed(nodes), coded.apart(nodes)
        inside -= self.apart
        self.nibbles = {node: packed for node, packed in filter(None, map(nibbles, nodes)) if packed not in inside}
        self.fills = {node: source for node in nodes if (source := filled(node, space)) is not None}
        # depth first from the outputs, not in the graph's order: layers that do the same get the same text
        self.nodes: list[fx.Node] = []
        self.inputs: list[fx.Node] = []
        self.coded: list[fx.Node] = []
        pending = [(output.node, False) for output in reversed(outputs)]
        while pending:
            node, complete = pending.pop()
            if complete:
                self.nodes.append(node)
            elif node not in seen:
                seen.add(node)
                if node in inside:
                    pending.append((node, True))
                    pending.extend((source, False) for source in reversed(self._sources(node)))
                else:
                    (self.coded if node in self.packed else self.inputs).append(node)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        if node in self.nibbles:
            return []
        return [self.fills[node]] if node in self.fills else node.all_input_nodes

    # -- the region -------------------------------------------------------------------------------------------------

    def read(self, readings: Sequence[tuple[str, tuple[str, ...]]]) -> Region:
        """The region with its inputs read in a certain way."""
        self.region = Region(BlockProgram(self.space))
        self.program = self.region.program
        self.values: dict[fx.Node, Read] = {}
        self.pairs: dict[fx.Node, Sequence[Read]] = {}
        updated = {output.target for output in self.outputs}
        for node in self.coded:
            self._load_packed(node, "inout" if node in updated else "in")
        for node, (extent, atoms) in zip(self.inputs, readings, strict=True):
            number = self._load(node, memory_of(node), extent, "inout" if node in updated else "in")
            self.values[node] = Read(number, self._split(atoms, shape(node)))
        for node in self.nodes:
            self._node(node)
        for output in self.outputs:
            self._store(output)
        return self.region

    def _load(self, node: fx.Node, memory: str, extent: str, access: str) -> int:
        if not value(node).is_contiguous() and node.op == "placeholder":
            raise RefusedError(Refusal.STRIDES, node)
        name = f"b{len(self.program.buffers)}"
        self.program.buffers.append(Buffer(name, memory, extent, access))
        self.region.buffers[name] = node
        return self.program.emit("load", names=(name,))

    def _load_packed(self, node: fx.Node, access: str) -> None:
        memory = self.packed[node]
        number = self._load(node, memory, "element", access)
        self.values[node] = Read(number, self._packed_dims(node, memory))

    def _packed_dims(self, node: fx.Node, memory: str) -> tuple[tuple[str, ...], ...]:
        """What the dimensions of packed codes stand for: rows, and the bytes of one."""
        *leading, columns = shape(node)
        if (math.prod(leading), columns) != (self.space.rows, MEMORY[memory].pitch(self.space.columns)) or columns == 1:
            raise RefusedError(Refusal.SHAPE, node)
        rows = self._split(("row",), leading)
        if rows is None:
            raise RefusedError(Refusal.SHAPE, node)
        return (*rows, (memory,))

    def _store(self, output: Output) -> None:
        node = output.node
        number, dims = self.values[node]
        if dims and dims[-1] and dims[-1][0] in self.packed.values():
            self._store_as(output, number, dims[-1][0], "element")
            return
        whole = ("row", *self.columns)
        atoms = tuple(atom for dim in ([whole] if dims is None else dims) for atom in dim if self.sizes[atom] > 1)
        extents = {
            tuple(atom for atom in atoms if self.sizes[atom] > 1): extent
            for extent, atoms in (
                ("scalar", ()), ("row", ("row",)), ("group", ("row", "group")), ("element", whole),
            )
        }  # fmt: skip
        if atoms not in extents:
            raise RefusedError(Refusal.SHAPE, node)
        self._store_as(output, number, memory_of(node), extents[atoms])

    def _store_as(self, output: Output, number: int, memory: str, extent: str) -> None:
        node, target = output
        name = next((name for name, read in self.region.buffers.items() if read is target), None)
        if name is None:
            if target is not None and not value(target).is_contiguous():
                raise RefusedError(Refusal.STRIDES, target)
            name = f"b{len(self.program.buffers)}"
            self.program.buffers.append(Buffer(name, memory, extent, "out"))
            if target is not None:
                self.region.buffers[name] = target
        try:
            self.program.store(name, number)
        except ProgramError as error:
            raise RefusedError(Refusal.SHAPE, node) from error
        self.region.outputs[output] = name

    def _node(self, node: fx.Node) -> None:
        try:
            self._spell(node)
        except ProgramError as error:  # types that do not go together
            raise RefusedError(Refusal.DTYPE, node) from error

    def _spell(self, node: fx.Node) -> None:
        target, sizes = node.target, shape(node)
        if not all(isinstance(size, int) for size in sizes):
            raise RefusedError(Refusal.SIZE, node)
        if node in self.nibbles:
            packed = self.nibbles[node]
            if sizes != (self.space.rows, self.space.columns):
                raise RefusedError(Refusal.SHAPE, node)
            number = self._load(packed, "u4", "element", "in")
            self.values[node] = Read(number, self._split(("row", *self.columns), sizes))
        elif node in self.fills:
            source = self.values[self.fills[node]]
            self.values[node] = Read(source.number, self._split(("row", "group", "lane"), sizes))
        elif target is qgalore.drop_tail.default or target is aten.slice.Tensor:
            self._unfill(node)
        elif target in VIEWS:
            self.values[node] = self._reshaped(node, self.values[node.all_input_nodes[0]])
        elif target is aten.expand.default:
            source = self.values[node.all_input_nodes[0]]
            dims = self._split(("row", "group", "lane"), sizes) or self._split(("row", *self.columns), sizes)
            self._broadcast(node, [source], [node.all_input_nodes[0]], dims)
            self.values[node] = Read(source.number, dims)
        elif target in REDUCTIONS:
            self._reduce(node)
        elif target is qgalore.random_bits.default:
            self._random_bits(node)
        elif target is qgalore.stochastic_round.default:
            self._round_stochastically(node)
        elif target is qgalore.quantize_dynamic8.default:
            self._encode(node)
        elif target is qgalore.dequantize_dynamic8.default:
            self._decode(node)
        elif target is coded.ENCODE:
            self._encode_as(node)
        elif target is coded.DECODE:
            self._decode_as(node)
        elif target is operator.getitem and node.args[0] in self.pairs:
            self.values[node] = self.pairs[arguments(node)[0]][arguments(node)[1]]
        elif target in (aten.full.default, aten.scalar_tensor.default):
            fill = arguments(node)[1] if target is aten.full.default else arguments(node)[0]
            self.values[node] = Read(self._constant(fill, node), tuple(() for _ in sizes))
        else:
            self._pointwise(node)

    # -- shapes -----------------------------------------------------------------------------------------------------

    def _reshaped(self, node: fx.Node, source: Read) -> Read:
        sizes, extent = shape(node), self.program.instructions[source.number].extent
        if extent == "scalar":
            return Read(source.number, tuple(() for _ in sizes))
        if source.dims is None:
            atoms: tuple[str, ...] = ("row", *self.columns)
        else:
            atoms = tuple(atom for dim in source.dims for atom in dim)
        dims = self._split(atoms, sizes)
        if dims is None and self.space.rows > 1:
            raise RefusedError(Refusal.SHAPE, node)
        if dims is None and math.prod(self.sizes[atom] for atom in atoms) != self.space.columns:
            raise RefusedError(Refusal.SHAPE, node)
        return Read(source.number, dims)

    def _unfill(self, node: fx.Node) -> None:
        """Back from whole groups to the row."""
        source, sizes = self.values[node.all_input_nodes[0]], shape(node)
        dims = source.dims
        if dims is None or not dims or dims[-1] not in (("group", "lane"), ("lane",)) or not self.short:
            raise RefusedError(Refusal.OPERATION, node)
        if node.target is aten.slice.Tensor and not is_slice(node, 0, self.space.columns):
            raise RefusedError(Refusal.OPERATION, node)
        if sizes[-1] != self.space.columns:
            raise RefusedError(Refusal.OPERATION, node)
        self.values[node] = Read(source.number, (*dims[:-1], ("column",)))

    # -- operations -------------------------------------------------------------------------------------------------

    def _constant(self, number: Any, node: fx.Node) -> int:
        kind = type_of(dtype(node), node)
        if not isinstance(number, (int, float)):
            raise RefusedError(Refusal.SIZE, node)
        return self.program.constant(number, kind)

    def _pointwise(self, node: fx.Node) -> None:
        spelled = POINTWISE.get(node.target)
        if spelled is None:
            raise RefusedError(Refusal.OPERATION, node)
        args = list(arguments(node))[: 1 if spelled is CAST else None]
        operands = [arg for arg in args if isinstance(arg, fx.Node)]
        if not all(is_tensor(operand) for operand in operands):
            raise RefusedError(Refusal.SIZE, node)
        dims = self._broadcast(node, [self.values[each] for each in operands], operands, None)
        # a comparison is computed in the type that its operands promote to
        computed = torch.result_type(*map(_promoting, args)) if spelled.compares else dtype(node)
        kind = type_of(computed, node)
        if spelled.compares and kind == "bool":
            kind = "i32"
        if computed in NARROW and spelled is not CAST:
            # 32 bits hold what is narrow, but neither what wraps around nor what a wider number is cut to
            cut = any(dtype(each) not in (torch.bool, computed) for each in operands)
            if spelled.arithmetic or cut:
                raise RefusedError(Refusal.DTYPE, node)
        numbers = []
        for position, arg in enumerate(args):
            as_it_is = spelled.condition and position == 0
            if isinstance(arg, fx.Node):
                numbers.append(self.values[arg].number if as_it_is else self._cast(self.values[arg].number, kind))
            elif isinstance(arg, (int, float)):
                numbers.append(self.program.constant(arg, kind))
            elif arg is not None or not spelled.options:
                raise RefusedError(Refusal.OPERATION, node)
            else:
                numbers.append(-1)
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            if not isinstance(alpha, (int, float)):
                raise RefusedError(Refusal.SIZE, node)
            numbers[1] = self.program.emit("mul", (numbers[1], self.program.constant(alpha, kind)))
        if set(node.kwargs) - {"alpha", "dtype", "layout", "device", "pin_memory", "memory_format"}:
            raise RefusedError(Refusal.OPERATION, node)
        number = spelled.build(self.program, numbers)
        integer = self.program.instructions[number].type in ("i32", "i64")
        if spelled is CAST and dtype(node) in NARROW and integer and dtype(operands[0]) != dtype(node):
            if dtype(node) != torch.uint8:
                raise RefusedError(Refusal.DTYPE, node)
            number = self.program.emit("bitand", (self._cast(number, "i32"), self.program.constant(255, "i32")))
        self.values[node] = Read(self._rounded(number, node), dims)

    def _cast(self, number: int, kind: str) -> int:
        have = self.program.instructions[number].type
        return number if have == kind else self.program.emit(kind, (number,))

    def _rounded(self, number: int, node: fx.Node) -> int:
        """A result as its dtype holds it: eager PyTorch rounds every one."""
        rounding = {torch.bfloat16: "round_bf16", torch.float16: "round_f16"}.get(dtype(node))
        number = self._cast(number, type_of(dtype(node), node))
        return self.program.emit(rounding, (number,)) if rounding else number

    def _reduce(self, node: fx.Node) -> None:
        source_node, dims, *rest = arguments(node)
        source = self.values[source_node]
        axes = [int(axis) % len(shape(source_node)) for axis in ([dims] if isinstance(dims, int) else dims or [])]
        keep = bool(rest[0]) if rest else bool(node.kwargs.get("keepdim", False))
        if source.dims is None or len(axes) != 1 or source.dims[axes[0]] != ("lane",):
            raise RefusedError(Refusal.REDUCTION, node)
        operation = REDUCTIONS[node.target]
        if not dtype(node).is_floating_point or dtype(node) == torch.float64:
            raise RefusedError(Refusal.DTYPE, node)
        if self.short and operation == "group_sum":
            raise RefusedError(Refusal.PADDING, node)
        number = source.number
        if self.program.instructions[number].extent != "element":
            raise RefusedError(Refusal.REDUCTION, node)
        number = self.program.emit(operation, (self._cast(number, "f32"),))
        if node.target is aten.mean.dim:
            number = self.program.emit("div", (number, self.program.constant(self.space.width)))
        axis = axes[0]
        left = (*source.dims[:axis], *([()] if keep else []), *source.dims[axis + 1 :])
        self.values[node] = Read(self._rounded(number, node), left)

    def _random_bits(self, node: fx.Node) -> None:
        step, sizes, seed, param = arguments(node)
        *leading, columns = sizes
        if (math.prod(leading), columns) != self.space[:2]:
            raise RefusedError(Refusal.SHAPE, node)
        names = (f"seed{len(self.region.numbers) // 2}", f"param{len(self.region.numbers) // 2}")
        self.program.numbers.extend(names)
        self.region.numbers.update(zip(names, (seed, param), strict=True))
        number = self.program.emit("random_bits", (self.values[step].number,), names)
        self.values[node] = Read(number, self._split(("row", *self.columns), shape(node)))

    def _round_stochastically(self, node: fx.Node) -> None:
        tensor, noise, kind = arguments(node)
        sources = [self.values[tensor], self.values[noise]]
        dims = self._broadcast(node, sources, [tensor, noise], None)
        number, bits = self._cast(sources[0].number, "f32"), self._cast(sources[1].number, "i32")
        self.values[node] = Read(float_rounding.spell(self.program, number, bits, kind), dims)

    def _encode(self, node: fx.Node) -> None:
        tensor, signed = arguments(node)
        source = self.values[tensor]
        self._needs_blocks(node, tensor)
        if self.program.instructions[source.number].extent != "element":
            raise RefusedError(Refusal.BROADCAST, node)
        codes, absmax = dynamic8.encode(self.program, self._cast(source.number, "f32"), signed=signed)
        blocks = self._split(("row", "group"), (self.space.rows * self.space.groups,))
        self.pairs[node] = (Read(codes, source.dims), Read(absmax, blocks))

    def _decode(self, node: fx.Node) -> None:
        codes, absmax, signed = arguments(node)
        self._needs_blocks(node, codes)
        number = dynamic8.decode(self.program, self.values[codes].number, self.values[absmax].number, signed=signed)
        self.values[node] = Read(number, self.values[codes].dims)

    def _needs_blocks(self, node: fx.Node, tensor: fx.Node) -> None:
        """The blocks of a flattened tensor are groups of the space, or the tensor is one short block."""
        if not coded.has_blocks(self.space, math.prod(shape(tensor)), formats.BLOCK_SIZE):
            raise RefusedError(Refusal.SHAPE, node)

    def _encode_as(self, node: fx.Node) -> None:
        tensor, noise, _ = arguments(node)
        form, source = coded.node_format(node), self.values[tensor]
        if not coded.has_groups(self.space, node):
            raise RefusedError(Refusal.SHAPE, node)
        if self.program.instructions[source.number].extent != "element":
            raise RefusedError(Refusal.BROADCAST, node)
        x = Value(self.program, self._cast(source.number, "f32"))
        draws = None if noise is None else Value(self.program, self._cast(self.values[noise].number, "i32"))
        try:
            stored = form.store(InProgram(self.program, form.width), x, draws)
        except FormatError as error:
            raise RefusedError(Refusal.OPERATION, node) from error
        values = []
        for index, (part, each) in enumerate(zip(form.parts, stored, strict=True)):
            result = next((user for user in node.users if user.args[1] == index), None)
            if result in self.packed:
                dims: Any = self._packed_dims(result, part.memory)
            elif part.extent == "group":
                dims = self._split(("row", "group"), form.shape_of(part, shape(tensor)))
            else:
                dims = source.dims
            values.append(Read(each.number, dims))
        self.pairs[node] = values

    def _decode_as(self, node: fx.Node) -> None:
        stored, sizes, *_ = arguments(node)
        form = coded.node_format(node)
        if not coded.has_groups(self.space, node):
            raise RefusedError(Refusal.SHAPE, node)
        parts = [Value(self.program, self.values[each].number) for each in stored]
        for part, each in zip(form.parts, parts, strict=True):
            if not coded.fits(self.space, self.program.instructions[each.number].extent, part.extent):
                raise RefusedError(Refusal.BROADCAST, node)
        value = form.load(InProgram(self.program, form.width), parts)
        self.values[node] = Read(self._rounded(value.number, node), self._split(("row", *self.columns), sizes))
