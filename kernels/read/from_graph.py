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
from typing import Any, NamedTuple

import torch
from torch import fx

from qgalore_compile import formats
from qgalore_compile.kernels.ir import dynamic8, float_rounding
from qgalore_compile.kernels.ir.program import BlockProgram, Buffer, ProgramError, Space
from qgalore_compile.kernels.read.fx_values import arguments, aten, dtype, is_tensor, shape, value
from qgalore_compile.kernels.read.patterns import filled, is_slice, nibbles
from qgalore_compile.kernels.read.region import NARROW, Output, Refusal, RefusedError, Region, memory_of, type_of
from qgalore_compile.kernels.read.spelling import CAST, POINTWISE, REDUCTIONS, VIEWS

qgalore = torch.ops.qgalore
MOST_READINGS = 32
"""A vector of a square matrix may be one of rows or of columns: readings of all inputs that are tried."""


class _Value(NamedTuple):
    """An instruction as a tensor of the graph: what each dimension stands for; None for row-major elements."""

    number: int
    dims: tuple[tuple[str, ...], ...] | None


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


class _Reader:
    """Reads a region over one space."""

    def __init__(self, nodes: Sequence[fx.Node], outputs: Sequence[Output], space: Space) -> None:
        self.outputs, self.space = outputs, space
        self.short = space.groups * space.width != space.columns
        self.sizes = {"row": space.rows, "group": space.groups, "lane": space.width, "column": space.columns}
        self.columns = ("column",) if self.short else ("group", "lane")
        inside, seen = set(nodes), set[fx.Node]()
        self.nibbles = {node: packed for node, packed in filter(None, map(nibbles, nodes)) if packed not in inside}
        self.fills = {node: source for node in nodes if (source := filled(node, space)) is not None}
        # depth first from the outputs, not in the graph's order: layers that do the same get the same text
        self.nodes: list[fx.Node] = []
        self.inputs: list[fx.Node] = []
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
                    self.inputs.append(node)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        if node in self.nibbles:
            return []
        return [self.fills[node]] if node in self.fills else node.all_input_nodes

    # -- inputs -----------------------------------------------------------------------------------------------------

    def readings(self, node: fx.Node) -> Sequence[tuple[str, tuple[str, ...]]]:
        """Extents that an input may have, with its atoms; [] where none fits."""
        if not is_tensor(node):
            return []
        count = math.prod(shape(node))
        whole = ("row", *self.columns)
        one_group = self.space.rows * self.space.groups == 1 and any(node is each.target for each in self.outputs)
        whole_group = "element" if self.space.columns == 1 else "group"  # scalars cannot be written
        options = [(whole_group if one_group else "scalar", ())] if count == 1 else [
            (extent, atoms)
            for extent, atoms in (
                ("element", whole), ("group", ("row", "group")), ("row", ("row",)), ("column", self.columns)
            )
            if math.prod(self.sizes[atom] for atom in atoms) == count
            and (self._split(atoms, shape(node)) is not None or (self.space.rows == 1 and extent == "element"))
        ]  # fmt: skip
        distinct = {tuple(atom for atom in atoms if self.sizes[atom] > 1): (extent, atoms)
                    for extent, atoms in reversed(options)}  # fmt: skip
        return list(reversed(distinct.values()))

    def _split(self, atoms: Sequence[str], sizes: Sequence[int]) -> tuple[tuple[str, ...], ...] | None:
        """Atoms in row-major order as the dimensions of a tensor; None where a dimension would cut one."""
        left = [atom for atom in atoms if self.sizes[atom] > 1]
        dims = []
        for size in sizes:
            taken: list[str] = []
            while left and math.prod(self.sizes[atom] for atom in taken) < size:
                taken.append(left.pop(0))
            if math.prod(self.sizes[atom] for atom in taken) != size:
                return None
            dims.append(tuple(taken))
        return None if left else tuple(dims)

    # -- the region -------------------------------------------------------------------------------------------------

    def read(self, readings: Sequence[tuple[str, tuple[str, ...]]]) -> Region:
        """The region with its inputs read in a certain way."""
        self.region = Region(BlockProgram(self.space))
        self.program = self.region.program
        self.values: dict[fx.Node, _Value] = {}
        self.pairs: dict[fx.Node, tuple[_Value, _Value]] = {}
        updated = {output.target for output in self.outputs}
        for node, (extent, atoms) in zip(self.inputs, readings, strict=True):
            number = self._load(node, memory_of(node), extent, "inout" if node in updated else "in")
            self.values[node] = _Value(number, self._split(atoms, shape(node)))
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

    def _store(self, output: Output) -> None:
        node, target = output
        number, dims = self.values[node]
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
        name = next((name for name, read in self.region.buffers.items() if read is target), None)
        if name is None:
            if target is not None and not value(target).is_contiguous():
                raise RefusedError(Refusal.STRIDES, target)
            name = f"b{len(self.program.buffers)}"
            self.program.buffers.append(Buffer(name, memory_of(node), extents[atoms], "out"))
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
            self.values[node] = _Value(number, self._split(("row", *self.columns), sizes))
        elif node in self.fills:
            source = self.values[self.fills[node]]
            self.values[node] = _Value(source.number, self._split(("row", "group", "lane"), sizes))
        elif target is qgalore.drop_tail.default or target is aten.slice.Tensor:
            self._unfill(node)
        elif target in VIEWS:
            self.values[node] = self._reshaped(node, self.values[node.all_input_nodes[0]])
        elif target is aten.expand.default:
            source = self.values[node.all_input_nodes[0]]
            dims = self._split(("row", "group", "lane"), sizes) or self._split(("row", *self.columns), sizes)
            self._broadcast(node, [source], [node.all_input_nodes[0]], dims)
            self.values[node] = _Value(source.number, dims)
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
        elif target is operator.getitem and node.args[0] in self.pairs:
            self.values[node] = self.pairs[arguments(node)[0]][arguments(node)[1]]
        elif target in (aten.full.default, aten.scalar_tensor.default):
            fill = arguments(node)[1] if target is aten.full.default else arguments(node)[0]
            self.values[node] = _Value(self._constant(fill, node), tuple(() for _ in sizes))
        else:
            self._pointwise(node)

    # -- shapes -----------------------------------------------------------------------------------------------------

    def _reshaped(self, node: fx.Node, source: _Value) -> _Value:
        sizes, extent = shape(node), self.program.instructions[source.number].extent
        if extent == "scalar":
            return _Value(source.number, tuple(() for _ in sizes))
        if source.dims is None:
            atoms: tuple[str, ...] = ("row", *self.columns)
        else:
            atoms = tuple(atom for dim in source.dims for atom in dim)
        dims = self._split(atoms, sizes)
        if dims is None and self.space.rows > 1:
            raise RefusedError(Refusal.SHAPE, node)
        if dims is None and math.prod(self.sizes[atom] for atom in atoms) != self.space.columns:
            raise RefusedError(Refusal.SHAPE, node)
        return _Value(source.number, dims)

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
        self.values[node] = _Value(source.number, (*dims[:-1], ("column",)))

    def _broadcast(
        self, node: fx.Node, values: list[_Value], nodes: list[fx.Node], dims: tuple[tuple[str, ...], ...] | None
    ) -> tuple[tuple[str, ...], ...] | None:
        """What the dimensions of a result stand for; ``dims`` where that is known."""
        sizes = shape(node)
        varying = [
            (each, source) for each, source in zip(values, nodes, strict=True)
            if each.dims is None or any(each.dims)
        ]  # fmt: skip
        if any(each.dims is None for each, _ in varying):
            if all(shape(source) == sizes for _, source in varying) and all(
                each.dims is None or self._whole(each.dims) for each, _ in varying
            ):
                return None
            raise RefusedError(Refusal.BROADCAST, node)
        result: list[tuple[str, ...]] = list(dims) if dims is not None else [()] * len(sizes)
        for each, _ in varying:
            assert each.dims is not None
            for position, dim in enumerate(each.dims, len(sizes) - len(each.dims)):
                if dim and result[position] not in ((), dim):
                    raise RefusedError(Refusal.BROADCAST, node)
                result[position] = dim or result[position]
        return tuple(result)

    def _whole(self, dims: tuple[tuple[str, ...], ...]) -> bool:
        atoms = [atom for dim in dims for atom in dim]
        return atoms == [atom for atom in ("row", *self.columns) if self.sizes[atom] > 1]

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
        self.values[node] = _Value(self._rounded(number, node), dims)

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
        if dtype(node) != torch.float32:
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
        self.values[node] = _Value(number, left)

    def _random_bits(self, node: fx.Node) -> None:
        step, sizes, seed, param = arguments(node)
        *leading, columns = sizes
        if (math.prod(leading), columns) != self.space[:2]:
            raise RefusedError(Refusal.SHAPE, node)
        names = (f"seed{len(self.region.numbers) // 2}", f"param{len(self.region.numbers) // 2}")
        self.program.numbers.extend(names)
        self.region.numbers.update(zip(names, (seed, param), strict=True))
        number = self.program.emit("random_bits", (self.values[step].number,), names)
        self.values[node] = _Value(number, self._split(("row", *self.columns), shape(node)))

    def _round_stochastically(self, node: fx.Node) -> None:
        tensor, noise, kind = arguments(node)
        sources = [self.values[tensor], self.values[noise]]
        dims = self._broadcast(node, sources, [tensor, noise], None)
        number, bits = self._cast(sources[0].number, "f32"), self._cast(sources[1].number, "i32")
        self.values[node] = _Value(float_rounding.spell(self.program, number, bits, kind), dims)

    def _encode(self, node: fx.Node) -> None:
        tensor, signed = arguments(node)
        source = self.values[tensor]
        self._needs_blocks(node, tensor)
        if self.program.instructions[source.number].extent != "element":
            raise RefusedError(Refusal.BROADCAST, node)
        codes, absmax = dynamic8.encode(self.program, self._cast(source.number, "f32"), signed=signed)
        self.pairs[node] = (_Value(codes, source.dims), _Value(absmax, self._split(("group",), (self.space.groups,))))

    def _decode(self, node: fx.Node) -> None:
        codes, absmax, signed = arguments(node)
        self._needs_blocks(node, codes)
        number = dynamic8.decode(self.program, self.values[codes].number, self.values[absmax].number, signed=signed)
        self.values[node] = _Value(number, self.values[codes].dims)

    def _needs_blocks(self, node: fx.Node, tensor: fx.Node) -> None:
        """The blocks of a flattened tensor are groups of a flat space, or the tensor is one short block."""
        count, (rows, columns, width) = math.prod(shape(tensor)), self.space
        one_block = rows == 1 and columns == count <= min(width, formats.BLOCK_SIZE)
        if not one_block and (rows, columns, width) != (1, count, formats.BLOCK_SIZE):
            raise RefusedError(Refusal.SHAPE, node)
