"""Tensors of a region as functions of coordinates of one space: which atoms their dimensions stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from qgalore_compile.kernels.ir.program import Space
from qgalore_compile.kernels.read.fx_values import is_tensor, shape
from qgalore_compile.kernels.read.region import Output, Refusal, RefusedError


class Read(NamedTuple):
    """An instruction as a tensor of the graph: what each dimension stands for; None for row-major elements."""

    number: int
    dims: tuple[tuple[str, ...], ...] | None


class Atoms:
    """The atoms of a space (``from_graph.py``), and tensors read in them."""

    def __init__(self, outputs: Sequence[Output], space: Space) -> None:
        self.outputs, self.space = outputs, space
        self.short = space.groups * space.width != space.columns
        self.sizes = {"row": space.rows, "group": space.groups, "lane": space.width, "column": space.columns}
        self.columns = ("column",) if self.short else ("group", "lane")

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

    def _broadcast(
        self, node: fx.Node, values: list[Read], nodes: list[fx.Node], dims: tuple[tuple[str, ...], ...] | None
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
